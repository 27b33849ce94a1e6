"""An audit of a corpus that is learned from: no document that is scored stands in it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ttt_jax import _arguments
from ttt_jax._findings import MEANING, Finding, require


@_arguments.checked(
    length=_arguments.count(),
)
def apart(documents: Any, corpus: Any, *, length: int = 32) -> list[Finding]:
    """Checks that no run of tokens of a document stands in the corpus that is learned from.

    Args:
      documents: what is scored: integers ``[..., L]`` whose last axes but the first are one
        document in its order, or a mapping with such ``tokens`` and a ``mask``.
      corpus: passages ``[M, P]`` in the same two forms.
      length: of the runs that are compared; quotations and licenses are long, too, so short runs
        find what is no leak.

    Returns:
      The finding, passed; its difference is the number of documents with such a run.

    Raises:
      AuditError: a document shares a run of so many tokens with a passage.
      ValueError: passages or documents that are all shorter than ``length``: nothing was compared.
    """
    known = {run for passage in _sequences("corpus", corpus) for run in _runs(passage, length)}
    texts = [set(_runs(text, length)) for text in _sequences("documents", documents)]
    if not known or not any(texts):
        raise ValueError(
            f"audit.apart compares runs of {length} tokens, and found none in the "
            f"{'corpus' if not known else 'documents'}: lower length."
        )
    shared = sum(bool(runs & known) for runs in texts)
    found = [Finding(MEANING["apart"], float(shared), 0.0)]
    require(found)
    return found


def _sequences(name: str, given: Any) -> Iterator[np.ndarray]:
    leaves = given if hasattr(given, "keys") else {"tokens": given}
    tokens = np.asarray(leaves["tokens"]) if "tokens" in leaves else np.zeros(())
    if tokens.ndim < 2 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers [N, ...], or a mapping with such 'tokens'; got shape "
            f"{tokens.shape} and dtype {tokens.dtype}."
        )
    mask = np.asarray(leaves.get("mask", np.ones(tokens.shape, bool))) != 0
    if mask.shape != tokens.shape:
        raise ValueError(
            f"{name} must have a mask shaped as its tokens, {tokens.shape}; got {mask.shape}."
        )
    for row, kept in zip(tokens, mask, strict=True):
        last = np.flatnonzero(kept.reshape(-1))
        yield row.reshape(-1)[: last[-1] + 1 if last.size else 0].astype(np.int64)


def _runs(tokens: np.ndarray, length: int) -> Iterator[bytes]:
    for start in range(len(tokens) - length + 1):
        yield tokens[start : start + length].tobytes()
