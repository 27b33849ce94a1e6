"""In-place test-time training: the MLPs' second matrices learn from the chunks read so far."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, readers, select
from ttt_jax.base import Params, Predictor, Selection
from ttt_jax.methods.document_ttt import document_ttt
from ttt_jax.readers import Reader


@_arguments.checked(
    read=readers.rule,
    max_norm=_arguments.number(0.0),
    bos=_arguments.count(0),
    remat=_arguments.count(0),
)
def in_place(
    read: Reader,
    *,
    optimizer: optax.GradientTransformation = optax.sgd(1.0),
    select: Selection = select.paths(r".*mlp/down/kernel"),
    max_norm: float | jax.Array | None = 0.03,
    num_steps: int = 1,
    bos: int | None = None,
    remat: int | None = 0,
    mixed: bool = False,
) -> Predictor:
    """A predictor that scores a document chunk by chunk, and writes each into the MLPs after it.

    The fast weights are matrices that the model has: no low-rank leaves, no new layers. Chunk c is
    scored, then every chosen matrix moves by the clipped step on the chunk's mean nats::

        D[c]     = optimizer's update for grad_W of mean_i nats[c, i]
        W[c + 1] = W[c] + D[c] * min(1, max_norm / |D[c]|_F)

    Norms are of single matrices, one per layer, also where layers are stacked in one leaf. All but
    the clip is :func:`~ttt_jax.methods.document_ttt`.

    **Published** is another update: ``D = rate * Z^T V`` with ``Z`` the matrix's inputs and ``V``
    targets that a convolution over token embeddings and a projection make, both **learned** by
    continued training of the model (20 billion tokens), clipped to a norm of 1e-5:
    :func:`~ttt_jax.methods.in_place_targets`. A stock decoder has no such targets. What remains is
    the place, the order and the clip; gradient steps on the same matrix are those of ETT, which
    found it better than training all weights. Rate and clip are our own
    choice, by the first tokens of one held-out book: choose them on documents of your own.

    **Fails** with a large ``max_norm`` or rate: a chunk that the model finds strange then
    overwrites what the matrix knew. A norm of 1e-5 with gradient steps changes nothing that one
    can see. Every instance has full copies of the matrices: choose the last layers
    (``Decoder(stages=(22, 8))`` and ``select.paths(".*layers_1/mlp/down/kernel")``).

    **Cost** of a chunk: ``num_steps`` forward and backward passes. Kept per document: the matrices
    and the optimizer's state (none for SGD), in the case of all layers of SmolLM2-135M 26.5 million
    values, against half a million of rank 8 on queries and values.

    Args:
      read: as for :func:`~ttt_jax.methods.document_ttt`.
      optimizer: an optax transformation; the clip comes after it. SGD with a rate that is large
        beside the clip goes ``max_norm`` far at every chunk.
      select: the matrices, leaves ``[..., F, D]``.
      max_norm: largest Frobenius norm of one matrix's update, may be traced; ``None`` for no clip.
      num_steps: inner steps per chunk, static; 0 is the control.
      bos: as for :func:`~ttt_jax.methods.document_ttt`.
      remat: as for :func:`~ttt_jax.methods.document_ttt`.
      mixed: as for :func:`~ttt_jax.methods.document_ttt`.

    Returns:
      A :class:`~ttt_jax.Predictor` over one document, see :func:`~ttt_jax.methods.document_ttt`.

    Raises:
      TypeError: ``read`` is no reader.
      ValueError: ``num_steps``, ``max_norm`` or ``bos`` out of range; when called: a selection
        with a leaf that is no matrix, or what document_ttt refuses.

    References:
      `In-Place Test-Time Training <https://arxiv.org/abs/2604.06169>`_, 2026, Algorithm 1 and the
      clip of its evaluations; `ETT <https://arxiv.org/abs/2507.06313>`_, 2025, for gradient steps.
      The authors' update needs no backward pass, and chunks are of 4,096 tokens and more.
    """
    if max_norm is not None:
        optimizer = optax.chain(optimizer, clip_matrices(max_norm))
    return document_ttt(
        read,
        optimizer=optimizer,
        select=select,
        num_steps=num_steps,
        bos=bos,
        remat=remat,
        mixed=mixed,
    )


def clip_matrices(max_norm: float | jax.Array) -> optax.GradientTransformation:
    """Scales the update of each matrix, the last two axes of a leaf, to a norm of at most this."""

    def clip(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            raise ValueError(
                "methods.in_place clips matrices [..., F, D]; got a selected leaf of shape "
                f"{leaf.shape}. Select kernels alone, or pass max_norm=None."
            )
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        square = jnp.square(wide).sum((-2, -1), keepdims=True)
        # The square root of zero has no gradient, which an outer loop may ask for.
        norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
        scale = jnp.where(square > 0, jnp.minimum(1.0, max_norm / norm), 1.0)
        return leaf * scale.astype(leaf.dtype)

    def update(updates: Any, state: Any, params: Params | None = None) -> Any:
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
