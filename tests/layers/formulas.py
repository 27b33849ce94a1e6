"""The definitions of the layers in NumPy, token by token, written from the publications."""

import numpy as np

EPSILON = 1e-6


def norm(z, gamma, beta):
    return gamma * (z - z.mean()) / np.sqrt(z.var() + EPSILON) + beta


def norm_jacobian(z, gamma):
    """``[d, d]``: the derivative of output j (columns) with respect to z_i (rows)."""
    d, deviation = len(z), np.sqrt(z.var() + EPSILON)
    unit = (z - z.mean()) / deviation
    return (np.eye(d) - 1 / d - np.outer(unit, unit) / d) / deviation * gamma


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_derivative(x):
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    du = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + np.tanh(u)) + 0.5 * x * du / np.cosh(u) ** 2


def network(u, weights):
    if len(weights) == 2:
        return u @ weights[0] + weights[1]
    first, bias, second, other = weights
    return gelu(u @ first + bias) @ second + other


def loss_gradient(k, v, weights, gamma, beta):
    """Of ``0.5 |LN(network(k)) - (v - k)|^2`` with respect to each weight."""
    z = network(k, weights)
    outer = norm_jacobian(z, gamma) @ (norm(z, gamma, beta) - (v - k))
    if len(weights) == 2:
        return [np.outer(k, outer), outer]
    first, bias, second, _ = weights
    hidden = k @ first + bias
    inner = (second @ outer) * gelu_derivative(hidden)
    return [np.outer(k, inner), inner, np.outer(gelu(hidden), outer), outer]


def ttt(q, k, v, gate, scale, state, layer_norm):
    """Outputs ``[T, d]``, and the weights after each whole chunk."""
    chunk = len(scale)
    weights, out, after = [np.array(leaf) for leaf in state], [], []
    for first in range(0, len(q), chunk):
        steps = [0.0] * len(weights)
        for t in range(first, min(first + chunk, len(q))):
            made = loss_gradient(k[t], v[t], weights, *layer_norm)
            steps = [total + gate[t] * part for total, part in zip(steps, made, strict=True)]
            now = [w - scale[t - first] * s for w, s in zip(weights, steps, strict=True)]
            out.append(q[t] + norm(network(q[t], now), *layer_norm))
        if first + chunk <= len(q):
            weights = now
            after.append(weights)
    return np.array(out), after


def inputs(tokens, width, layers=1, chunk=16, seed=0):
    """``q, k, v, gate, scale, state, norm`` as a network would give them, float64."""
    random = np.random.default_rng(seed)
    q, k, v = 0.3 * random.normal(size=(3, tokens, width))
    gate = 1 / (1 + np.exp(-random.normal(size=tokens))) / width
    scale = np.maximum(1 / np.arange(1, chunk + 1) + 0.05 * random.normal(size=chunk), 0)
    hidden = 2 * width
    shapes = [(width, width), (width,)]
    if layers == 2:
        shapes = [(width, hidden), (hidden,), (hidden, width), (width,)]
    state = tuple(0.1 * random.normal(size=shape) for shape in shapes)
    layer_norm = (1 + 0.1 * random.normal(size=width), 0.1 * random.normal(size=width))
    return q, k, v, gate, scale, state, layer_norm


def first(arguments, tokens):
    """The arguments with the first tokens alone."""
    return tuple(leaf[:tokens] for leaf in arguments[:4]) + tuple(arguments[4:])
