"""Metrics of documents: bits per byte, what is saved against the source, and where."""

import math
from typing import Any

import numpy as np

from experiments.tasks.document_files import Vocabulary, bytes_of_chunks
from ttt_jax import metrics
from ttt_jax.task import Examples, Metric

# Bin k has the chunks from 2^k - 1 on, as many as lie before them and one more.
_NUM_BINS = 24
_QUARTERS = 4
# Programs with and without a gradient are compiled apart and may round the last bits apart: what
# is no difference of two scores of a token, in nats, and of a document, as a share of its bits.
_TOKEN, _DOCUMENT = 1e-3, 1e-5


def of(vocabulary: Vocabulary) -> dict[str, Metric]:
    """The metrics by name; an output is nats ``[N, T, L]``.

    ``bits_per_byte`` is the mean over documents, ``pooled_bits_per_byte`` that over bytes;
    ``saved`` the mean share of the source's bits; ``harmed`` the share of the documents that need
    more bits than with the source, by more than rounding; ``agreement`` that of those whose every
    token has the source's score to 0.001 nats; ``padding`` that of the tokens of a batch that are
    of no document. The curves are along the position in a document.
    """

    def per_byte(output: Any, source: Any, examples: Examples) -> np.ndarray:
        return _bits(output).sum(-1) / examples.y["bytes"]

    def saved(output: Any, source: Any, examples: Examples) -> np.ndarray:
        return 1 - _bits(output).sum(-1) / _bits(source).sum(-1)

    def harmed(output: Any, source: Any, examples: Examples) -> np.ndarray:
        return _bits(output).sum(-1) > (1 + _DOCUMENT) * _bits(source).sum(-1)

    def agrees(output: Any, source: Any, examples: Examples) -> np.ndarray:
        same = np.abs(np.asarray(output) - np.asarray(source)) <= _TOKEN
        return same.reshape(len(same), -1).all(-1)

    def by_position(output: Any, source: Any, examples: Examples) -> tuple[Any, Any]:
        sizes = bytes_of_chunks(examples.x, vocabulary)
        bits = _bits(output)
        return _positions(bits), _positions(sizes)

    def saved_by_position(output: Any, source: Any, examples: Examples) -> tuple[Any, Any]:
        before = _bits(source)
        return _positions(before - _bits(output)), _positions(before)

    def saved_by_quarter(output: Any, source: Any, examples: Examples) -> tuple[Any, Any]:
        chunks = examples.x["mask"].any(-1)
        index = np.arange(chunks.shape[1]) * _QUARTERS // chunks.sum(-1)[:, None]
        before = _bits(source)
        parts = before - _bits(output), before
        above, below = (_binned(part, np.minimum(index, _QUARTERS - 1)) for part in parts)
        return above[:, :_QUARTERS], below[:, :_QUARTERS]

    def padding(output: Any, source: Any, examples: Examples) -> tuple[Any, Any]:
        mask = examples.x["mask"].reshape(len(examples.id), -1)
        return (~mask).sum(-1), np.full(len(mask), mask.shape[1])

    return {
        "bits_per_byte": metrics.mean(per_byte),
        "pooled_bits_per_byte": metrics.bits_per_byte(
            lambda nats: np.asarray(nats, np.float64).sum((-1, -2)),
            lambda examples: examples.y["bytes"],
        ),
        "saved": metrics.mean(saved),
        "harmed": metrics.mean(harmed),
        "agreement": metrics.mean(agrees),
        "padding": metrics.ratio(padding),
        "bits_by_position": _trimmed(metrics.ratio(by_position)),
        "saved_by_position": _trimmed(metrics.ratio(saved_by_position)),
        "saved_by_quarter": metrics.ratio(saved_by_quarter),
    }


def _bits(nats: Any) -> np.ndarray:
    """Of each chunk, ``[N, T]``."""
    return np.asarray(nats, np.float64).sum(-1) / math.log(2.0)


def _positions(values: np.ndarray) -> np.ndarray:
    index = np.log2(np.arange(values.shape[1]) + 1).astype(int)
    return _binned(values, np.broadcast_to(index, values.shape))


def _binned(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    sums = np.zeros((len(values), _NUM_BINS))
    np.add.at(sums, (np.arange(len(values))[:, None], np.minimum(index, _NUM_BINS - 1)), values)
    return sums


def _trimmed(curve: Metric) -> Metric:
    """The curve without the positions that no document reaches."""

    def value(sums: Any) -> list[float]:
        entries = curve.value(sums)
        while entries and math.isnan(entries[-1]):
            entries.pop()
        return entries

    return curve._replace(value=value)
