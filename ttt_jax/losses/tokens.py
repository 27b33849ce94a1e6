"""Losses over token sequences: the next token, and hidden ones."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _contract
from ttt_jax.base import AuxLoss, Key, Params
from ttt_jax.losses import _inputs


def token_nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats of each target, ``logits[..., V], targets[...] -> float32 [...]``; float64 stays so.

    ``logsumexp`` less the target's logit: no array of log-probabilities is written. A target
    outside the vocabulary has NaN.
    """
    # Narrow integers of a text's own dtype would wrap at the size of the vocabulary.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = targets.astype(jnp.int32)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    return log_sum_exp(logits) - jnp.where(inside, _chosen(logits, targets), jnp.nan)


def log_sum_exp(logits: jax.Array) -> jax.Array:
    """``log sum_v exp(logits[..., v])``; on a GPU the logits are read once for it, not twice."""
    largest, total = _largest_and_sum(logits)
    return largest + jnp.log(total)


@jax.custom_jvp
def _largest_and_sum(logits: jax.Array) -> Any:
    """The largest of each row, 0 where that is not finite, and ``sum_v exp(logits[v] - it)``."""
    # On a CPU a reduction of pairs is not vectorized.
    return (in_one_pass if jax.default_backend() == "gpu" else in_two_passes)(logits)


@_largest_and_sum.defjvp
def _largest_and_sum_derivative(primals: Any, tangents: Any) -> Any:
    # No sum depends on what it is relative to, so that this is a constant.
    largest, total = _largest_and_sum(*primals)
    moved = (jnp.exp(primals[0] - largest[..., None]) * tangents[0]).sum(-1)
    return (largest, total), (jnp.zeros_like(largest), moved)


def in_two_passes(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`_largest_and_sum`, in a reduction for each."""
    largest = logits.max(-1)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    return largest, jnp.exp(logits - largest[..., None]).sum(-1)


def in_one_pass(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same in a single reduction, whose sum is relative to the largest so far.

    Milakov and Gimelshein, `Online normalizer calculation for softmax
    <https://arxiv.org/abs/1805.02867>`_, 2018, algorithm 3.
    """

    def joined(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
        (first, first_sum), (second, second_sum) = a, b
        # One of the two keeps its sum, so that an exponential is enough; equal infinities have no
        # difference.
        apart = jnp.where(first == second, 0, jnp.abs(first - second))
        shrink = jnp.exp(-apart)
        above = first > second
        kept = jnp.where(above, first_sum, second_sum)
        return jnp.maximum(first, second), kept + shrink * jnp.where(above, second_sum, first_sum)

    zero, lowest = jnp.zeros((), logits.dtype), jnp.full((), -jnp.inf, logits.dtype)
    largest, total = jax.lax.reduce(
        (logits, jnp.ones_like(logits)), (lowest, zero), joined, (logits.ndim - 1,)
    )
    finite = jnp.isfinite(largest)
    return jnp.where(finite, largest, 0), jnp.where(finite, total, jnp.exp(largest))


@jax.custom_jvp
def _chosen(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]


@_chosen.defjvp
def _chosen_derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # By comparison: the transpose of an index is a scatter into zeros as large as the logits, which
    # no compiler fuses with the gradient of the softmax.
    logits, targets = primals
    places = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    tangent = jnp.where(places == targets[..., None], tangents[0], 0.0).sum(-1)
    return _chosen(logits, targets), tangent


def masked_mean(nats: jax.Array, mask: jax.Array) -> jax.Array:
    """``sum(mask * nats) / max(sum mask, 1)``; a masked NaN is no part of it.

    An empty mask gives 0, with gradient 0; a negative weight, which would have a model unlearn what
    it reads, gives NaN.
    """
    weights = mask.astype(jnp.promote_types(nats.dtype, jnp.float32))
    weights = jnp.where(weights < 0, jnp.nan, weights)
    return jnp.where(weights != 0, nats * weights, 0.0).sum() / jnp.maximum(weights.sum(), 1.0)


@_arguments.checked()
def next_token(
    apply: Callable[..., Any], *, batch: bool = False, stochastic: bool = False
) -> AuxLoss:
    """Mean nats of every token given those before it, over the tokens of a mask.

    ``sum_t mask[t] * -log p(token[t] | token[<t]) / max(sum_t mask[t], 1)`` for t >= 1; with
    ``segments``, the first token of a segment is no target, and with ``positions`` none is after a
    negative one. Padding and prompts have mask 0. That leaves them out of the sum, not out of what
    the model sees: padding before a text needs ``positions`` of -1, or a segment of its own.

    Args:
      apply: model function ``(params, tokens[N, T]) -> logits[N, T, V]``, causal: logits at t are
        those of token t + 1. With more leaves than ``tokens`` and ``mask`` in ``x`` (``segments``,
        ``positions``) it is given the mapping of all but the mask.
      batch: whether ``x`` has a leading batch axis; every sequence then counts by its tokens.
      stochastic: whether ``apply`` takes a key as last argument.

    Returns:
      An ``AuxLoss`` over ``x``: integers ``[T]``, or a mapping of ``tokens``, optionally ``mask``
      ``[T]`` (which targets count, bool or weights of at least 0) and what else the model takes.

    Raises:
      ValueError: when called: tokens of another rank or dtype, fewer than two, a mask of another
        shape, or logits of another shape.

    References:
      Krause et al., `Dynamic Evaluation of Neural Sequence Models
      <https://arxiv.org/abs/1709.07432>`_, 2018, Eq. 3.
    """
    call = _inputs.caller("next_token", apply, stochastic)

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        tokens, mask, inputs = _sequences("next_token", x, batch)
        logits = _token_logits("next_token", call(params, inputs, key), tokens)
        mask = mask[:, 1:]
        if isinstance(inputs, Mapping) and "segments" in inputs:
            segments = inputs["segments"]
            mask = jnp.where(segments[:, 1:] == segments[:, :-1], mask, 0)
        if isinstance(inputs, Mapping) and "positions" in inputs:
            mask = jnp.where(inputs["positions"][:, :-1] >= 0, mask, 0)
        return masked_mean(token_nats(logits[:, :-1], tokens[:, 1:]), mask)

    return _inputs.over_batch(loss, batch)


@_arguments.checked(mask_id=_arguments.count(0), mask_ratio=_arguments.number(0.0, 1.0))
def masked_token(
    apply: Callable[..., Any],
    *,
    mask_id: int,
    mask_ratio: float = 0.15,
    num_masks: int = 1,
    batch: bool = False,
    stochastic: bool = False,
) -> AuxLoss:
    """Mean nats of hidden tokens given the others (BERT's objective, without its replacements).

    Of the tokens of the mask, each is hidden with probability ``mask_ratio``, and replaced by
    ``mask_id``. Where none is hidden the loss is 0, with gradient 0.

    Args:
      apply: model function ``(params, tokens[N, T]) -> logits[N, T, V]``; logits at t are those of
        token t itself. Further leaves of ``x`` as in :func:`next_token`.
      mask_id: the token that stands for a hidden one.
      mask_ratio: share of hidden tokens, between 0 and 1; may be traced.
      num_masks: independent masks of each sequence per step.
      batch: whether ``x`` has a leading batch axis.
      stochastic: whether ``apply`` takes a key as last argument.

    Returns:
      An ``AuxLoss`` over ``x`` as in :func:`next_token`; only tokens of the mask are hidden.

    Raises:
      ValueError: an argument out of range; when called: as for :func:`next_token`.

    References:
      Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2019, Section 3.1.
    """
    if not _inputs.is_count(num_masks):
        raise ValueError(f"num_masks must be an integer of at least 1, got {num_masks!r}.")
    call = _inputs.caller("masked_token", apply, stochastic)

    def loss(params: Params, x: Any, key: Key) -> jax.Array:
        tokens, mask, inputs = _sequences("masked_token", x, batch)
        many = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, num_masks, axis=0), (tokens, mask, inputs)
        )
        tokens, mask, inputs = many
        mask_key, model_key = jax.random.split(key)
        hidden = jax.random.bernoulli(mask_key, mask_ratio, tokens.shape) & (mask != 0)
        seen = jnp.where(hidden, jnp.asarray(mask_id, tokens.dtype), tokens)
        given = {**inputs, "tokens": seen} if isinstance(inputs, Mapping) else seen
        logits = _token_logits("masked_token", call(params, given, model_key), tokens)
        return masked_mean(token_nats(logits, tokens), jnp.where(hidden, mask, 0))

    return _inputs.over_batch(loss, batch)


