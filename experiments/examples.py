"""A few instances of an image task, as they are, shifted, and with what is predicted of them."""

import contextlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import launch, settings
from experiments.tasks import image_metrics
from ttt_jax import evaluation
from ttt_jax.task import Examples, Metric, Task

_MOST = 8
_CLEAN = "clean"


def shown(candidates: Mapping[str, Sequence[settings.Candidate]]) -> str | None:
    """Returns the first method that takes gradient steps, of those that adapt each instance alone.

    Without such a one, the first that takes steps at all, of a size over 0; None where none does.
    """
    moving = [e for e in candidates.values() if any(c.settings.get("learning_rate", 1) for c in e)]
    steps = [each[0] for each in moving if each[0].select is not None]
    alone = [candidate for candidate in steps if candidate.scope == "per_sample"]
    return next((candidate.label for candidate in [*alone, *steps]), None)


class Keeper(NamedTuple):
    """What is kept in a ``file``, from ``metrics`` that are no figures of a row, by ``add``."""

    file: str
    metrics: Mapping[str, Metric]
    add: Callable[[evaluation.Evaluation, evaluation.Row, pathlib.Path], None]


class KeptEvaluation(evaluation.Evaluation):
    """An evaluation that keeps something of one method's instances; its rows are the same."""

    def __init__(
        self,
        task: Task,
        *args: Any,
        label: str,
        folder: pathlib.Path,
        keeper: Keeper,
        **options: Any,
    ):
        """As :class:`ttt_jax.evaluation.Evaluation`, with what is kept of the method ``label``."""
        metrics = {**task.metrics, **keeper.metrics}
        super().__init__(task._replace(metrics=metrics), *args, **options)
        self._label, self._path, self._keeper = label, folder / keeper.file, keeper

    def rows(
        self, label: str, method: evaluation.Method, streams: Sequence[str]
    ) -> list[evaluation.Row]:
        """The rows, and on the way what is kept."""
        rows = super().rows(label, method, streams)
        for row in rows:
            if label == self._label and {*self._keeper.metrics} <= {*row.each}:
                self._keeper.add(self, row, self._path)
        return [self._without(row) for row in rows]

    def _without(self, row: evaluation.Row) -> evaluation.Row:
        kept = {
            field: {k: v for k, v in getattr(row, field).items() if k not in self._keeper.metrics}
            for field in ("sums", "values", "each")
        }
        return row._replace(**kept)


def _classes(pick: Callable[[Any, Any], Any]) -> Metric:
    """The predicted classes of images, which are no figure of a row."""

    def of(output: Any, source: Any, examples: Examples) -> np.ndarray | None:
        shape, label = np.shape(examples.x), np.asarray(examples.y)
        if (
            len(shape) != 4
            or shape[-1] not in (1, 3)
            or label.ndim != 1
            or label.dtype.kind not in "iu"
        ):
            return None
        return image_metrics.predicted(pick(output, source))

    return Metric(of, lambda sums: 0.0)


def keep_stream(path: pathlib.Path, stream: str, made: list[dict[str, Any]]) -> None:
    """Writes the objects of a stream in the place of its earlier ones."""
    try:
        earlier = json.loads(path.read_text("utf-8")) if path.exists() else []
    except ValueError:
        earlier = []  # a damaged file is made anew
    launch.write_json(path, [*(held for held in earlier if held["stream"] != stream), *made])


def _add_picture(source: evaluation.Evaluation, row: evaluation.Row, path: pathlib.Path) -> None:
    domain = row.tags.get("domain", _CLEAN)
    arrays: dict[str, np.ndarray] = {}
    # A damaged file is made anew from here on.
    with contextlib.suppress(launch.UserError):
        arrays = launch.read_npz(path, "") if path.exists() else {}
    domains = arrays.get("domain", np.array([], str))
    if domain == _CLEAN or domain in domains or len(domains) >= _MOST:
        return
    number = source.streams.index(row.stream) % len(row.id)
    instance = row.id[number]
    shifted = _image(source.batches(row.stream), instance, row.tags)
    # The first batch alone: a part of a run need not read all clean images.
    first = source.batches(_CLEAN) if _CLEAN in source.streams else ()
    clean = _image(itertools.islice(first, 1), instance, {})
    if shifted is None or clean is None:
        return
    new = {
        "clean": clean[0].astype(np.float16),
        "shifted": shifted[0].astype(np.float16),
        "label": shifted[1],
        "before": row.each["picture_before"][number],
        "after": row.each["picture_after"][number],
        "domain": domain,
    }
    joined = {k: np.stack([*arrays.get(k, ()), np.asarray(v)]) for k, v in new.items()}
    launch.write_npz(path, joined, compressed=True)


def _image(
    batches: Iterable[Examples], instance: int, tags: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Image and label of an instance with these tags; None where it is in no batch."""
    for batch in batches:
        mask = batch.id == instance
        for name, value in tags.items():
            mask &= batch.tags[name] == value
        if mask.any():
            index = int(mask.argmax())
            return np.asarray(batch.x[index]), np.asarray(batch.y[index])
    return None


PICTURES = Keeper(
    "examples.npz",
    {
        "picture_before": _classes(lambda output, source: source),
        "picture_after": _classes(lambda output, source: output),
    },
    _add_picture,
)
"""What is predicted of a few images.

The k-th stream gives its k-th image, so that no label decides which are shown. Tasks of other kinds
than the classification of images have no pictures, nor have streams whose images are not in the
first batch of the stream ``clean``. The file has ``clean`` and ``shifted`` [K, H, W, C] in [0, 1],
and ``label``, ``before``, ``after`` and ``domain`` [K].
"""
