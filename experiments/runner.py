"""Runs one method over one trial: compile once, restore between batches, measure."""

import concurrent.futures
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import ttt_jax as ttt
from experiments import (
    chunks,
    launch,
    methods as methods_lib,
    outcome as outcome_lib,
    prefixes,
    shares,
    source_data,
    spread,
    team as team_lib,
)
from experiments.outcome import Outcome
from experiments.problem import Problem, shapes
from experiments.trials import Trial
from ttt_jax import checkpoint, data, diagnostics


class ShareError(RuntimeError):
    """What went wrong in the share of one of several processes."""


# What makes a trial a failed row instead of ending the run.
TRIAL_ERRORS = (
    ValueError,
    TypeError,
    FloatingPointError,
    jax.errors.JaxRuntimeError,
    ShareError,
)


@jax.jit
def _drifts(start: Any, ends: Any) -> jax.Array:
    """How far the parameters of each stream went from where all began."""
    return jax.vmap(lambda end: diagnostics.drift(start, end, ttt.select.everything()))(ends)


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

    ``compiled`` holds the programs; runners that differ in seed and checkpoint alone may share it,
    and ``known``, outcomes whose first steps are those of shorter runs.
    The pristine parameters lie on ``devices``. Each process of a ``team`` is given its share of the
    batches, see :meth:`batches`; the first one gets all outcomes.
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
        known: prefixes.Prefixes | None = None,
        devices: spread.Devices = spread.Devices(),  # noqa: B008 (immutable)
        team: team_lib.Team = team_lib.ALONE,
    ):
        self._config = config.adapt
        self._parallel_streams = launch.setting(config, "adapt.parallel_streams")
        self._plain = plain
        self._pristine = pristine
        self._restore = restore
        self.seed = seed
        self.shapes = shapes(plain)
        self.fingerprint = pristine.fingerprint
        self._key = jax.random.key(seed)
        self._source = source_data.SourceData(config, pristine, seed=seed)
        self._compiled = {} if compiled is None else compiled
        self._prefixes = known
        self._devices = devices
        self.team = team
        self._batches: dict[Any, list[Any]] = {}

    def batches(
        self, source: data.Source, trial: Trial, scope: str = "per_sample", place: int = 0
    ) -> list[data.DomainBatch]:
        """This process's share of the corrupted batches of a trial, made once.

        Args:
          source: the images.
          trial: which of them, and when.
          scope: of the method: a share is a range of images, of whole batches, or all of a stream.
          place: of a stream among those that go side by side.
        """
        team, size = self.team, self._config.batch_size
        plans = trial.plans
        kind = "all" if team.count == 1 else scope
        if kind == "per_sample":
            plans = shares.of_images(plans, team.index, team.count)
        elif kind == "batch":
            plans = shares.of_batches(plans, size, team.index, team.count)
        elif kind == "stream" and place % team.count != team.index:
            return []
        # Several passes over the same cells are longer streams, of more plans.
        where = (source.split, trial.sequence, trial.cells, len(trial.plans), kind)
        if where not in self._batches:
            seed = self._config.corruption_seed
            loaders = [data.Loader(source, plan, batch_size=size, seed=seed) for plan in plans]
            self._batches[where] = [trial.named(batch) for loader in loaders for batch in loader]
        return self._batches[where]

    def run(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        batches: Sequence[data.DomainBatch],
    ) -> Outcome | None:
        """Runs a method with some settings over the batches of one trial; as :meth:`run_all`."""
        found = self.run_all(name, method, settings, [batches])
        return found[0] if found else None

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

        Args:
          name: of the method.
          method: what to run.
          settings: with which settings.
          trials: this process's share of the batches of each trial.

        Returns:
          The outcomes of whole trials on the first process of a team, nothing on the others.

        Raises:
          ShareError: a trial failed on another process, or on one of several.
        """
        if self.team.count == 1:
            return self._own(name, method, settings, trials)
        try:
            own = self._own(name, method, settings, trials)
            report = b"+" + outcome_lib.pack([one and one._asdict() for one in own])
        except TRIAL_ERRORS as error:
            report = b"-" + f"{type(error).__name__}: {error}".encode()
        reports = self.team.collect(report)
        if reports is None:
            return []
        for index, report in enumerate(reports):
            if report[:1] == b"-":
                raise ShareError(f"process {index}: {report[1:].decode()}")
        return _whole(method, [outcome_lib.unpack(report[1:]) for report in reports])

    def _own(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        trials: Sequence[Sequence[data.DomainBatch]],
    ) -> list[Any]:
        """The outcomes of this process's share; None for a trial without any."""
        source_seconds = self._source.measure(name, method, settings).seconds
        outcomes: dict[int, Outcome] = {}
        places = [place for place, batches in enumerate(trials) if batches]
        if method.scope == "stream":
            # Side by side go streams whose batches have the same sizes.
            sizes = {n: tuple(len(batch.id) for batch in trials[n]) for n in places}
            most = self._parallel_streams * self._devices.count
            for size in dict.fromkeys(sizes.values()):
                equal = [place for place in places if sizes[place] == size]
                for first in range(0, len(equal), most):
                    some = equal[first : first + most]
                    made = self._streams(name, method, settings, [trials[n] for n in some])
                    outcomes.update(zip(some, made, strict=True))
        else:
            for place in places:
                outcomes[place] = self._one(name, method, settings, trials[place])
        return [
            outcomes[place]._replace(source_seconds=source_seconds) if place in outcomes else None
            for place in range(len(trials))
        ]

    def _one(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        batches: Sequence[data.DomainBatch],
    ) -> Outcome:
        def run(settings: dict[str, Any]) -> Outcome:
            results, clock = [], outcome_lib.Clock()
            for call in self._calls(method.whole_batch, batches):
                told = outcome_lib.on_host(
                    self._call(name, method, settings, self._inputs(call), clock)
                )
                for place, count in enumerate(call.counts):
                    # A whole batch is one of several results, images are the first of all.
                    here = place if method.whole_batch else slice(count)
                    output, info = jax.tree.map(lambda leaf, at=here: leaf[at], told)
                    results.append((output, outcome_lib.flags(info, count)))
            return outcome_lib.of_batches(results, batches, clock, 1)

        if self._prefixes is None or not method.traced:
            return run(settings)
        model = (self.fingerprint, self.seed)
        # Ids count from zero in every split: the images themselves say which they are.
        crcs = tuple(zlib.crc32(b.image, zlib.crc32(b.label)) for b in batches)
        return self._prefixes.outcome(name, method, settings, (model, crcs), run)

    def _calls(
        self, whole_batch: bool, batches: Sequence[data.DomainBatch]
    ) -> Iterator[spread.Call]:
        if whole_batch:
            return spread.calls_of_batches(batches, self._devices)
        # On one device all trials, short or long, have one program.
        fixed = self._devices.count == self.team.count == 1
        size = self._config.batch_size
        return spread.calls_of_images(batches, size, self._devices, fixed=fixed)

    def _inputs(self, call: spread.Call) -> tuple[Any, Any]:
        """Images and keys on the devices."""
        keys = ttt.sample_keys(self._key, call.id.reshape(-1)).reshape(call.id.shape)
        return self._devices.put((call.image, keys))

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
        # Devices without a stream repeat the last one.
        count = self._devices.padded(len(trials))
        filled = [*trials, *[trials[-1]] * (count - len(trials))]
        carry = jax.vmap(init, in_axes=None, axis_size=count)(params)
        carry = self._devices.put(carry)
        results: list[list[Any]] = [[] for _ in trials]
        clock = outcome_lib.Clock()
        for batches in zip(*filled, strict=True):
            images = np.stack([batch.image for batch in batches])
            ids = np.stack([batch.id for batch in batches])
            arguments = (carry, *self._inputs(spread.Call(images, ids, ())))
            carry, *told = self._call(name, method, settings, arguments, clock)
            told = outcome_lib.on_host(told)
            for place, result in enumerate(results):
                output, info = jax.tree.map(lambda leaf, i=place: leaf[i], told)
                result.append((output, outcome_lib.flags(info, len(batches[0].id))))
        drifts = np.asarray(_drifts(init(params).state.fast, carry.state.fast))[: len(trials)]
        return [
            outcome_lib.of_batches(result, batches, clock, len(trials))._replace(drift=float(drift))
            for result, batches, drift in zip(results, trials, drifts, strict=True)
        ]

    def _call(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        arguments: tuple[Any, ...],
        clock: outcome_lib.Clock,
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

            def compile_for(size: int) -> Any:
                program = jax.jit(spread.program(method, settings, self._devices, size))
                return program.lower(params, numbers, statistics, *arguments).compile()

            # Batches and streams have no chunks.
            size = self._config.chunk_size if method.scope == "per_sample" else 1
            most = shapes[0][0] // self._devices.count
            self._compiled[where] = chunks.compiled(compile_for, size, most)
            clock.compiling += time.perf_counter() - start
        start = time.perf_counter()
        run = self._compiled[where]
        results = jax.block_until_ready(run(params, numbers, statistics, *arguments))
        clock.seconds += time.perf_counter() - start
        return results

    def probe(
        self, batches: Sequence[data.DomainBatch], names: Iterable[str]
    ) -> dict[str, np.ndarray]:
        """Auxiliary losses ``[N]`` of the pristine model on a trial; not part of any timing.

        As of :meth:`run_all`, only the first process of a team gets them.
        """
        where = ("probe", *sorted(names))
        if where not in self._compiled:
            readings = methods_lib.probes(self._plain)
            read = ttt.source(
                lambda params, image: {name: readings[name](params, image) for name in where[1:]}
            )
            self._compiled[where] = jax.jit(ttt.batched(read, mesh=self._devices.mesh))
        params = self._pristine.restore("memory")
        parts = []
        for call in self._calls(False, batches) if batches else ():
            values, _ = self._compiled[where](params, *self._inputs(call))
            parts.append({k: np.asarray(v)[: call.counts[0]] for k, v in values.items()})
        reports = self.team.collect(outcome_lib.pack(parts))
        if reports is None:
            return {}
        parts = [part for report in reports for part in outcome_lib.unpack(report)]
        return {name: np.concatenate([part[name] for part in parts]) for name in where[1:]}


def _whole(
    method: methods_lib.Method, told: Sequence[Sequence[dict[str, np.ndarray]]]
) -> list[Outcome]:
    """The outcomes of whole trials from the shares of several processes, in their order."""
    parts = [
        [outcome_lib.from_arrays(part) for part in of_one if part]
        for of_one in zip(*told, strict=True)
    ]
    outcomes = [outcome_lib.joined(some) for some in parts]
    if method.scope != "stream":
        return outcomes
    # Processes ran different streams at the same time, which all streams share evenly.
    for name in ("seconds", "compile_seconds"):
        spent = max(sum(float(part[name]) for part in share if part) for share in told)
        outcomes = [one._replace(**{name: spent / len(outcomes)}) for one in outcomes]
    return outcomes
