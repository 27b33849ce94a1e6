"""Generation: a prompt is an instance, and its continuation the output of a predictor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract, _varying, readers
from ttt_jax.base import Info, Key, Params, Predictor, PyTree
from ttt_jax.losses.tokens import token_nats
from ttt_jax.predictors import no_steps
from ttt_jax.readers import Reader

__all__ = ["Generated", "Sampler", "generate", "greedy", "log_probs", "sample"]

Sampler: TypeAlias = Callable[[jax.Array, Key], jax.Array]
"""``(logits[V], key) -> token``, an integer scalar."""

# Below it a temperature is greedy: logits that differ by more than 1e-4 never change places.
_LEAST_TEMPERATURE = 1e-6


class Generated(NamedTuple):
    """A continuation.

    Attributes:
      tokens: int32 ``[T]``; 0 after the end.
      mask: bool ``[T]``, True up to the token that stopped it, which is the last one.
      nats: float32 ``[T]``, ``-log p`` of each token under the model itself, whatever the sampler;
        0 after the end.
    """

    tokens: jax.Array
    mask: jax.Array
    nats: jax.Array


class Row(NamedTuple):
    """One sequence that is being continued.

    Attributes:
      memory: of the reader, of one sequence.
      token: int32 scalar, the last token, which the reader has not read yet.
      position: int32 scalar, of that token.
      count: int32 scalar, how many tokens were generated.
      done: bool scalar, whether it has ended, or not begun.
    """

    memory: PyTree
    token: jax.Array
    position: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose
    done: jax.Array


@_arguments.checked()
def greedy() -> Sampler:
    """The most probable token; of equal ones the first."""
    return lambda logits, key: jnp.argmax(logits).astype(jnp.int32)


@_arguments.checked(
    temperature=_arguments.number(0.0), top_p=_arguments.number(0.0, 1.0, above=True)
)
def sample(temperature: float | jax.Array = 1.0, top_p: float | jax.Array = 1.0) -> Sampler:
    """Draws from ``softmax(logits / temperature)``, cut to its most probable tokens.

    Kept are the fewest tokens, in order of probability, whose probabilities add up to ``top_p`` or
    more: the first that crosses it is among them, so one always is.

    Args:
      temperature: 0 is greedy. May be traced.
      top_p: in (0, 1]. May be traced.

    Raises:
      ValueError: a known value out of its range.

    References:
      Holtzman et al., `The Curious Case of Neural Text Degeneration
      <https://arxiv.org/abs/1904.09751>`_, 2020, Section 3.1.
    """

    def draw(logits: jax.Array, key: Key) -> jax.Array:
        logits = logits.astype(jnp.float32)
        scaled = (logits - logits.max()) / jnp.maximum(temperature, _LEAST_TEMPERATURE)
        # The literal default needs no order, which takes longer than all the rest.
        if not (isinstance(top_p, int | float) and top_p == 1):
            order = jnp.argsort(-scaled)
            shares = jax.nn.softmax(scaled[order])
            # Rounding may leave the sum short of 1, or bring it there too early.
            kept = (jnp.cumsum(shares) - shares < top_p) | (top_p >= 1)
            scaled = jnp.where(jnp.zeros_like(kept).at[order].set(kept), scaled, -jnp.inf)
        return jax.random.categorical(key, scaled).astype(jnp.int32)

    return draw


@_arguments.checked(read=readers.rule, num_tokens=_arguments.count(1))
def generate(
    read: Reader,
    *,
    num_tokens: int,
    sampler: Sampler | None = None,
    stop: Sequence[int] = (),
    chunk: int | None = None,
) -> Predictor:
    """A predictor that continues a prompt, a token at a time.

    An instance ``x`` is the tokens of a prompt ``[P]``, or a mapping of ``tokens`` and ``mask``
    ``[P]``; prompts of unequal length are padded on either side, and no token sees what the mask
    leaves out. Token t is drawn with ``fold_in(key, t)``, so it does not depend on what else is
    generated beside it. Adapters of one's own for each prompt: :func:`ttt_jax.adapted`.

    All ``num_tokens`` steps are computed, those after the end of a sequence, too; where lengths
    differ much :func:`ttt_jax.serving.server` gives the place to the next prompt instead.

    Args:
      read: with a memory, such as :func:`ttt_jax.models.reader`; any causal model function through
        :func:`ttt_jax.readers.recomputed`.
      num_tokens: T at most, static.
      sampler: :func:`sample` or a function of your own; None for :func:`greedy`.
      stop: tokens that end a sequence; they are part of it.
      chunk: how many tokens of the prompt are read at once, to bound the memory of activations;
        None for all.

    Returns:
      A :class:`~ttt_jax.Predictor` with output :class:`Generated`. ``ok`` is False where logits
      were not finite, where the mask leaves nothing of a prompt, and where a token of it is outside
      the reader's ``vocabulary``.

    Raises:
      ValueError: an argument out of range; when called: an empty prompt, tokens of another rank
        or dtype, or a mask of another shape.
    """
    stop_tokens, draw = check_stop(stop), sampler or greedy()
    if chunk is not None:
        _checks.check_count("chunk, unless None,", chunk)

    def predict(params: Params, x: Any, key: Key) -> tuple[Generated, Info]:
        _contract.require_key("generate", key, maps=True)
        tokens, mask = prompt_of("generate", x)
        size = min(chunk or tokens.size, tokens.size)
        memory = read.init(1, tokens.size + num_tokens, size)
        row = begin(read, params, memory, (tokens, mask), jnp.zeros((), jnp.int32), size)
        return continued(read, params, row, key, num_tokens, draw, stop_tokens)

    return predict


def check_stop(stop: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end a sequence, each an integer of at least 0."""
    return tuple(_checks.check_count("stop, each token of it,", token, 0) for token in stop)


