"""TTT-Linear and TTT-MLP: layers whose state is a network, trained on what is read."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments
from ttt_jax.layers import _forms, _inputs, _kernel, _windows
from ttt_jax.layers._forms import Rows
from ttt_jax.layers._net import Norm, Weights

__all__ = ["ttt_linear", "ttt_mlp"]

_RULES = {
    **dict.fromkeys(("q", "k", "v"), _inputs.table),
    "gate": _inputs.vector,
    "scale": _inputs.positions,
    "norm": _inputs.arrays(("gamma", "beta")),
    "chunk_size": _arguments.count(),
    "segments": _inputs.numbers,
    "remat": _arguments.count(0),
}


@_arguments.checked(state=_inputs.arrays(_inputs.LINEAR), **_RULES)
def ttt_linear(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    state: tuple[jax.Array, jax.Array],
    norm: tuple[jax.Array, jax.Array],
    *,
    chunk_size: int = 16,
    segments: jax.Array | None = None,
    form: str = "auto",
    remat: int = 4,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A linear map that learns, token by token, to give the value of a key (TTT-Linear).

    For one head of one sequence; map over heads and batch with ``jax.vmap``. With
    ``f(u) = u + LN(u W + b)``, each token has the loss ``0.5 * sum((f(k) - v) ** 2)``, whose
    gradient ``G`` with respect to ``k W + b`` is taken at the weights ``W, b`` with which its chunk
    began. The token at position ``t`` of a chunk reads from

        ``W_t = W - sum_{s <= t} eta[t, s] k_s^T G_s``, ``b_t = b - sum_{s <= t} eta[t, s] G_s``,
        ``out_t = q_t + LN(q_t W_t + b_t)`` with ``eta[t, s] = scale[t] * gate[s]``,

    and the next chunk begins with the weights that its last token read. LN has epsilon 1e-6; its
    ``gamma`` and ``beta`` do not learn inside.

    **Published:** ``chunk_size=16``, ``gate = sigmoid(.) / d`` of the token's input,
    ``scale[t] = max(1 / (t + 1) + tau[t], 0)`` with a learned ``tau`` that begins at 0, ``W`` from
    a normal distribution of standard deviation 0.02, rotary positions inside the chunk.

    **Fails** with ``W = 0`` and ``b = 0``, where the LN of nothing multiplies the first gradients
    by 1,000; and it holds no more than ``d * d`` numbers, however long the sequence.

    **Cost:** ``8 d^2 + 6 d chunk_size`` multiplications and additions a token, linear in T. The
    chunks follow each other. With ``segments`` three sets of weights serve each chunk, so it costs
    about three times that.

    **Differs** from the authors' code, which refuses a T that is no multiple of 64: any T here,
    packed segments, and operands of 16 bits beside a float32 state.

    Args:
      q: ``[T, d]``, what is asked; T at least 1.
      k: ``[T, d]``, what is learned.
      v: ``[T, d]``, what it is learned to give.
      gate: ``[T]``, the step size of the token that is learned; 0 for padding, which then changes
        no weights. Its q, k and v must be finite: a NaN times 0 is a NaN, for earlier tokens of its
        chunk too where that is read in products of matrices.
      scale: ``[chunk_size]``, the factor of the step size for the token that reads, by position.
      state: ``(W [d, d], b [d])`` before the first token, and before each segment.
      norm: ``(gamma [d], beta [d])``.
      chunk_size: tokens of a chunk.
      segments: int ``[T]``; where the number changes another sequence begins, from ``state`` and
        with a chunk of its own. None for one sequence.
      form: ``"dual"``: chunk by chunk in products of matrices. ``"primal"``: token by token, the
        formula above; to differentiate it keeps the weights of each token. ``"kernel"``: the dual
        form in kernels for a GPU, interpreted on a CPU; d of 16, 32, 64 or 128, ``chunk_size`` of
        16, 32 or 64, float32 or bfloat16, no segments; differentiable once, in reverse mode, where
        the others have all derivatives. ``"auto"``: ``"kernel"`` on an NVIDIA GPU for
        the sizes that were compared there (``kernels.ttt_linear.limits.COMPARED``), else
        ``"dual"``.
      remat: in the dual form and the kernels, chunks between two states that are kept for the
        backward pass, which computes the others again; 0 keeps everything.

    Returns:
      ``out [T, d]`` in the dtype of q, k and v, and the state after the last whole chunk (of the
      last segment): a rest of less than a chunk is read and leaves the weights as they are. Where
      decoding goes on from any T, :func:`ttt_prefill` keeps the rest. The state and all sums are
      float32, or float64 where any input is; matrix products take operands in the dtype of q.

    Raises:
      TypeError: an argument of another type.
      ValueError: T is 0, shapes that do not fit, an unknown form, or ``form="kernel"`` for what
        the kernels do not take.
      NotImplementedError: ``form="kernel"`` on a jax without Pallas' Triton backend.

    References:
      Sun et al., `Learning to (Learn at Test Time) <https://arxiv.org/abs/2407.04620>`_, 2024,
      Eqs. 4-7 and Appendix A (dual form).
    """
    rows = Rows(q, k, v, gate)
    return _run(rows, scale, state, norm, (chunk_size, segments, form, remat))


