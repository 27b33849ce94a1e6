"""Few-shot grids: demonstrations of a color rule, and a query; a toy of ARC's form.

An instance is ``x = {"demos": {"input": [K, S, S], "output": [K, S, S]}, "query": [S, S]}``; its
rule is a permutation of the colors, which only the demonstrations tell.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import ttt_jax as ttt
from experiments.config_keys import NEEDED, Key, whole
from ttt_jax import metrics
from ttt_jax.task import Examples, Task

_ROLES = {"train": 1, "validation": 2, "reported": 3}

# The keys that this task reads, beside those of all.
KEYS = {
    "data.colors": Key(whole(2), "colors of a grid", NEEDED),
    "data.side": Key(whole(1), "cells along a side of a grid", NEEDED),
    "data.demos": Key(whole(1), "demonstrations of a task", NEEDED),
    "data.tasks": Key(whole(1), "tasks of a role", NEEDED),
    "model.width": Key(whole(1), "of a color's embedding", NEEDED),
}


def task(config: ml_collections.ConfigDict) -> Task:
    """The task of a config: ``data.colors`` C, ``data.side`` S, ``data.demos`` K."""
    colors, width = config.data.colors, config.model.width

    def init(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        return {
            "params": {
                "embed": 0.5 * jax.random.normal(first, (colors, width)),
                "out": 0.5 * jax.random.normal(second, (width, colors)),
            }
        }

    def logits(params: Any, grids: jax.Array) -> jax.Array:
        """Colors of every cell, ``[N, S, S] -> [N, S, S, C]``."""
        weights = params["params"]
        return jnp.tanh(weights["embed"])[grids] @ weights["out"]

    def answer(params: Any, x: Any) -> jax.Array:
        """The grids that queries become, int ``[N, S, S]``."""
        return logits(params, x["query"]).argmax(-1)

    def loss(params: Any, examples: Examples, key: jax.Array) -> jax.Array:
        scores = logits(params, examples.x["query"])
        return optax.softmax_cross_entropy_with_integer_labels(scores, examples.y).mean()

    def streams(role: str, seed: int) -> dict[str, Any]:
        examples = _tasks(config, role, seed, config.data.tasks)
        return {"grids": list(ttt.task.in_batches([examples], config.adapt.batch_size))}

    def cell_error(output: Any, source: Any, examples: Examples) -> np.ndarray:
        return (np.asarray(output) != examples.y).mean((1, 2))

    return Task(
        name="color rules",
        init=init,
        heads=lambda: {"answer": answer, "logits": logits},
        augment=None,
        loss=loss,
        training=lambda seed: _Training(config, seed),
        streams=streams,
        metrics={"cell_error": metrics.mean(cell_error), "solved": metrics.solved()},
        chooses="cell_error",
    )


def demonstrations(
    answer: Callable[..., Any],
    logits: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation,
    select: ttt.Selection = ttt.select.everything(),  # noqa: B008 (immutable)
    num_steps: int = 20,
) -> ttt.Predictor:
    """Gradient steps on the demonstrations of a task, then the answer to its query.

    Args:
      answer: model function of the answer.
      logits: ``(params, grids[N, S, S]) -> [N, S, S, C]``.
      optimizer: of the steps.
      select: what adapts.
      num_steps: S, static.
    """

    def loss(params: Any, x: Any, key: jax.Array) -> jax.Array:
        scores = logits(params, x["demos"]["input"])
        labels = x["demos"]["output"]
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    adapter = ttt.gradient_adapter(loss, optimizer, select=select)
    return ttt.episodic(adapter, ttt.unbatched(answer), num_steps=num_steps)


def _tasks(config: Any, role: str, seed: int, count: int) -> Examples:
    rng = np.random.default_rng((_ROLES.get(role, 2), seed))
    data = config.data
    shape = (count, data.demos + 1, data.side, data.side)
    grids = rng.integers(data.colors, size=shape)
    rules = rng.permuted(np.tile(np.arange(data.colors), (count, 1)), axis=1)
    results = rules[np.arange(count)[:, None, None, None], grids]
    x = {
        "demos": {"input": grids[:, :-1], "output": results[:, :-1]},
        "query": grids[:, -1],
    }
    x = jax.tree.map(lambda leaf: leaf.astype(np.int32), x)
    tags = {"rule": np.full(count, "permutation")}
    return Examples(np.arange(count), x, results[:, -1].astype(np.int32), tags)


@dataclasses.dataclass(frozen=True)
class _Training:
    """Training tasks; see :class:`ttt_jax.task.TrainingData`."""

    config: Any
    seed: int

    def __iter__(self) -> Iterator[Examples]:
        return ttt.task.in_batches(
            [_tasks(self.config, "train", self.seed, 512)], self.config.train.batch_size
        )

    def steps(self, start: int) -> Iterator[Examples]:
        """Fresh tasks at every step, the same ones at step k wherever it began."""
        step = start
        while True:
            yield _tasks(
                self.config, "train", self.seed + 7919 * step, self.config.train.batch_size
            )
            step += 1
