"""What a method did on a trial: arrays over its images, joined from batches and processes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import ttt_jax as ttt
from experiments.trials import cells_of
from ttt_jax import data


class Outcome(NamedTuple):
    """What a method did on one trial, or on one domain of it.

    Attributes:
      logits: float32 ``[N, classes]``, or ``[N, S + 1, classes]`` for a traced method.
      aux: float32 ``[N]`` or ``[N, S + 1]``, the probe of the auxiliary loss, or None.
      ok: bool ``[N]``.
      reset: bool ``[N]``, whether a reset fired after the image.
      label: int32 ``[N]``.
      domain: str ``[N]``.
      severity: int32 ``[N]``.
      seconds: time of the compiled calls.
      compile_seconds: time to trace and compile, 0 where the program was there already.
      source_seconds: time to measure the source statistics, which is done once for every seed;
        0 where the method needs none.
      drift: how far the parameters of a stream are from the pristine ones at its end; 0 where they
        do not stay.
      program_steps: the inner steps of the longer program whose beginning this is, and whose time
        it has a share of, by passes through the model; 0 where it has a program of its own.
    """

    logits: np.ndarray
    aux: np.ndarray | None
    ok: np.ndarray
    reset: np.ndarray
    label: np.ndarray
    domain: np.ndarray
    severity: np.ndarray
    seconds: float
    compile_seconds: float
    source_seconds: float = 0.0
    drift: float = 0.0
    program_steps: int = 0

    @property
    def final(self) -> np.ndarray:
        """Logits of the prediction that counts, ``[N, classes]``."""
        return self.logits if self.logits.ndim == 2 else self.logits[:, -1]

    def wrong(self) -> np.ndarray:
        """Bool ``[N]``: another class than the label's, or a prediction with a nan."""
        return predicted(self.final) != self.label

    def cells(self) -> dict[tuple[str, int], np.ndarray]:
        """Where the images of each (domain, severity) are: bool ``[N]``."""
        return {
            (domain, severity): (self.domain == domain) & (self.severity == severity)
            for domain, severity in cells_of(self.domain, self.severity)
        }

    def take(self, here: np.ndarray) -> "Outcome":
        """Some of the images, with their share of the time."""
        share = float(here.mean())
        columns = {name: getattr(self, name) for name in self._fields if name not in _NUMBERS}
        return self._replace(
            **{name: None if value is None else value[here] for name, value in columns.items()},
            seconds=self.seconds * share,
            compile_seconds=self.compile_seconds * share,
        )


def predicted(logits: np.ndarray) -> np.ndarray:
    """The predicted class, ``[..., C] -> int [...]``; -1, which is no class, where one is nan."""
    return np.where(np.isnan(logits).any(-1), -1, logits.argmax(-1))


_NUMBERS = ("seconds", "compile_seconds", "source_seconds", "drift", "program_steps")


class Clock:
    """Time spent in compiled calls, and in compiling them."""

    def __init__(self) -> None:
        self.seconds, self.compiling = 0.0, 0.0


def on_host(tree: Any) -> Any:
    """The leaves as NumPy arrays."""
    return jax.tree.map(np.asarray, tree)


def flags(info: ttt.Info | ttt.StreamInfo, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Per image: whether its steps were finite, and whether a reset fired after it."""
    ok = np.asarray(info.ok)
    reset = np.asarray(info.reset) if isinstance(info, ttt.StreamInfo) else np.zeros_like(ok)
    if ok.ndim:
        return ok[:count], reset[:count]
    # One flag for a whole batch: all of its images adapt together, and a reset comes after them.
    return np.full(count, ok), reset & (np.arange(count) == count - 1)


def of_batches(
    results: Sequence[Any], batches: Sequence[data.DomainBatch], clock: Clock, sharers: int
) -> Outcome:
    """Joins the batches of a trial, which shares the clock with others."""
    output, (ok, reset) = jax.tree.map(lambda *parts: np.concatenate(parts), *results)
    return Outcome(
        logits=output["logits"],
        aux=output.get("aux"),
        ok=ok,
        reset=reset,
        label=np.concatenate([batch.label for batch in batches]),
        domain=np.concatenate([batch.domain for batch in batches]),
        severity=np.concatenate([batch.severity for batch in batches]),
        seconds=clock.seconds / sharers,
        compile_seconds=clock.compiling / sharers,
    )


def joined(parts: Sequence[Outcome]) -> Outcome:
    """One trial from the parts of several processes, in order; they worked at the same time."""
    if len(parts) == 1:
        return parts[0]
    columns = {}
    for name in Outcome._fields:
        values = [getattr(part, name) for part in parts]
        if name in _NUMBERS:
            columns[name] = max(values)
        else:
            columns[name] = None if values[0] is None else np.concatenate(values)
    return Outcome(**columns)


def pack(parts: Sequence[Mapping[str, Any] | None]) -> bytes:
    """Arrays and numbers by name as bytes, None for a part that there is not."""
    file = io.BytesIO()
    arrays = {
        f"{place}.{name}": np.asarray(value)
        for place, part in enumerate(parts)
        for name, value in (part or {}).items()
        if value is not None
    }
    np.savez(file, count=np.asarray(len(parts)), **arrays)
    return file.getvalue()


def unpack(text: bytes) -> list[dict[str, np.ndarray]]:
    """The parts of :func:`pack`, every bit the same; empty for None."""
    with np.load(io.BytesIO(text), allow_pickle=False) as file:
        parts: list[dict[str, np.ndarray]] = [{} for _ in range(int(file["count"]))]
        for key in file.files:
            place, _, name = key.partition(".")
            if name:
                parts[int(place)][name] = file[key]
    return parts


def from_arrays(part: Mapping[str, np.ndarray]) -> Outcome:
    """An outcome that was packed as its ``_asdict()``."""
    numbers = {name: part[name].item() for name in _NUMBERS}
    return Outcome(**{"aux": None, **part, **numbers})
