"""Every default of the methods over text: as published, or as their docstrings say."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ttt_jax import methods, select

ADAM = optax.adam(3e-3, b1=0.9, b2=0.95, eps=1e-10)
ADAPTER = {"optimizer": ADAM, "select": select.lora(), "bos": None}
# Sources: parameter-golf's pull request 77 (its step is 0.01), Hardt and Sun 2024, Hübotter et al.
PUBLISHED = {
    "document_ttt": {**ADAPTER, "num_steps": 1, "remat": 0, "mixed": False},
    # Tandon et al., 2025, Section 3; the gradient of training, not the scores, is our choice.
    "end_to_end": {
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
        "select": select.paths(".*layers_1/mlp/.*"),
        "num_steps": 1,
        "bos": None,
        "remat": None,
        "mixed": True,
    },
    "document_adapter": {**ADAPTER, "num_steps": 1},
    "continue_document": {
        **ADAPTER,
        "num_tokens": inspect.Parameter.empty,
        "sampler": None,
        "stop": (),
        "cache": "recomputed",
        "num_steps": 1,
    },
    "in_place": {
        "optimizer": optax.sgd(1.0),
        "select": select.paths(".*mlp/down/kernel"),
        "max_norm": 0.03,
        "num_steps": 1,
        "bos": None,
        "remat": 0,
        "mixed": False,
    },
    "in_place_targets": {
        "rate": 0.3,
        "max_norm": 1e-5,
        "select": select.paths(".*mlp/down/kernel"),
        "bos": None,
    },
    "neighbors_ttt": {
        "features": None,
        "choose": None,
        "k": 20,
        "optimizer": optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(5e-6, weight_decay=0.01)
        ),
        "select": select.everything(),
        "query_chunks": 1,
        "bos": None,
    },
    "passages_adapter": {**ADAPTER, "num_epochs": 1},
    "merged_adapters": {
        "features": None,
        "select": select.lora(),
        "k": 10,
        "temperature": 0.1,
        "query_chunks": 1,
        "bos": None,
    },
}
# Zuo et al., 2025: 64 rollouts, 32 of them learned from, at temperature 1; 16 to evaluate. The step
# size is one for low-rank leaves, and the number of steps is not published for sets of all sizes.
PUBLISHED["ttrl"] = {
    "num_tokens": inspect.Parameter.empty,
    "stop": (),
    "optimizer": optax.adam(1e-3),
    "select": select.lora(),
    "num_steps": 30,
    "num_rollouts": 64,
    "num_trained": 32,
    "temperature": 1.0,
    "min_consensus": 0.0,
    "rare": None,
    "held_out_votes": False,
    "keep_votes": False,
    "advantages": "group",
    "kl": 0.0,
    "stop_ratio": 2.0,
    "truth": None,
    "reward": None,
    "num_evaluated": 16,
    "evaluation_sampler": None,
}
# TTT-Discover, 2026: 50 steps of 8 starts and 64 rollouts.
PUBLISHED["discover"] = {
    "num_tokens": inspect.Parameter.empty,
    "stop": (),
    "optimizer": optax.adam(1e-3),
    "select": select.lora(),
    "num_steps": 50,
    "num_starts": 8,
    "num_rollouts": 64,
    "pool_size": 64,
    "exploration": 1.0,
    "reuse": True,
    "advantages": None,
    "temperature": 1.0,
    "kl": 0.0,
}
# Akyürek et al., 2025: two epochs of 250 items in batches of two; the step size of their code.
PUBLISHED["few_shot_ttt"] = {
    "optimizer": optax.adamw(1e-4, weight_decay=0.01),
    "select": select.lora(),
    "num_steps": 250,
    "rows": 2,
    "held_out": 0,
    "every": 10,
    "trace": False,
}
PUBLISHED["few_shot_adapter"] = {
    name: value for name, value in PUBLISHED["few_shot_ttt"].items() if name != "trace"
}
PUBLISHED["few_shot_shared"] = {
    name: PUBLISHED["few_shot_ttt"][name] for name in ("optimizer", "select", "num_steps", "rows")
} | {"batch": True}
# Of every kind of leaf that a selection above names.
TREE = {
    "params": {
        "layers": {"mlp": {name: {"kernel": jnp.ones((2, 3))} for name in ("up", "down")}},
        "query": {"kernel": jnp.ones((3, 2)), "kernel_lora_a": jnp.ones((3, 1))},
        "norm": {"scale": jnp.ones(3)},
        "layers_1": {"mlp": {"up": {"kernel": jnp.ones((2, 3))}}},
    }
}
GRADIENTS = [
    jax.tree.map(
        lambda leaf, seed=seed: jnp.cos(seed + jnp.arange(leaf.size)).reshape(leaf.shape), TREE
    )
    for seed in (1.0, 2.5)
]


def walk(optimizer):
    """Where two steps lead."""
    params, state = TREE, optimizer.init(TREE)
    for gradient in GRADIENTS:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults(name):
    parameters = inspect.signature(getattr(methods, name)).parameters
    settings = {key: p.default for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(settings) == set(PUBLISHED[name])
    for key, default in settings.items():
        published = PUBLISHED[name][key]
        if key == "optimizer":
            jax.tree.map(np.testing.assert_array_equal, walk(default), walk(published))
        elif key == "select":
            chosen, due = (select.describe(s, TREE).paths for s in (default, published))
            assert chosen == due and chosen
        else:
            assert default == published, key


@pytest.mark.parametrize(
    "name", sorted({name for name in PUBLISHED if not name.startswith("few_shot")})
)
def test_a_reader_comes_first_and_settings_by_keyword(name):
    parameters = list(inspect.signature(getattr(methods, name)).parameters.values())
    heads = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    others = {"targets", "adapters", "centers", "answer"}
    others |= {"starts", "prompt", "solution", "score"}
    assert heads[0] == "read" and set(heads[1:]) <= others


def test_the_default_optimizers_differ():
    """The check above tells them apart."""
    first, *rest = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(walk(row["optimizer"]))])
        for row in (PUBLISHED[name] for name in ("document_ttt", "in_place", "neighbors_ttt"))
    )
    assert all(np.abs(first - other).max() > 1e-6 for other in rest)
