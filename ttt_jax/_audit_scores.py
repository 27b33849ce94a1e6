"""An audit of scores along a document: none depends on what comes later, or on other documents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ttt_jax import _arguments, _contract
from ttt_jax._findings import MEANING, Finding, require
from ttt_jax.base import Key, Params, Predictor


@_arguments.checked(places=_arguments.sequence(int))
def score_before_update(
    predictor: Predictor,
    params: Params,
    x: Any,
    key: Key,
    *,
    scores: Callable[[Any], Any] | None = None,
    places: Sequence[int] | None = None,
) -> list[Finding]:
    """Checks that a document's tokens are scored before they are learned from.

    Tokens at and after a place t are changed (token t alone; all of them; their order), and every
    score before t has to stay, bit for bit. So a predictor is found out that learns from a chunk
    before it scores it, scores again what it learned from, or looks ahead in any other way. Last,
    the document as it was has to get its first scores again: nothing stayed of the ones between.

    Args:
      predictor: over one document, such as :func:`ttt_jax.methods.document_ttt` makes. It is called
        as it is, some twenty times: pass it compiled, ``jax.jit(predict)``, unless it keeps state
        in Python, which compiling would hide.
      params: its parameters.
      x: a document: integers ``[T, L]`` or ``[T]`` in their order, or a mapping with such
        ``tokens``. New tokens are taken from the document itself.
      key: for every call the same.
      scores: ``scores(output)``, an array shaped as the tokens, that of token i in place i;
        ``None`` for the output itself.
      places: t by number in the order of the document, 1 to its last; ``None`` for the
        borders of chunks, their middles and the ends.

    Returns:
      The findings, all passed.

    Raises:
      AuditError: naming each promise that does not hold.
      ValueError: a document of one token or of equal ones, a place out of range, or scores of
        another shape.

    References:
      The rules of github.com/openai/parameter-golf, issue 1017: a causal pass, every token scored
      by weights that learned from tokens already scored, once, from left to right.
    """
    _contract.require_predictor("predictor", predictor)
    tokens = _tokens(x)
    flat = tokens.reshape(-1)

    def run(changed: np.ndarray) -> np.ndarray:
        changed = changed.reshape(tokens.shape)
        output, _ = predictor(params, {**x, "tokens": changed} if _named(x) else changed, key)
        found = np.asarray(output if scores is None else scores(output))
        if found.shape != tokens.shape:
            raise ValueError(
                f"audit.score_before_update needs scores shaped as the tokens, {tokens.shape}; got "
                f"{found.shape}. Choose them with scores=lambda output: ..."
            )
        return found.reshape(-1)

    first = run(flat)
    ahead, reacts = 0.0, False
    for place in _places(tokens, places):
        for changed in _variants(flat, place):
            after = run(changed)
            ahead = max(ahead, _distance(after[:place], first[:place]))
            reacts |= _distance(after[place:], first[place:]) > 0
    values = {"ahead": ahead, "fresh": _distance(run(flat), first), "reacts": float(not reacts)}
    found = [Finding(MEANING[name], value, 0.0) for name, value in values.items()]
    require(found)
    return found


def _named(x: Any) -> bool:
    return isinstance(x, Mapping)


def _tokens(x: Any) -> np.ndarray:
    """The tokens of a document on the host; refuses what shows nothing."""
    if _named(x) and "tokens" not in x:
        raise ValueError(
            f"audit.score_before_update needs a document with 'tokens'; got {sorted(x)}."
        )
    tokens = np.asarray(x["tokens"] if _named(x) else x)
    if tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu" or np.unique(tokens).size < 2:
        raise ValueError(
            "audit.score_before_update needs integer tokens [T, L] or [T], two different ones "
            f"among them; got shape {tokens.shape} and dtype {tokens.dtype}."
        )
    return tokens


def _places(tokens: np.ndarray, places: Sequence[int] | None) -> list[int]:
    last, length = tokens.size - 1, tokens.shape[-1]
    if places is None:
        wanted = (1, length - 1, length, length + length // 2, tokens.size // 2, last)
        return sorted({place for place in wanted if 1 <= place <= last})
    if strange := [place for place in places if not 1 <= place <= last]:
        raise ValueError(
            f"places must lie in 1 to {last}, the last token of the document; got {strange[0]}."
        )
    if not len(places):
        raise ValueError("places must name at least one token; got none: leave it out for all.")
    return [int(place) for place in places]


def _variants(flat: np.ndarray, place: int) -> Iterator[np.ndarray]:
    """The document with other tokens from a place on: one, all, and in another order."""
    known, index = np.unique(flat, return_inverse=True)
    others = known[(index + 1) % known.size].astype(flat.dtype)
    places = np.arange(flat.size)
    yield np.where(places == place, others, flat)
    yield np.where(places >= place, others, flat)
    yield np.concatenate([flat[:place], flat[place:][::-1]])


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    """The largest difference; equal values that are not finite differ by 0."""
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(left - right))
    return float(np.nan_to_num(gap, nan=np.inf).max(initial=0.0))
