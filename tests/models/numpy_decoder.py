"""Decoders in NumPy, float64, by the names of llama.cpp: what a loaded one is compared with."""

from typing import NamedTuple

import numpy as np


class Form(NamedTuple):
    """What the tensors do not say.

    Attributes:
      heads: of queries.
      kv_heads: of keys and values.
      head_size: D.
      epsilon: of norms.
      base: of the rotary frequencies.
      neighbors: whether rotary pairs are (0, 1), (2, 3), ... rather than (i, i + D / 2).
      gemma: whether the embedding is scaled, and the gate a GELU.
      window: of local layers; None for global layers alone.
      local_base: of local layers.
      every: how many layers make a period, of which the last is global.
    """

    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    base: float
    neighbors: bool = False
    gemma: bool = False
    window: int | None = None
    local_base: float = 1e4
    every: int = 6


def logits(form, tensors, tokens):
    """``[T] -> [T, V]``."""
    tensors = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    x = tensors["token_embd.weight"][tokens]
    if form.gemma:
        x = x * np.sqrt(x.shape[-1])
    layer = 0
    while f"blk.{layer}.attn_q.weight" in tensors:
        own = {
            name.removeprefix(f"blk.{layer}."): array
            for name, array in tensors.items()
            if name.startswith(f"blk.{layer}.")
        }
        local = form.window is not None and (layer + 1) % form.every != 0
        x = x + _normed(form, own, "post_attention_norm", _attention(form, own, x, local))
        x = x + _normed(form, own, "post_ffw_norm", _feed_forward(form, own, x))
        layer += 1
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return _normed(form, tensors, "output_norm", x) @ head.T


def _normed(form, tensors, name, x):
    """Unchanged where there is no such norm."""
    if f"{name}.weight" not in tensors:
        return x
    size = np.sqrt(np.square(x).mean(-1, keepdims=True) + form.epsilon)
    return x / size * tensors[f"{name}.weight"]


def _linear(own, name, x):
    return x @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0.0)


def _attention(form, own, x, local):
    x = _normed(form, own, "attn_norm", x)
    query, key, value = (
        np.split(_linear(own, f"attn_{letter}", x), heads, axis=-1)
        for letter, heads in (("q", form.heads), ("k", form.kv_heads), ("v", form.kv_heads))
    )
    base = form.local_base if local else form.base
    key = [_turned(form, _normed(form, own, "attn_k_norm", head), base) for head in key]
    mixed = []
    for number, head in enumerate(query):
        head = _turned(form, _normed(form, own, "attn_q_norm", head), base)
        group = number * form.kv_heads // form.heads
        rows = []
        for t in range(len(x)):
            first = max(0, t + 1 - form.window) if local else 0
            scores = key[group][first : t + 1] @ head[t] / np.sqrt(form.head_size)
            weights = np.exp(scores - scores.max())
            rows.append(weights / weights.sum() @ value[group][first : t + 1])
        mixed.append(np.stack(rows))
    return _linear(own, "attn_output", np.concatenate(mixed, -1))


def _turned(form, x, base):
    """Pairs as complex numbers, times ``exp(i t base^(-2 j / D))``."""
    size = form.head_size
    pairs = np.arange(size).reshape(-1, 2) if form.neighbors else np.arange(size).reshape(2, -1).T
    numbers = x[:, pairs[:, 0]] + 1j * x[:, pairs[:, 1]]
    steps = np.arange(len(x))[:, None] * base ** (-2 * np.arange(size // 2) / size)
    numbers = numbers * np.exp(1j * steps)
    out = np.empty_like(x)
    out[:, pairs[:, 0]], out[:, pairs[:, 1]] = numbers.real, numbers.imag
    return out


def _feed_forward(form, own, x):
    x = _normed(form, own, "ffn_norm", x)
    gate = _linear(own, "ffn_gate", x)
    if form.gemma:
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        gate = gate * (1 + np.tanh(inner)) / 2
    else:
        gate = gate / (1 + np.exp(-gate))
    return _linear(own, "ffn_down", gate * _linear(own, "ffn_up", x))
