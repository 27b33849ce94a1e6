"""Where scalars go while a program runs: JSON lines always, TensorBoard if asked."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from experiments import launch


class Writer(Protocol):
    """Anything that takes scalars of a step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records named values of one step."""


class _JsonLines:
    def __init__(self, path: pathlib.Path):
        self._path = path

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with launch.writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


class _TensorBoard:
    def __init__(self, folder: pathlib.Path):
        try:
            import tensorboardX
        except ImportError as error:
            raise launch.UserError(
                "--tensorboard needs tensorboardX; install ttt_jax with its extra: "
                "pip install 'ttt_jax[report]'."
            ) from error
        self._events = tensorboardX.SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class _Several:
    def __init__(self, *writers: Writer):
        self._writers = writers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.scalars(step, values)


@contextlib.contextmanager
def open_writer(workdir: pathlib.Path, *, tensorboard: bool) -> Iterator[Writer]:
    """Writers over ``WORKDIR/metrics.jsonl`` and, if asked, ``WORKDIR/tensorboard``."""
    lines = _JsonLines(workdir / "metrics.jsonl")
    if not tensorboard:
        yield lines
        return
    events = _TensorBoard(workdir / "tensorboard")
    try:
        yield _Several(lines, events)
    finally:
        events.close()
