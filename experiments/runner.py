"""Runs one method over one trial: compile once, restore between batches, measure."""

import concurrent.futures
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import ttt_jax as ttt
from experiments import launch, methods as methods_lib, source_data
from experiments.problem import Problem
from experiments.trials import Trial, cells_of
from ttt_jax import checkpoint, data

# What makes a trial a failed row instead of ending the run.
TRIAL_ERRORS = (ValueError, TypeError, FloatingPointError, jax.errors.JaxRuntimeError)


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

    @property
    def final(self) -> np.ndarray:
        """Logits of the prediction that counts, ``[N, classes]``."""
        return self.logits if self.logits.ndim == 2 else self.logits[:, -1]

    def wrong(self) -> np.ndarray:
        """Bool ``[N]``."""
        return self.final.argmax(-1) != self.label

    def cells(self) -> dict[tuple[str, int], np.ndarray]:
        """Where the images of each (domain, severity) are: bool ``[N]``."""
        return {
            (domain, severity): (self.domain == domain) & (self.severity == severity)
            for domain, severity in cells_of(self.domain, self.severity)
        }

    def take(self, here: np.ndarray) -> "Outcome":
        """Some of the images, with their share of the time."""
        share = float(here.mean())
        columns = {name: getattr(self, name) for name in self._fields if "seconds" not in name}
        return self._replace(
            **{name: None if value is None else value[here] for name, value in columns.items()},
            seconds=self.seconds * share,
            compile_seconds=self.compile_seconds * share,
        )


