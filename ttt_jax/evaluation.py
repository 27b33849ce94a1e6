"""The one loop over a task: methods x streams -> rows of sums. It writes no file."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ttt_jax import _arguments, _devices, batching, diagnostics, predictors, select
from ttt_jax._devices import Call, Devices
from ttt_jax._programs import (
    InBatches,
    Method,
    Parametric,
    compiled,
    fastest,
    key_of,
    scope_of,
    stream_of,
)
from ttt_jax.base import FromSource, Params, Predictor, PyTree
from ttt_jax.source import source_statistics
from ttt_jax.task import Examples, Task, cells, in_batches, joined_tags

__all__ = [
    "Evaluation",
    "InBatches",
    "Parametric",
    "Row",
    "evaluate",
    "measured",
    "scope_of",
    "source_of",
]


class Row(NamedTuple):
    """What one method did on the instances of one stream that have the same tags.

    Attributes:
      method: its label.
      stream: the stream's name.
      tags: one row per distinct combination of the tags' values.
      num_examples: N.
      sums: by metric, its sums over the row's instances.
      values: by metric, ``value(sums)``.
      counts: ``non_finite``, ``updated`` and ``resets``, in instances.
      seconds: of the compiled calls, the row's share.
      compile_seconds: of tracing and compiling, 0 where the program was there already.
      id: int64 ``[N]``, in the order of the stream.
      each: by metric, its sums of every instance ``[N, ...]``, for paired intervals.
    """

    method: str
    stream: str
    tags: Mapping[str, Any]
    num_examples: int
    sums: Mapping[str, PyTree]
    values: Mapping[str, Any]
    counts: Mapping[str, int]
    seconds: float
    compile_seconds: float
    id: np.ndarray
    each: Mapping[str, PyTree]


@_arguments.checked(seed=_arguments.count(0))
def evaluate(
    task: Task,
    methods: Mapping[str, Method],
    params: Params,
    *,
    role: str,
    seed: int,
    chunk_size: int | str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Row]:
    """Runs methods over the streams of a task.

    Args:
      task: see :class:`ttt_jax.task.Task`.
      methods: by label: predictors, streams, :class:`InBatches` or :class:`Parametric`.
      params: pristine; never changed.
      role: ``"validation"`` or ``"reported"``.
      seed: of the streams and of the keys; a key follows its instance's id.
      chunk_size: private copies in flight per device; None for a whole batch, 0 for as many as
        fit, ``"fastest"`` for what is fastest by trying (:func:`ttt_jax.tuning.fastest_chunk`).
      mesh: with an axis ``data``, to spread instances, batches and streams over devices.

    Yields:
      A :class:`Row` per method, stream and combination of tags. Streams are compiled once for
      all streams of equal batch sizes and go side by side.

    Raises:
      ValueError: an unknown role, or a task without streams for it.
    """
    evaluation = Evaluation(task, params, role=role, seed=seed, chunk_size=chunk_size, mesh=mesh)
    for label, method in methods.items():
        for name in evaluation.groups(method):
            yield from evaluation.rows(label, method, name)


@_arguments.checked()
def source_of(task: Task) -> Predictor:
    """The unadapted model of a task, with whose output methods are compared: its first head."""
    return predictors.source(batching.unbatched(next(iter(task.heads().values()))))


@_arguments.checked(seed=_arguments.count(0), size=_arguments.count(), count=_arguments.count())
def measured(
    method: FromSource, params: Params, task: Task, *, seed: int, size: int, count: int | None
) -> PyTree:
    """The source statistics that ``method.build`` takes, of the training split of a task.

    Args:
      method: what to measure.
      params: pristine.
      task: its ``training(seed)`` is read once.
      seed: of the order of the training examples.
      size: examples per call, at least 1.
      count: how many examples, at least 1; None for all.
    """
    measure = jax.jit(method.measure)
    batches = _Training(in_batches(task.training(seed), size, count))
    statistics = source_statistics(
        lambda params, batch: measure(params, batch.x), params, batches, reduce=method.reduce
    )
    return jax.block_until_ready(statistics.value)


class _Training:
    """Batches that say which split they are of; a task's training split by its contract."""

    split = "train"

    def __init__(self, batches: Iterator[Examples]):
        self._batches = batches

    def __iter__(self) -> Iterator[Examples]:
        return self._batches


@dataclasses.dataclass
class _Clock:
    seconds: float = 0.0
    compiling: float = 0.0


class _Result(NamedTuple):
    """Outputs and flags of one batch, on the host."""

    output: PyTree
    flags: dict[str, np.ndarray]


