"""In-place test-time training as published: closed-form updates towards learned targets."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _trees, _varying, readers, select
from ttt_jax.base import Info, Key, Params, Predictor, PyTree, Selection
from ttt_jax.losses.tokens import masked_mean, token_nats
from ttt_jax.methods.document_ttt import chunks_of, document_of
from ttt_jax.methods.in_place import clip_matrices
from ttt_jax.readers import HiddenReader


@_arguments.checked(
    rate=_arguments.number(0.0), max_norm=_arguments.number(0.0), bos=_arguments.count(0)
)
def in_place_targets(
    read: HiddenReader,
    targets: Callable[[Params, Any], jax.Array],
    *,
    rate: float | jax.Array = 0.3,
    max_norm: float | jax.Array = 1e-5,
    select: Selection = select.paths(r".*mlp/down/kernel"),
    bos: int | None = None,
) -> Predictor:
    """A predictor that scores a document chunk by chunk, and adds each to the MLPs in closed form.

    With Z the inputs of a matrix at a chunk's tokens and V targets of the tokens' own, the step
    that makes ``<Z W, V>`` larger needs no backward pass::

        D[c]     = rate * sum_i Z[c, i]^T V[c, i]                over the scored tokens of chunk c
        W[c + 1] = W[c] + D[c] * min(1, max_norm / |D[c]|_F)

    Chunk c is read and scored with W[c], which knows the chunks before it.

    **Published:** V is a causal convolution of width 5 over the embeddings of the chunk's tokens,
    times a learned matrix; rate 0.3 (3 in training), every sixth layer, chunks of 4,096 to 8,192
    tokens, updates clipped to 1e-5, after continued training on 20 billion tokens: 2.1 points of
    RULER at 64,000 tokens for LLaMA-8B, 2.7 for Qwen-14B.

    **Fails** with targets that nobody trained: their direction means nothing to the model, and
    the scores become worse the larger the clip. For a stock decoder use
    :func:`~ttt_jax.methods.in_place`. Training them begins with a gradient of nothing, as chunk c
    does not see its own update: letting it see a part of that breaks the rule that
    :func:`ttt_jax.audit.score_before_update` checks.

    **Cost** of a chunk: a forward pass, and a product ``[F, L] [L, D]`` for every matrix.

    Args:
      read: a :class:`ttt_jax.readers.HiddenReader`, such as
        :func:`ttt_jax.models.hidden_reader` makes.
      targets: ``targets(params, {"tokens", "targets"}) -> V[N, L, D]``, of the pristine
        parameters, the chunk's tokens as they were read and those that came after each, both
        ``[N, L]``. The chunk has been scored by then, so it may look anywhere in it.
      rate: of the sum, may be traced.
      max_norm: largest Frobenius norm of one matrix's update, may be traced.
      select: the matrices, whose inputs the reader gives.
      bos: as for :func:`~ttt_jax.methods.document_ttt`.

    Returns:
      A :class:`~ttt_jax.Predictor` over one document, with the output of
      :func:`~ttt_jax.methods.document_ttt`. ``Info`` has T steps, ``grad_norm`` the norm of all
      clipped updates. A chunk that is not finite is neither added nor remembered.

    Raises:
      TypeError: ``read`` is no HiddenReader.
      ValueError: an argument out of range; when called: a selected leaf whose inputs the reader
        does not give, targets of another shape, or what document_ttt refuses.

    References:
      `In-Place Test-Time Training <https://arxiv.org/abs/2604.06169>`_, 2026, Algorithm 1. The
      authors add up the updates of all chunks in parallel in training; here they come one after
      the other, which is the same.
    """
    clip = clip_matrices(max_norm)
    readers.check_bos(read, bos)

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        tokens, mask = document_of("in_place_targets", x)
        chunks = chunks_of(tokens, mask, bos)
        fast, frozen = select.split(params)
        count, length = tokens.shape

        def step(carry: Any, chunk: Any) -> Any:
            own, memory = carry
            inputs = {"tokens": chunk["inputs"][None], "positions": chunk["positions"][None]}
            logits, after, hidden = read.read(select.merge(own, frozen), memory, inputs)
            nats = token_nats(logits[0], chunk["targets"])
            loss = masked_mean(nats, chunk["mask"])
            pair = {"tokens": inputs["tokens"], "targets": chunk["targets"][None]}
            updates = _updates(own, hidden, targets(params, pair), rate * chunk["mask"])
            updates, _ = clip.update(updates, ())
            moved = jax.tree.map(jnp.add, own, updates)
            size = _trees.norm(updates)
            finite = jnp.isfinite(loss) & jnp.isfinite(size) & ~_trees.spoiled(memory, after)
            kept = _trees.where(finite, (moved, after), carry)
            return kept, (jnp.where(chunk["mask"] != 0, nats, 0.0), loss, size, finite)

        start = fast, read.init(1, count * length, length)
        (own, _), (nats, loss, size, finite) = _varying.scan(step, start, chunks)
        return nats, Info(loss, size, finite.all(), _trees.differs(fast, own))

    return predict


def _updates(
    fast: PyTree, hidden: Mapping[str, jax.Array], aims: jax.Array, weights: jax.Array
) -> PyTree:
    """``sum_i weights[i] Z[i]^T V[i]`` for every selected matrix, shaped as ``fast``."""
    updates = []
    for path, leaf in _trees.named_leaves(fast):
        if leaf is None:
            continue
        if path not in hidden:
            raise ValueError(
                "methods.in_place_targets needs a selection of matrices whose inputs the reader "
                f"gives ({', '.join(sorted(hidden))}); got {path!r}."
            )
        inputs = hidden[path].astype(jnp.float32)
        due = (*inputs.shape[-3:-1], leaf.shape[-1])
        if jnp.shape(aims) != due:
            raise ValueError(
                f"methods.in_place_targets needs targets [N, L, D] = {due} for {path!r}; got shape "
                f"{jnp.shape(aims)}."
            )
        wanted = aims.astype(jnp.float32) * weights[None, :, None]
        updates.append(jnp.einsum("...nlf,nld->...fd", inputs, wanted).astype(leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(fast), updates)
