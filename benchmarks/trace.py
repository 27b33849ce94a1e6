"""Where the time of one call goes: kernels of a device by name, from a trace of jax's profiler."""

import collections
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

_NUMBER = re.compile(r"([._]\d+)+$")


class Kernel(NamedTuple):
    """All kernels of one name: seconds they took in all, and how often they ran."""

    name: str
    seconds: float
    count: int


def trace(call: Callable[[], Any], folder: str | os.PathLike[str]) -> list[Kernel]:
    """Runs a call under the profiler.

    Args:
      call: runs on the device; compiled before, or its compilation is in the trace.
      folder: for the trace, which TensorBoard's profile plugin opens; made if missing.

    Returns:
      Kernels of the first GPU (of a CPU its computations), slowest first. XLA numbers fusions of
      one kind; names here go without the number.
    """
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(call())
    latest = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = {plane.name: plane for plane in ProfileData.from_file(str(latest)).planes}
    device = planes.get("/device:GPU:0")
    if device is not None:
        return summed(_events(device, "Stream"))
    # On a CPU the threads of XLA hold its computations, among marks of their own.
    events = _events(planes["/host:CPU"], "tf_XLA")
    return summed(
        (name, seconds)
        for name, seconds in events
        if "::" not in name and not name.startswith("end:")
    )


def _events(plane: Any, name: str) -> Iterable[tuple[str, float]]:
    for line in plane.lines:
        if name in line.name:
            for event in line.events:
                yield event.name, event.duration_ns / 1e9


def summed(events: Iterable[tuple[str, float]]) -> list[Kernel]:
    """Events ``(name, seconds)`` by name without trailing numbers, slowest first."""
    seconds: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.defaultdict(int)
    for name, duration in events:
        name = _NUMBER.sub("", name)
        seconds[name] += duration
        count[name] += 1
    kernels = [Kernel(name, seconds[name], count[name]) for name in seconds]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def table(kernels: list[Kernel], most: int = 20) -> str:
    """A line per kernel: milliseconds, share of all of them, count, name."""
    total = sum(kernel.seconds for kernel in kernels)
    lines = [f"{1e3 * total:10.3f} ms in {sum(kernel.count for kernel in kernels)} kernels"]
    for kernel in kernels[:most]:
        share = 100 * kernel.seconds / total
        name = kernel.name[:70]
        lines.append(f"{1e3 * kernel.seconds:10.3f} ms {share:5.1f} % {kernel.count:7} x {name}")
    return "\n".join(lines)