class Evaluation:
    """One model on the streams of one role; holds batches, source outputs and programs.

    Programs that resume, or go on after a failure, call :meth:`rows` per method and stream.
    """

    @_arguments.checked(
        seed=_arguments.count(0),
        chunk_size=_arguments.count_or("fastest"),
        parallel_streams=_arguments.count(),
    )
    def __init__(
        self,
        task: Task,
        params: Params | Callable[[], Params],
        *,
        role: str,
        seed: int,
        chunk_size: int | str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        parallel_streams: int = 16,
        chunk_sizes: MutableMapping[str, dict[int, float]] | None = None,
    ):
        """Reads no data yet; arguments as in :func:`evaluate`.

        ``params`` may be a function that restores them between batches; at most
        ``parallel_streams`` streams go side by side per device. ``chunk_sizes`` holds, by program,
        seconds per instance by size, the fastest first, as ``chunk_size="fastest"`` measures them;
        what it holds at the start is not measured again.
        """
        if role not in ("validation", "reported", "choosing"):
            raise ValueError(f"role must be 'validation' or 'reported', got {role!r}.")
        self._task, self._seed = task, seed
        # Parameters may be callable too, as modules that are trees; a function is no tree.
        restores = callable(params) and jax.tree_util.all_leaves([params])
        self._restore = params if restores else lambda: params
        self._chunk_size, self._parallel = chunk_size, parallel_streams
        self._chunk_sizes = {} if chunk_sizes is None else chunk_sizes
        self._devices = Devices(mesh and batching.automatic(mesh))
        self._streams = dict(task.streams(role, seed))
        if not self._streams:
            raise ValueError(f"{task.name} has no {role} stream; streams({role!r}, seed) is empty.")
        self._batches: dict[str, list[Examples]] = {}
        self._source: dict[str, list[PyTree]] = {}
        self.programs: dict[Hashable, Any] = {}

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of the streams, in order."""
        return tuple(self._streams)

    def batches(self, stream: str) -> list[Examples]:
        """The batches of a stream, read once."""
        if stream not in self._batches:
            self._batches[stream] = list(self._streams[stream])
        return self._batches[stream]

    def groups(self, method: Method, streams: Sequence[str] | None = None) -> list[tuple[str, ...]]:
        """The streams that go through one call of :meth:`rows`: side by side where they can."""
        names = self.streams if streams is None else tuple(streams)
        if scope_of(method) != "stream":
            return [(name,) for name in names]
        size = method.size if isinstance(method, InBatches) else None
        lengths = {name: tuple(map(_devices.shapes_of, self._cut(name, size))) for name in names}
        most = self._parallel * self._devices.num
        groups = []
        for length in dict.fromkeys(lengths.values()):
            equal = [name for name in names if lengths[name] == length]
            groups += [tuple(equal[at : at + most]) for at in range(0, len(equal), most)]
        return groups

    def rows(self, label: str, method: Method, streams: Sequence[str]) -> list[Row]:
        """The rows of a method on some streams, several only if they may go side by side."""
        built = method.build(method.values) if isinstance(method, Parametric) else method
        size = built.size if isinstance(built, InBatches) else None
        batches = [self._cut(name, size) for name in streams]
        clock = _Clock()
        if scope_of(method) == "stream":
            results, drifts = self._stream_results(method, batches, size is not None, clock)
        else:
            results = [self._results(method, part, size is not None, clock) for part in batches]
            drifts = [None] * len(results)
        clock.seconds /= len(streams)
        clock.compiling /= len(streams)
        return [
            row
            for name, part, result, drift in zip(streams, batches, results, drifts, strict=True)
            for row in self._scored(label, name, part, result, clock, drift)
        ]

    def cells(self, stream: str) -> list[dict[str, Any]]:
        """The distinct combinations of the tags of a stream, each of which becomes a row."""
        batches = self.batches(stream)
        count = sum(len(batch.id) for batch in batches)
        return [combination for combination, _ in cells(joined_tags(batches), count)]

    def _cut(self, stream: str, size: int | None) -> list[Examples]:
        batches = self.batches(stream)
        if size is None or all(len(batch.id) <= size for batch in batches):
            return batches
        return [part for batch in batches for part in in_batches([batch], size)]

    def _results(
        self, method: Method, batches: Sequence[Examples], in_batch: bool, clock: _Clock
    ) -> list[_Result]:
        if in_batch:
            calls = _devices.calls_of_batches(batches, self._devices)
        else:
            size = max(len(batch.id) for batch in batches)
            calls = _devices.calls_of_instances(batches, size, self._devices)
        results = []
        for call in calls:
            output, info = _devices.on_host(self._call(method, self._inputs(call), clock))
            for position, count in enumerate(call.counts):
                # A batch is one of several results, instances are the first of all.
                index = position if in_batch else slice(count)
                part, told = jax.tree.map(lambda leaf, at=index: leaf[at], (output, info))
                results.append(_Result(part, _flags(told, count)))
        return results

    def _stream_results(
        self, method: Method, streams: Sequence[Sequence[Examples]], in_batch: bool, clock: _Clock
    ) -> tuple[list[list[_Result]], list[float | None]]:
        params = self._restore()
        init = jax.jit(stream_of(method).init)
        # Devices without a stream repeat the last one.
        count = self._devices.padded(len(streams))
        filled = [*streams, *[streams[-1]] * (count - len(streams))]
        carry = jax.vmap(init, in_axes=None, axis_size=count)(params)
        carry = self._devices.put(carry)
        results: list[list[_Result]] = [[] for _ in streams]
        for batches in zip(*filled, strict=True):
            ids = np.stack([batch.id for batch in batches])
            x = jax.tree.map(lambda *leaves: np.stack(leaves), *(batch.x for batch in batches))
            arguments = (carry, *self._inputs(Call(ids, x, ())))
            carry, *told = self._call(method, arguments, clock)
            told = _devices.on_host(told)
            for position, result in enumerate(results):
                output, info = jax.tree.map(lambda leaf, at=position: leaf[at], told)
                result.append(_Result(output, _flags(info, len(batches[0].id))))
        drifts: list[float | None] = [None] * len(streams)
        start, end = (
            getattr(getattr(c, "state", None), "fast", None) for c in (init(params), carry)
        )
        if start is not None:
            drifts = [float(drift) for drift in np.asarray(_drifts(start, end))[: len(streams)]]
        return results, drifts

    def _inputs(self, call: Call) -> tuple[Any, Any]:
        # Whatever generator is jax's default: keys are mapped over, which not all can bear.
        key = jax.random.key(self._seed, impl="threefry2x32")
        keys = batching.sample_keys(key, call.id.reshape(-1))
        return self._devices.put((call.x, keys.reshape(call.id.shape)))

    def _call(self, method: Method, arguments: tuple[Any, ...], clock: _Clock) -> Any:
        """Compiles where needed, runs, and adds to the clock."""
        params = self._restore()
        values = method.values if isinstance(method, Parametric) else ()
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((values, arguments)))
        start = time.perf_counter()
        size = self._size(method, (params, values), arguments)
        where = (key_of(method), scope_of(method), shapes, size)
        if where not in self.programs:
            made = compiled(method, self._devices, size, (params, values), arguments)
            self.programs[where] = made
            clock.compiling += time.perf_counter() - start
        start = time.perf_counter()
        results = jax.block_until_ready(self.programs[where](params, values, *arguments))
        clock.seconds += time.perf_counter() - start
        return results

    def _size(self, method: Method, fixed: tuple[Any, Any], data: tuple[Any, ...]) -> int | None:
        if not isinstance(self._chunk_size, str):
            return self._chunk_size
        if method is self.programs.get("source"):
            # It has no private copies, of which many may be slow.
            return 0
        return fastest(method, self._devices, fixed, data, self._chunk_sizes, self.programs)

    def _source_outputs(self, stream: str) -> list[PyTree]:
        """What the unadapted model gives on a stream, cut as its batches are."""
        if stream not in self._source:
            predict = self.programs.setdefault("source", source_of(self._task))
            batches = self.batches(stream)
            results = self._results(predict, batches, False, _Clock())
            self._source[stream] = [result.output for result in results]
        return self._source[stream]

    def _scored(
        self,
        label: str,
        stream: str,
        batches: Sequence[Examples],
        results: Sequence[_Result],
        clock: _Clock,
        drift: float | None,
    ) -> Iterator[Row]:
        """One row per combination of tags."""
        lengths = [len(batch.id) for batch in batches]
        outputs = _devices.cut_as(lengths, [result.output for result in results])
        sources = _devices.cut_as(lengths, self._source_outputs(stream))
        flags = jax.tree.map(lambda *a: np.concatenate(a), *(result.flags for result in results))
        each: dict[str, PyTree] = {}
        for name, metric in self._task.metrics.items():
            parts = [metric.of(*three) for three in zip(outputs, sources, batches, strict=True)]
            if parts[0] is not None:
                each[name] = jax.tree.map(lambda *a: np.concatenate(a), *parts)
        ids = np.concatenate([batch.id for batch in batches])
        for combination, mask in cells(joined_tags(batches), len(ids)):
            sums = jax.tree.map(lambda leaf, m=mask: leaf[m].sum(axis=0), each)
            values = {name: self._task.metrics[name].value(sums[name]) for name in sums}
            share = float(mask.mean())
            yield Row(
                method=label,
                stream=stream,
                tags=combination,
                num_examples=int(mask.sum()),
                sums=sums,
                values=values if drift is None else values | {"drift": drift},
                counts={name: int(flag[mask].sum()) for name, flag in flags.items()},
                seconds=clock.seconds * share,
                compile_seconds=clock.compiling * share,
                id=ids[mask],
                each=jax.tree.map(lambda leaf, m=mask: leaf[m], each),
            )


@jax.jit
def _drifts(start: PyTree, ends: PyTree) -> jax.Array:
    """How far the parameters of each stream went from where all began."""
    return jax.vmap(lambda end: diagnostics.drift(start, end, select.everything()))(ends)


def _flags(info: Any, count: int) -> dict[str, np.ndarray]:
    """``non_finite``, ``updated`` and ``resets`` of every instance."""
    ok = np.asarray(info.ok)
    reset = np.asarray(getattr(info, "reset", np.zeros_like(ok)))
    if not ok.ndim:
        # All of a batch adapt together, and its reset comes after the last of them.
        reset = reset & (np.arange(count) == count - 1)
    flags = {"non_finite": ~ok, "updated": info.updated, "resets": reset}
    return {name: np.broadcast_to(flag, count) for name, flag in flags.items()}
