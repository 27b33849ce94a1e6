"""Metrics of tasks: sums over instances, and what they amount to.

Each function returns a :class:`ttt_jax.task.Metric`. ``prediction`` says how the answer is read
off an output, so a metric fits any task.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ttt_jax import _arguments
from ttt_jax.task import Examples, Metric

__all__ = [
    "agreement",
    "bits_per_byte",
    "by_step",
    "classes",
    "cross_entropy",
    "error",
    "harmed",
    "helped",
    "mean",
    "mean_iou",
    "predicted_classes",
    "ratio",
    "solved",
]

Prediction = Callable[[Any], Any]


@_arguments.checked(logits=_arguments.array(host=True))
def classes(logits: Any) -> np.ndarray:
    """The predicted class, ``[..., C] -> int [...]``; -1, which is no class, where one is nan."""
    logits = np.asarray(logits)
    return np.where(np.isnan(logits).any(-1), -1, logits.argmax(-1))


@_arguments.checked()
def ratio(of: Callable[[Any, Any, Examples], tuple[Any, Any] | None]) -> Metric:
    """A sum over another: ``of(output, source_output, examples) -> (above [N], below [N])``.

    Both may have further axes, for a curve. The value is nan where the sum below is zero.
    """

    def value(sums: Any) -> Any:
        above, below = (np.asarray(leaf) for leaf in sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            quotient = above / np.asarray(below, np.float64)
        if np.issubdtype(above.dtype, np.floating):
            quotient = quotient.astype(above.dtype)
        return quotient.tolist()

    return Metric(of, value)


@_arguments.checked()
def mean(of: Callable[[Any, Any, Examples], Any | None]) -> Metric:
    """The mean over instances of ``of(output, source_output, examples) -> [N, ...]``."""

    def both(output: Any, source: Any, examples: Examples) -> Any:
        values = of(output, source, examples)
        if values is None:
            return None
        values = np.asarray(values)
        return values, np.ones(values.shape, np.int64)

    return ratio(both)


@_arguments.checked()
def error(prediction: Prediction = classes, label: str | None = None) -> Metric:
    """Share of the instances whose prediction is not ``y`` (its entry ``label``, if named).

    At chance is the share that is not of the most frequent class.
    """

    def chance(y: Any) -> float:
        counts = np.unique(np.asarray(y if label is None else y[label]), return_counts=True)[1]
        return 1.0 - float(counts.max() / counts.sum())

    wrong = mean(lambda output, source, examples: prediction(output) != _label(examples, label))
    return wrong._replace(chance=chance)


@_arguments.checked()
def helped(prediction: Prediction = classes, label: str | None = None) -> Metric:
    """Share that the source model has wrong and the adapted one right."""

    def of(output: Any, source: Any, examples: Examples) -> np.ndarray:
        y = _label(examples, label)
        return (prediction(source) != y) & (prediction(output) == y)

    return mean(of)


@_arguments.checked()
def harmed(prediction: Prediction = classes, label: str | None = None) -> Metric:
    """Share that the source model has right and the adapted one wrong."""

    def of(output: Any, source: Any, examples: Examples) -> np.ndarray:
        y = _label(examples, label)
        return (prediction(source) == y) & (prediction(output) != y)

    return mean(of)


@_arguments.checked()
def agreement(prediction: Prediction = classes) -> Metric:
    """Share on which the adapted and the source model give the same, valid prediction."""

    def of(output: Any, source: Any, examples: Examples) -> np.ndarray:
        adapted = prediction(output)
        return (adapted == prediction(source)) & (adapted >= 0)

    return mean(of)


@_arguments.checked()
def by_step(of_steps: Callable[[Any, Examples], Any | None]) -> Metric:
    """A curve over inner steps: ``of_steps(output, examples) -> [N, S + 1]``, None without one."""
    return mean(lambda output, source, examples: of_steps(output, examples))


@_arguments.checked()
def cross_entropy(logits: Prediction, label: str | None = None) -> Metric:
    """Mean cross-entropy in nats of ``logits(output) [N, C]`` with the label; inf where nan."""

    def of(output: Any, source: Any, examples: Examples) -> np.ndarray:
        scores = np.asarray(logits(output), np.float64)
        top = scores.max(-1, keepdims=True)
        log_p = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
        y = np.asarray(_label(examples, label))
        loss = -np.take_along_axis(log_p, y[..., None], -1)[..., 0]
        return np.where(np.isnan(loss), np.inf, loss)

    return mean(of)


@_arguments.checked(num_classes=_arguments.count())
def predicted_classes(num_classes: int, prediction: Callable[[Any, Any], Any]) -> Metric:
    """Effective number of predicted classes, ``exp`` of the entropy of their shares: 1 to C.

    ``prediction(output, source)`` chooses whose; see :func:`ttt_jax.diagnostics.predicted_classes`.
    """

    def of(output: Any, source: Any, examples: Examples) -> np.ndarray:
        answers = np.asarray(prediction(output, source))
        return answers[:, None] == np.arange(num_classes)[None]

    def value(counts: Any) -> float | None:
        counts = np.asarray(counts)
        counts = counts[counts > 0]
        shares = counts / counts.sum()
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(counts) else None

    return Metric(of, value)


@_arguments.checked()
def bits_per_byte(nats: Prediction, count: Callable[[Examples], Any]) -> Metric:
    """Bits per byte: ``nats(output) [N]`` summed over each instance, over ``count`` bytes."""
    return ratio(
        lambda output, source, examples: (
            np.asarray(nats(output), np.float64) / math.log(2.0),
            np.asarray(count(examples)),
        )
    )


@_arguments.checked()
def solved(answer: Prediction = lambda output: output) -> Metric:
    """Share of the instances whose whole answer (a grid, a string of tokens) is ``y``."""

    def of(output: Any, source: Any, examples: Examples) -> np.ndarray:
        given, wanted = np.asarray(answer(output)), np.asarray(examples.y)
        return (given == wanted).reshape(len(wanted), -1).all(-1)

    return mean(of)


@_arguments.checked(num_classes=_arguments.count())
def mean_iou(num_classes: int, prediction: Prediction = classes) -> Metric:
    """Mean over classes of intersection over union of pixels, over all instances together.

    Classes that neither prediction nor label has do not count. Pixels of label -1 are left out.
    """

    def of(output: Any, source: Any, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        y = np.asarray(examples.y)
        labels = np.arange(num_classes)
        given = prediction(output)[..., None] == labels
        wanted = y[..., None] == labels
        counts = (y >= 0)[..., None]
        axes = tuple(range(1, y.ndim))
        both = (given & wanted & counts).sum(axes)
        return both, ((given | wanted) & counts).sum(axes)

    def value(sums: Any) -> float:
        both, either = (np.asarray(leaf, np.float64) for leaf in sums)
        there = either > 0
        return float((both[there] / either[there]).mean()) if there.any() else math.nan

    return Metric(of, value)


def _label(examples: Examples, label: str | None) -> Any:
    return np.asarray(examples.y if label is None else examples.y[label])