def prompt_of(place: str, x: Any) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 ``[P]`` and mask bool ``[P]``."""
    leaves = x if isinstance(x, Mapping) else {"tokens": x}
    if "tokens" not in leaves:
        raise ValueError(
            f"{place} needs a prompt with the leaf 'tokens'; got {sorted(leaves)}: pass integers "
            "[P], or a mapping of tokens and mask."
        )
    tokens = jnp.asarray(leaves["tokens"])
    if tokens.ndim != 1 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{place} needs the integer tokens of one prompt [P], at least one of them; got shape "
            f"{tokens.shape} and dtype {tokens.dtype}. Map over many with ttt_jax.batched, and "
            "begin an empty prompt with the model's bos."
        )
    mask = jnp.asarray(leaves.get("mask", jnp.ones(tokens.shape, bool)))
    if mask.shape != tokens.shape:
        raise ValueError(
            f"{place} needs a mask of the tokens' shape {tokens.shape}; got shape {mask.shape}."
        )
    return tokens.astype(jnp.int32), mask.astype(bool)


def read_in_chunks(
    read: Reader,
    params: Params,
    memory: PyTree,
    inputs: tuple[jax.Array, jax.Array],
    size: int,
) -> PyTree:
    """The memory after tokens and positions ``[P]``, ``size`` at a time.

    Padding is put in front: no logits are asked for, so a compiled program never has the head.
    """
    tokens, positions = inputs
    missing = -tokens.size % size
    tokens = jnp.concatenate([jnp.zeros((missing,), jnp.int32), tokens])
    positions = jnp.concatenate([jnp.full((missing,), -1, jnp.int32), positions])

    def body(memory: PyTree, chunk: tuple[jax.Array, jax.Array]) -> Any:
        part = {"tokens": chunk[0][None], "positions": chunk[1][None]}
        return read.read(params, memory, part)[1], None

    chunks = tokens.reshape(-1, size), positions.reshape(-1, size)
    return _varying.scan(body, memory, chunks)[0]


def begin(
    read: Reader,
    params: Params,
    memory: PyTree,
    prompt: tuple[jax.Array, jax.Array],
    first: jax.Array,
    size: int,
) -> Row:
    """Reads all of a prompt but its last token, with which the continuation begins.

    Args:
      read: the reader.
      params: of the model.
      memory: of one sequence, with all that comes before the prompt.
      prompt: its tokens and their mask, ``[P]``.
      first: int32 scalar, the position of the prompt's first token.
      size: tokens read at once.
    """
    tokens, mask = prompt
    positions = jnp.where(mask, first + jnp.cumsum(mask.astype(jnp.int32)) - 1, -1)
    last = jnp.argmax(positions)
    before = jnp.where(jnp.arange(tokens.size) == last, -1, positions)
    unknown = (mask & readers.unknown(read, tokens)).any()
    memory = read_in_chunks(read, params, memory, (tokens, before), size)
    return Row(
        memory=memory,
        # A model cuts an index outside its vocabulary, and all would seem well.
        token=jnp.where(unknown, -1, tokens[last]),
        position=positions[last],
        count=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
    )


def advance(
    read: Reader, params: Params, row: Row, key: Key, sampler: Sampler, stop: tuple[int, ...]
) -> tuple[Row, Generated]:
    """One more token of a sequence; one that is done reads padding and stays as it is."""
    live = ~row.done
    inputs = {
        "tokens": row.token[None, None],
        "positions": jnp.where(live, row.position, -1)[None, None],
    }
    logits, memory = read.read(params, row.memory, inputs)
    logits = jnp.where(row.token < 0, jnp.nan, logits[0, -1].astype(jnp.float32))
    token = jnp.asarray(sampler(logits, jax.random.fold_in(key, row.count)))
    if token.shape != () or not jnp.issubdtype(token.dtype, jnp.integer):
        raise ValueError(
            f"A sampler must return one integer token for logits [V]; got shape {token.shape} and "
            f"dtype {token.dtype}."
        )
    token = token.astype(jnp.int32)
    nats = token_nats(logits, token)
    ended = jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros((), bool)
    after = Row(
        memory=memory,
        token=jnp.where(live, token, row.token),
        position=row.position + live.astype(jnp.int32),
        count=row.count + live.astype(jnp.int32),
        done=row.done | ended,
    )
    return after, Generated(jnp.where(live, token, 0), live, jnp.where(live, nats, 0.0))


def continued(
    read: Reader,
    params: Params,
    row: Row,
    key: Key,
    num_tokens: int,
    sampler: Sampler,
    stop: tuple[int, ...],
) -> tuple[Generated, Info]:
    """The continuation of a sequence, and whether it began and all its logits were finite."""

    def body(row: Row, _: Any) -> tuple[Row, Generated]:
        return advance(read, params, row, key, sampler, stop)

    _, made = _varying.scan(body, row, jnp.arange(num_tokens))
    # A sequence without any token has no position.
    return made, no_steps()._replace(ok=jnp.isfinite(made.nats).all() & (row.position >= 0))


@_arguments.checked(read=readers.rule)
def log_probs(read: Reader) -> Callable[[Params, Any, Generated], jax.Array]:
    """The log-probabilities of continuations, in one pass that can be differentiated.

    Args:
      read: as for :func:`generate`.

    Returns:
      ``(params, x, generated) -> float32 [G, T]`` of G continuations of one prompt ``x``, whose
      leaves have a leading axis G; 0 outside their masks. ``generate`` has the same as ``-nats``.

    Raises:
      ValueError: when called: what ``generate`` refuses, or tokens that are not ``[G, T]``.
    """

    def score(params: Params, x: Any, generated: Generated) -> jax.Array:
        prompt, mask = prompt_of("generation.log_probs", x)
        if jnp.ndim(generated.tokens) != 2 or jnp.shape(generated.mask) != generated.tokens.shape:
            raise ValueError(
                "generation.log_probs needs continuations [G, T] of one prompt; got tokens "
                f"{jnp.shape(generated.tokens)} and mask {jnp.shape(generated.mask)}."
            )
        count, length = generated.tokens.shape
        places = jnp.where(mask, jnp.cumsum(mask.astype(jnp.int32)) - 1, -1)
        after = jnp.where(generated.mask, places.max() + 1 + jnp.arange(length), -1)
        inputs = {
            "tokens": _joined(prompt, generated.tokens),
            "positions": _joined(places, after),
        }
        total = prompt.size + length
        logits, _ = read.read(params, read.init(count, total, total), inputs)
        # The prompt's last token, wherever its padding puts it, and all but the last one drawn.
        index = jnp.arange(prompt.size - 1, total - 1).at[0].set(jnp.argmax(places))
        nats = token_nats(logits[:, index], generated.tokens)
        return jnp.where(generated.mask, -nats, 0.0)

    return score


def several(predictor: Predictor, count: int) -> Callable[[Params, Any, Key], Any]:
    """So many outputs of one instance, with keys ``fold_in(key, 0)``, ``fold_in(key, 1)``, ..."""

    def run(params: Params, x: Any, key: Key) -> Any:
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(count))
        return jax.vmap(lambda each: predictor(params, x, each)[0])(keys)

    return run


def _joined(first: jax.Array, rest: jax.Array) -> jax.Array:
    """``[P], [G, T] -> int32 [G, P + T]``."""
    repeated = jnp.broadcast_to(first[None], (len(rest), first.size))
    return jnp.concatenate([repeated, rest], 1).astype(jnp.int32)