@_arguments.checked(state=_inputs.arrays(_inputs.MLP), **_RULES)
def ttt_mlp(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    state: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    norm: tuple[jax.Array, jax.Array],
    *,
    chunk_size: int = 16,
    segments: jax.Array | None = None,
    form: str = "auto",
    remat: int = 4,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """:func:`ttt_linear` with a network of two layers in place of the linear map (TTT-MLP).

    ``f(u) = u + LN(gelu(u W1 + b1) W2 + b2)``, gelu in its tanh form. The gradients of all four
    are taken at the weights with which the chunk began, and a token reads through

        ``theta_t = theta - sum_{s <= t} eta[t, s] dloss_s / dtheta``.

    **Published:** as TTT-Linear, a hidden width of ``4 d``, ``gate = 0.1 sigmoid(.) / d`` with the
    0.1 warmed up from 0.01.

    **Fails** as TTT-Linear, and more easily: too large a gate diverges over long sequences.

    **Cost:** ``8`` times the multiplications of TTT-Linear at a hidden width of ``4 d``, and as
    many times its state.

    **Differs** as :func:`ttt_linear` does.

    Args:
      q: ``[T, d]``, what is asked; T at least 1.
      k: ``[T, d]``, what is learned.
      v: ``[T, d]``, what it is learned to give.
      gate: ``[T]``, the step size of the token that is learned; 0 for padding.
      scale: ``[chunk_size]``, the factor of the step size for the token that reads, by position.
      state: ``(W1 [d, h], b1 [h], W2 [h, d], b2 [d])`` before the first token.
      norm: ``(gamma [d], beta [d])``.
      chunk_size: tokens of a chunk.
      segments: int ``[T]``, see :func:`ttt_linear`.
      form: see :func:`ttt_linear`; the kernels take d of 16, 32 or 64, h of 64, 128 or 256 and
        ``chunk_size`` 16, d = 64 with h = 256 in bfloat16 alone
        (``kernels.ttt_mlp.limits.COMPARED``).
      remat: see :func:`ttt_linear`.

    Returns:
      ``out [T, d]`` and the state after the last whole chunk, as of :func:`ttt_linear`.

    Raises:
      TypeError: an argument of another type.
      ValueError: T is 0, shapes that do not fit, or that the kernels do not take; an unknown form.
      NotImplementedError: ``form="kernel"`` where there are none.

    References:
      Sun et al., `Learning to (Learn at Test Time) <https://arxiv.org/abs/2407.04620>`_, 2024,
      section 2.6 and Appendix A.
    """
    rows = Rows(q, k, v, gate)
    return _run(rows, scale, state, norm, (chunk_size, segments, form, remat))


def _run(
    rows: Rows,
    scale: jax.Array,
    state: Weights,
    norm: Norm,
    settings: tuple[int, jax.Array | None, str, int],
) -> tuple[jax.Array, Any]:
    chunk_size, segments, form, remat = settings
    _inputs.check_form(form)
    _inputs.check_shapes(rows, scale, norm)
    _inputs.check_weights("state", state, rows.q.shape[1])
    _inputs.check_chunk(chunk_size, scale)
    tokens = rows.q.shape[0]
    if segments is not None and segments.shape != (tokens,):
        raise ValueError(
            f"segments must have shape {(tokens,)}, a number for each token; got {segments.shape}."
        )
    form = _kernel.form_of(form, rows, scale, (state, norm), segments)
    if form == "kernel":
        return _kernel.run(rows, scale, state, norm, remat)
    wide, shared, (weights, marks) = _inputs.widened(rows, scale, norm, state, segments)
    shared = shared._replace(remat=remat)
    if form == "primal":
        out, last = _forms.primal(wide, weights, shared, marks)
    elif marks is None:
        out, last = _forms.dual(wide, weights, shared)
    else:
        start = _forms.fresh(weights)
        length = jnp.int32(tokens)
        at = _windows.places(marks, start.position, length, tokens, chunk_size)
        out, cache = _windows.run(wide, start, shared, at, weights)
        last = cache.weights
    return out.astype(shared.operand), last
