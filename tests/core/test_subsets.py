"""Adapting a part of the parameters: the step is the gradient, written out, on that part alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, select

from .compiling import quickly

RNG = np.random.default_rng(0)
SHAPES = {
    "first/kernel": (6, 5),
    "first/kernel_lora_a": (6, 2),
    "first/kernel_lora_b": (2, 5),
    "first/bias": (5,),
    "norm/scale": (5,),
    "norm/bias": (5,),
    "last/kernel": (5, 3),
    "last/bias": (3,),
}
FLAT = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
XS = RNG.normal(size=(3, 6)).astype(np.float32)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(3))
RATE = 0.3

SUBSETS = {
    "norm only": (select.norm_affine(), {"norm/scale", "norm/bias"}),
    "bias only": (select.biases(), {"first/bias", "norm/bias", "last/bias"}),
    "last block": (select.paths(r"last/.*"), {"last/kernel", "last/bias"}),
    "low rank": (select.lora(), {"first/kernel_lora_a", "first/kernel_lora_b"}),
}


def nested(flat):
    tree = {}
    for name, leaf in flat.items():
        module, leaf_name = name.split("/")
        tree.setdefault(module, {})[leaf_name] = leaf
    return tree


def classify(params, inputs):
    first, norm, last = params["first"], params["norm"], params["last"]
    hidden = inputs @ first["kernel"] + (inputs @ first["kernel_lora_a"]) @ first["kernel_lora_b"]
    hidden = jnp.tanh(hidden + first["bias"][None])
    hidden = hidden * norm["scale"][None] + norm["bias"][None]
    return hidden @ last["kernel"] + last["bias"][None]


def entropy_gradient(flat, x):
    """The gradient of the prediction's entropy in every leaf, by the chain rule."""
    p = {name: leaf.astype(np.float64) for name, leaf in flat.items()}
    a, b = p["first/kernel_lora_a"], p["first/kernel_lora_b"]
    hidden = np.tanh(x @ (p["first/kernel"] + a @ b) + p["first/bias"])
    scaled = hidden * p["norm/scale"] + p["norm/bias"]
    logits = scaled @ p["last/kernel"] + p["last/bias"]
    log_p = logits - np.log(np.exp(logits).sum())
    entropy = -(np.exp(log_p) * log_p).sum()
    d_logits = -np.exp(log_p) * (log_p + entropy)
    d_scaled = p["last/kernel"] @ d_logits
    d_first = d_scaled * p["norm/scale"] * (1 - hidden**2)
    return {
        "first/kernel": np.outer(x, d_first),
        "first/kernel_lora_a": np.outer(x, b @ d_first),
        "first/kernel_lora_b": np.outer(x @ a, d_first),
        "first/bias": d_first,
        "norm/scale": d_scaled * hidden,
        "norm/bias": d_scaled,
        "last/kernel": np.outer(scaled, d_logits),
        "last/bias": d_logits,
    }


@pytest.mark.parametrize("name", SUBSETS)
def test_one_step(name):
    selection, chosen = SUBSETS[name]
    adapter = ttt.gradient_adapter(losses.entropy(classify), optax.sgd(RATE), select=selection)
    predict = ttt.episodic(adapter, lambda params, x: params, num_steps=1)
    adapted, _ = quickly(ttt.batched(predict), nested(FLAT), XS, KEYS)
    for i, x in enumerate(XS):
        gradient = entropy_gradient(FLAT, x.astype(np.float64))
        for path, leaf in FLAT.items():
            module, leaf_name = path.split("/")
            found = adapted[module][leaf_name][i]
            if path in chosen:
                assert np.abs(gradient[path]).max() > 1e-3
                np.testing.assert_allclose(
                    found, leaf - RATE * gradient[path], rtol=1e-4, atol=1e-6
                )
            else:
                np.testing.assert_array_equal(found, leaf)
