"""Metrics against hand counts; parts are joined by adding sums."""

import math

import numpy as np
import pytest

from ttt_jax import metrics
from ttt_jax.task import Examples

LOGITS = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, np.nan], [5.0, 4.0]])
SOURCE = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
EXAMPLES = Examples(np.arange(4), None, np.array([0, 0, 0, 0]), {})


def value(metric, output=LOGITS, source=SOURCE, examples=EXAMPLES):
    sums = metric.of(output, source, examples)
    total = [np.asarray(leaf).sum(0) for leaf in (sums if isinstance(sums, tuple) else (sums,))]
    return metric.value(tuple(total) if isinstance(sums, tuple) else total[0])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (metrics.error(), 2 / 4),  # predictions 0, 1, none, 0
        (metrics.helped(), 1 / 4),  # source 1, 1, 0, 0
        (metrics.harmed(), 1 / 4),
        (metrics.agreement(), 2 / 4),
        (metrics.predicted_classes(2, lambda output, source: metrics.classes(source)), 2.0),
        (
            metrics.predicted_classes(2, lambda output, source: metrics.classes(output)),
            math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))),
        ),
    ],
)
def test_hand_counts(metric, expected):
    assert value(metric) == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_of_a_broken_prediction_is_infinite():
    metric = metrics.cross_entropy(lambda output: output)
    assert value(metric) == math.inf
    kept = np.array([[2.0, 1.0], [0.0, 3.0]])
    part = EXAMPLES._replace(y=np.array([0, 0]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert value(metric, kept, None, part) == pytest.approx(expected, rel=1e-12)


def test_bits_per_byte_weigh_documents_by_length():
    metric = metrics.bits_per_byte(lambda nats: nats, lambda examples: examples.y)
    documents = EXAMPLES._replace(y=np.array([1, 3, 2, 2]))
    nats = np.log(2) * np.array([8.0, 3.0, 2.0, 3.0])
    assert value(metric, nats, None, documents) == pytest.approx(16 / 8)


def test_solved_needs_every_cell():
    grids = Examples(np.arange(2), None, np.array([[[1, 2]], [[3, 4]]]), {})
    assert value(metrics.solved(), np.array([[[1, 2]], [[3, 0]]]), None, grids) == 0.5


def test_mean_iou_is_over_classes_of_all_instances_together():
    y = np.array([[[0, 1], [1, -1]]])
    logits = np.eye(3)[np.array([[[0, 1], [0, 2]]])]
    frames = Examples(np.arange(1), None, y, {})
    # class 0: 1 of 2, class 1: 1 of 2, class 2 only where the label does not count
    assert value(metrics.mean_iou(3), logits, None, frames) == pytest.approx(0.5)


def test_a_curve_is_a_metric_with_one_more_axis():
    metric = metrics.by_step(lambda output, examples: output != examples.y[:, None])
    steps = np.array([[0, 0], [0, 1], [1, 1], [0, 1]])
    assert value(metric, steps) == [0.25, 0.75]
    absent = metrics.by_step(lambda output, examples: None)
    assert absent.of(steps, None, EXAMPLES) is None


def test_a_ratio_over_nothing_is_nan():
    metric = metrics.ratio(lambda output, source, examples: (np.zeros(4), np.zeros(4)))
    assert math.isnan(value(metric))