def _sequences(name: str, x: Any, batch: bool) -> tuple[jax.Array, jax.Array, Any]:
    """Tokens, mask ``[N, T]`` each, and what the model function is given."""
    leaves = dict(x) if isinstance(x, Mapping) else {"tokens": x}
    if "tokens" not in leaves:
        raise ValueError(
            f"losses.{name} needs x with the leaf 'tokens'; got {sorted(leaves)}: pass integers "
            "[T], or a mapping of tokens and mask."
        )
    leaves = {key: jnp.asarray(leaf) for key, leaf in leaves.items()}
    tokens = leaves["tokens"]
    due = 2 if batch else 1
    if tokens.ndim != due or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"losses.{name} needs integer tokens of shape {'[N, T]' if batch else '[T]'}; got "
            f"shape {tokens.shape} and dtype {tokens.dtype}. Map over a batch with "
            "ttt_jax.batched, or build the loss with batch=True."
        )
    if tokens.shape[-1] < 2:
        raise ValueError(f"losses.{name} needs at least two tokens; got {tokens.shape[-1]}.")
    for key, leaf in leaves.items():
        if leaf.shape != tokens.shape:
            raise ValueError(
                f"losses.{name} needs every leaf of x shaped as its tokens, {tokens.shape}; got "
                f"{key!r} of shape {leaf.shape}."
            )
    if not batch:
        leaves = {key: leaf[None] for key, leaf in leaves.items()}
    mask = leaves.pop("mask", jnp.ones(leaves["tokens"].shape, jnp.float32))
    return leaves["tokens"], mask, leaves if len(leaves) > 1 else leaves["tokens"]


def _token_logits(name: str, logits: Any, tokens: jax.Array) -> jax.Array:
    _contract.require_array(f"losses.{name}", logits)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"losses.{name} needs logits [N, T, V] for tokens [N, T] = {tokens.shape}; the model "
            f"function returned shape {logits.shape}."
        )
    return logits