def ahead(make: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """``make(item)`` for each item in order, the next one made while this one is in use.

    Corrupting images is work for the host, adapting for the accelerator.
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(make, items[0]) if items else None
        for item in items[1:]:
            made, pending = pending.result(), pool.submit(make, item)
            yield made
        if pending is not None:
            yield pending.result()


class Runner:
    """Evaluates methods of one seed, from one pristine checkpoint.

    ``compiled`` holds the programs; runners that differ in seed and checkpoint alone may share it.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        plain: Problem,
        pristine: checkpoint.Pristine,
        *,
        seed: int,
        restore: str,
        compiled: dict[Any, Any] | None = None,
    ):
        self._config = config.adapt
        self._parallel_streams = launch.setting(config, "adapt.parallel_streams")
        self._plain = plain
        self._pristine = pristine
        self._restore = restore
        self.seed = seed
        self.fingerprint = pristine.fingerprint
        self._key = jax.random.key(seed)
        self._source = source_data.SourceData(config, pristine, seed=seed)
        self._compiled = {} if compiled is None else compiled
        self._batches: dict[Any, list[Any]] = {}

    def batches(self, source: data.Source, trial: Trial) -> list[data.DomainBatch]:
        """The corrupted batches of a trial, made once."""
        # Several passes over the same cells are longer streams, of more plans.
        where = (source.split, trial.sequence, trial.cells, len(trial.plans))
        if where not in self._batches:
            loaders = [
                data.Loader(
                    source,
                    plan,
                    batch_size=self._config.batch_size,
                    seed=self._config.corruption_seed,
                )
                for plan in trial.plans
            ]
            self._batches[where] = [trial.named(batch) for loader in loaders for batch in loader]
        return self._batches[where]

    def run(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        batches: Sequence[data.DomainBatch],
    ) -> Outcome:
        """Runs a method with some settings over the batches of one trial."""
        return self.run_all(name, method, settings, [batches])[0]

    def run_all(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        trials: Sequence[Sequence[data.DomainBatch]],
    ) -> list[Outcome]:
        """Runs a method over several trials.

        Streams go side by side, each with a state of its own: one by one they would leave most of
        an accelerator idle, since a stream takes one image at a time.
        """
        source_seconds = self._source.measure(name, method, settings).seconds
        if method.scope == "stream":
            outcomes = self._side_by_side(name, method, settings, trials)
        else:
            outcomes = [self._one(name, method, settings, batches) for batches in trials]
        return [outcome._replace(source_seconds=source_seconds) for outcome in outcomes]

    def _side_by_side(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        trials: Sequence[Sequence[data.DomainBatch]],
    ) -> list[Outcome]:
        # Side by side go streams whose batches have the same sizes.
        outcomes: dict[int, Outcome] = {}
        sizes = [tuple(len(batch.id) for batch in batches) for batches in trials]
        for size in dict.fromkeys(sizes):
            equal = [place for place, other in enumerate(sizes) if other == size]
            for first in range(0, len(equal), self._parallel_streams):
                places = equal[first : first + self._parallel_streams]
                some = self._streams(name, method, settings, [trials[place] for place in places])
                outcomes.update(zip(places, some, strict=True))
        return [outcomes[place] for place in range(len(trials))]

    def _one(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        batches: Sequence[data.DomainBatch],
    ) -> Outcome:
        results, clock = [], _Clock()
        for batch in batches:
            images, ids = jnp.asarray(batch.image), batch.id
            if method.scope == "per_sample":
                # A whole batch must not be padded: the repeated image would enter its statistics.
                # A last, smaller one has a program of its own.
                images, ids = _padded(batch, self._config.batch_size)
            arguments = (images, ttt.sample_keys(self._key, ids))
            output, info = self._call(name, method, settings, arguments, clock)
            results.append(_host((output, _flags(info, len(batch.id))), len(batch.id)))
        return _outcome(results, batches, clock, 1)

    def _streams(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        trials: Sequence[Sequence[data.DomainBatch]],
    ) -> list[Outcome]:
        params = self._pristine.restore(self._restore)
        statistics = self._source.measure(name, method, settings).statistics
        init = jax.jit(method.built(settings, statistics).init)
        carry = jax.vmap(init, in_axes=None, axis_size=len(trials))(params)
        results: list[list[Any]] = [[] for _ in trials]
        clock = _Clock()
        for batches in zip(*trials, strict=True):
            images = jnp.stack([batch.image for batch in batches])
            keys = jnp.stack([ttt.sample_keys(self._key, batch.id) for batch in batches])
            arguments = (carry, images, keys)
            carry, output, info = self._call(name, method, settings, arguments, clock)
            count = images.shape[1]
            for place, result in enumerate(results):
                mine = jax.tree.map(lambda leaf, i=place: leaf[i], (output, info))
                result.append(_host((mine[0], _flags(mine[1], count)), count))
        return [
            _outcome(result, batches, clock, len(trials))
            for result, batches in zip(results, trials, strict=True)
        ]

    def _call(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        arguments: tuple[Any, ...],
        clock: "_Clock",
    ) -> Any:
        """Compiles where needed, runs, and adds to the clock."""
        params = self._pristine.restore(self._restore)
        static = tuple(sorted((k, v) for k, v in settings.items() if k not in methods_lib.TRACED))
        numbers = {k: jnp.float32(v) for k, v in settings.items() if k in methods_lib.TRACED}
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        statistics = self._source.measure(name, method, settings).statistics
        where = (name, static, tuple(sorted(numbers)), shapes)
        if where not in self._compiled:
            start = time.perf_counter()
            program = jax.jit(self._program(method, settings))
            self._compiled[where] = program.lower(params, numbers, statistics, *arguments).compile()
            clock.compiling += time.perf_counter() - start
        start = time.perf_counter()
        run = self._compiled[where]
        results = jax.block_until_ready(run(params, numbers, statistics, *arguments))
        clock.seconds += time.perf_counter() - start
        return results

    def _program(self, method: methods_lib.Method, settings: dict[str, Any]) -> Any:
        """``(params, numbers, statistics, images, keys) -> (output, info)``.

        Streams take a carry before the images, and return it.

        ``numbers`` are the settings that may be traced, so candidates that differ in these alone
        share one compiled program.
        """

        def independent(params: Any, numbers: Any, statistics: Any, images: Any, keys: Any) -> Any:
            predict = method.built(settings | numbers, statistics)
            if method.whole_batch:
                return predict(params, images, keys[0])
            return ttt.batched(predict, chunk_size=self._config.chunk_size)(params, images, keys)

        def streams(
            params: Any, numbers: Any, statistics: Any, carry: Any, images: Any, keys: Any
        ) -> Any:
            stream = method.built(settings | numbers, statistics)
            step = jax.vmap(stream.step, in_axes=(None, 0, 0, 0))
            if method.whole_batch:
                carry, (output, info) = step(params, carry, images, keys[:, 0])
                return carry, output, info
            carry, results = jax.lax.scan(
                lambda carry, pair: step(params, carry, *pair),
                carry,
                jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (images, keys)),
            )
            output, info = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), results)
            return carry, output, info

        return streams if method.scope == "stream" else independent

    def probe(
        self, batches: Iterable[data.DomainBatch], names: Iterable[str]
    ) -> dict[str, np.ndarray]:
        """Auxiliary losses ``[N]`` of the pristine model on a trial; not part of any timing."""
        where = ("probe", *sorted(names))
        if where not in self._compiled:
            readings = methods_lib.probes(self._plain)

            def read(params: Any, images: jax.Array) -> dict[str, jax.Array]:
                return {
                    name: jax.vmap(readings[name], in_axes=(None, 0))(params, images)
                    for name in where[1:]
                }

            self._compiled[where] = jax.jit(read)
        params = self._pristine.restore("memory")
        parts = []
        for batch in batches:
            images, _ = _padded(batch, self._config.batch_size)
            values = self._compiled[where](params, images)
            parts.append({k: np.asarray(v)[: len(batch.id)] for k, v in values.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in where[1:]}


class _Clock:
    """Time spent in compiled calls, and in compiling them."""

    def __init__(self) -> None:
        self.seconds, self.compiling = 0.0, 0.0


def _host(tree: Any, count: int) -> Any:
    """The first ``count`` images, as NumPy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], tree)


def _outcome(
    results: Sequence[Any], batches: Sequence[data.DomainBatch], clock: _Clock, sharers: int
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


def _flags(info: ttt.Info | ttt.StreamInfo, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Per image: whether its steps were finite, and whether a reset fired after it."""
    ok = np.asarray(info.ok)
    reset = np.asarray(info.reset) if isinstance(info, ttt.StreamInfo) else np.zeros_like(ok)
    if ok.ndim:
        return ok[:count], reset[:count]
    # One flag for a whole batch: all of its images adapt together, and a reset comes after them.
    return np.full(count, ok), reset & (np.arange(count) == count - 1)


def _padded(batch: data.DomainBatch, size: int) -> tuple[jax.Array, np.ndarray]:
    """Repeats the last example up to ``size``, so that every batch has one compiled program."""
    places = np.minimum(np.arange(size), len(batch.id) - 1)
    return jnp.asarray(batch.image[places]), batch.id[places]
