"""Where scalars go while a program runs: JSON lines always, trackers if asked."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from absl import flags

from experiments import launch


class Writer(Protocol):
    """Anything that takes scalars of a step, and is closed once."""

    def scalars(self, step: int, values: Mapping[str, float], seed: int) -> None:
        """Records named values of one step of a seed, whose steps begin again with each seed."""

    def close(self) -> None:
        """Hands over what is still on its way."""


class _JsonLines:
    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "metrics.jsonl"
        if self._path.exists() and not (data := self._path.read_bytes()).endswith(b"\n"):
            # What a killed process left of its last line would spoil the next one.
            os.truncate(self._path, data.rfind(b"\n") + 1)

    def scalars(self, step: int, values: Mapping[str, float], seed: int) -> None:
        launch.append(self._path, json.dumps({"seed": seed, "step": step, **values}) + "\n")

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, workdir: pathlib.Path):
        import tensorboardX

        self._begin, self._folder = tensorboardX.SummaryWriter, workdir / "tensorboard"
        self._events: dict[int, Any] = {}

    def scalars(self, step: int, values: Mapping[str, float], seed: int) -> None:
        if seed not in self._events:
            self._events[seed] = self._begin(str(self._folder / f"seed_{seed}"))
        for name, value in values.items():
            self._events[seed].add_scalar(name, value, step)
        self._events[seed].flush()  # a killed run does not write its rows again

    def close(self) -> None:
        for events in self._events.values():
            events.close()


class _WeightsAndBiases:
    """One run per work folder, which goes on when the program is run again."""

    def __init__(self, workdir: pathlib.Path):
        import wandb

        run_id = _kept(workdir / ".wandb_run", lambda: uuid.uuid4().hex)
        project = os.environ.get("WANDB_PROJECT", "ttt_jax")
        self._run: Any = wandb.init(
            project=project, name=workdir.name, id=run_id, resume="allow", dir=str(workdir)
        )
        # Steps begin again with every seed; its own count of steps may only grow.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float], seed: int) -> None:
        self._run.log({"step": step, **_of_seed(values, seed)})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """One run per work folder, which goes on when the program is run again."""

    def __init__(self, workdir: pathlib.Path):
        import mlflow

        self._client: Any = mlflow.MlflowClient()

        def begin() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ttt_jax")
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
            return str(self._client.create_run(experiment, run_name=workdir.name).info.run_id)

        self._run = _kept(workdir / ".mlflow_run", begin)

    def scalars(self, step: int, values: Mapping[str, float], seed: int) -> None:
        for name, value in _of_seed(values, seed).items():
            self._client.log_metric(self._run, name, float(value), step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _of_seed(values: Mapping[str, float], seed: int) -> dict[str, float]:
    """The values by names of their own for every seed, each of which is a curve."""
    return {f"seed_{seed}/{name}": value for name, value in values.items()}


def _kept(path: pathlib.Path, make: Callable[[], str]) -> str:
    """A text that is made once and then read from its file."""
    if not path.exists():
        launch.write_atomically(path, make())
    return path.read_text(encoding="utf-8")


TRACKERS: dict[str, tuple[Callable[[pathlib.Path], Writer], str]] = {
    "tensorboard": (_TensorBoard, "tensorboardX"),
    "wandb": (_WeightsAndBiases, "wandb"),
    "mlflow": (_MLflow, "mlflow"),
}
"""A tracker by name, and the package that it needs."""


class _Several:
    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def scalars(self, step: int, values: Mapping[str, float], seed: int) -> None:
        for writer in self._writers:
            writer.scalars(step, values, seed)


@contextlib.contextmanager
def open_writer(workdir: pathlib.Path, trackers: Sequence[str] = ()) -> Iterator[_Several]:
    """A writer over ``WORKDIR/metrics.jsonl`` and the named trackers, closed in the end.

    Args:
      workdir: the work folder.
      trackers: some of :data:`TRACKERS`. ``tensorboard`` writes into the folder; ``wandb`` and
        ``mlflow`` go where their own environment variables say.

    Raises:
      UserError: an unknown tracker, or one that is not installed or cannot start.
    """
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = [_JsonLines(workdir)]
        for name in launch.chosen("tracker", trackers, TRACKERS) if trackers else ():
            make, package = TRACKERS[name]
            try:
                writers.append(make(workdir))
            except ImportError as error:
                raise launch.UserError(
                    f"--trackers={name} needs {package}, which is not installed ({error}): "
                    f"pip install {package}."
                ) from error
            except Exception as error:  # whatever a tracker raises of servers and accounts
                raise launch.UserError(f"--trackers={name} cannot start: {error}") from error
            stack.callback(writers[-1].close)
        yield _Several(writers)


def define_flag() -> flags.FlagHolder[Any]:
    """Defines ``--trackers``; not at import, as programs are imported too."""
    return flags.DEFINE_list(
        "trackers", [], f"Where scalars go beside metrics.jsonl: {', '.join(TRACKERS)}."
    )
