"""Networks that a fast-weight layer trains on what it reads: ``Memory(init, read, predict)``.

Of row vectors: a weight is ``[inputs, outputs]``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from ttt_jax import _arguments
from ttt_jax.layers import _inputs, _net

__all__ = ["Memory", "linear", "mlp", "residual", "ridge", "swiglu"]

_SPREAD = 0.02
_positive = _arguments.array(1, kinds="f", like="[d]")


class Memory(NamedTuple):
    """A network whose weights are the state of a layer.

    Attributes:
      init: ``(key, inputs, outputs) -> weights``, any pytree; two widths.
      read: ``(weights, q [inputs]) -> [outputs]``, the output of the layer for one token.
      predict: ``(weights, k [inputs]) -> prediction``, what the inner loss compares with the
        target.
    """

    init: Callable[[jax.Array, int, int], Any]
    read: Callable[[Any, jax.Array], jax.Array]
    predict: Callable[[Any, jax.Array], Any]


def _drawn(key: jax.Array, shapes: list[tuple[int, ...]]) -> tuple[jax.Array, ...]:
    keys = jax.random.split(key, len(shapes))
    return tuple(
        _SPREAD * jax.random.normal(subkey, shape) if len(shape) == 2 else jnp.zeros(shape)
        for subkey, shape in zip(keys, shapes, strict=True)
    )


@_arguments.checked()
def linear(*, bias: bool = False) -> Memory:
    """``x W``, or ``x W + b``; weights ``(W,)`` or ``(W, b)``.

    The state of linear attention and of the delta rules, and with a bias, inside
    :func:`residual`, of TTT-Linear.
    """

    def init(key: jax.Array, inputs: int, outputs: int) -> tuple[jax.Array, ...]:
        return _drawn(key, [(inputs, outputs), *([(outputs,)] if bias else [])])

    def read(weights: Any, x: jax.Array) -> jax.Array:
        return x @ weights[0] + weights[1] if bias else x @ weights[0]

    return Memory(init, read, read)


@_arguments.checked(hidden=_arguments.count())
def mlp(hidden: int, *, bias: bool = True) -> Memory:
    """``gelu(x W1 + b1) W2 + b2``, gelu in its tanh form; weights ``(W1, b1, W2, b2)``.

    Args:
      hidden: the width between the two layers.
      bias: whether there are ``b1`` and ``b2``; without, the weights are ``(W1, W2)``.
    """

    def init(key: jax.Array, inputs: int, outputs: int) -> tuple[jax.Array, ...]:
        shapes: list[tuple[int, ...]] = [(inputs, hidden), (hidden,), (hidden, outputs), (outputs,)]
        return _drawn(key, shapes if bias else shapes[::2])

    def read(weights: Any, x: jax.Array) -> jax.Array:
        if not bias:
            return _net.gelu(x @ weights[0]) @ weights[1]
        return _net.gelu(x @ weights[0] + weights[1]) @ weights[2] + weights[3]

    return Memory(init, read, read)


@_arguments.checked(hidden=_arguments.count())
def swiglu(hidden: int) -> Memory:
    """``(silu(x W0) * (x W2)) W1``; weights ``(W0, W1, W2)``.

    Args:
      hidden: the width between the layers.

    References:
      Zhang et al., `Test-Time Training Done Right <https://arxiv.org/abs/2505.23884>`_, 2025
      (LaCT), Eq. 4.
    """

    def init(key: jax.Array, inputs: int, outputs: int) -> tuple[jax.Array, ...]:
        return _drawn(key, [(inputs, hidden), (hidden, outputs), (inputs, hidden)])

    def read(weights: Any, x: jax.Array) -> jax.Array:
        gate, down, up = weights
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    return Memory(init, read, read)


@_arguments.checked(norm=_inputs.arrays(("gamma", "beta")))
def residual(memory: Memory, norm: tuple[jax.Array, jax.Array]) -> Memory:
    """``x + LN(memory(x))``: the form of TTT-Linear and TTT-MLP; keys, values have one width.

    Args:
      memory: what is within.
      norm: ``(gamma [d], beta [d])``, which do not learn inside; epsilon 1e-6.

    References:
      Sun et al., `Learning to (Learn at Test Time) <https://arxiv.org/abs/2407.04620>`_, 2024,
      section 2.5.
    """

    def read(weights: Any, x: jax.Array) -> jax.Array:
        return x + _net.layer_norm(memory.read(weights, x)[None], norm)[0]

    return Memory(memory.init, read, read)


@_arguments.checked(penalty=_positive, steps=_arguments.count())
def ridge(penalty: jax.Array, *, steps: int = 30) -> Memory:
    """The ridge regression of all values on all keys, solved anew for each query (Mesa).

    The weights are the sums ``H = sum k^T k`` and ``G = sum k^T v``, and the output is
    ``q (H + diag(penalty))^-1 G``. With :func:`inner_losses.sums` and a step size of 1 a step adds
    one token to both; with ``retentions.decay`` earlier tokens fade.

    **Published:** ``penalty`` at least 0.25, at first 1; 30 steps at most.

    **Fails** where keys are so alike that the steps do not reach the solution.

    **Cost:** ``steps * d ** 2`` a token, and twice the state of linear attention. Its gradient is
    that of the solution, by another solve.

    Args:
      penalty: ``[d]``, above 0.
      steps: of conjugate gradients, at most.

    References:
      von Oswald et al., `MesaNet <https://arxiv.org/abs/2506.05233>`_, 2025, Eqs. 8-10.
    """

    def init(key: jax.Array, inputs: int, outputs: int) -> tuple[jax.Array, ...]:
        return jnp.zeros((inputs, inputs)), jnp.zeros((inputs, outputs))

    def read(weights: Any, q: jax.Array) -> jax.Array:
        keys, values = weights
        tolerance = float(jnp.finfo(keys.dtype).eps)
        solution, _ = cg(lambda x: x @ keys + penalty * x, q, tol=tolerance, maxiter=steps)
        return solution @ values

    def predict(weights: Any, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, values = weights
        return k @ keys @ k, k @ values

    return Memory(init, read, predict)
