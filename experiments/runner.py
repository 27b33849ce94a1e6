"""Runs one method over one domain: compile once, restore between batches, measure."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import ttt_jax as ttt
from experiments import methods as methods_lib
from experiments.problem import Problem
from ttt_jax import checkpoint, data

# What makes a trial a failed row instead of ending the run.
TRIAL_ERRORS = (ValueError, TypeError, FloatingPointError, jax.errors.JaxRuntimeError)


class Outcome(NamedTuple):
    """What a method did on one domain.

    Attributes:
      logits: float32 ``[N, classes]``, or ``[N, S + 1, classes]`` for a traced method.
      aux: float32 ``[N]`` or ``[N, S + 1]``, the probe of the auxiliary loss, or None.
      ok: bool ``[N]``.
      resets: how many resets fired.
      label: int32 ``[N]``.
      seconds: time of the compiled calls.
      compile_seconds: time to trace and compile, 0 where the program was there already.
    """

    logits: np.ndarray
    aux: np.ndarray | None
    ok: np.ndarray
    resets: int
    label: np.ndarray
    seconds: float
    compile_seconds: float

    @property
    def final(self) -> np.ndarray:
        """Logits of the prediction that counts, ``[N, classes]``."""
        return self.logits if self.logits.ndim == 2 else self.logits[:, -1]

    def wrong(self) -> np.ndarray:
        """Bool ``[N]``."""
        return self.final.argmax(-1) != self.label


def plan_for(
    adapt: ml_collections.ConfigDict, source: data.Source, domain: str, severity: int, seed: int
) -> data.streams.Plan:
    """The order of a domain's images, as ``adapt.stream`` says.

    Raises:
      ValueError: an unknown stream.
    """
    where: dict[str, Any] = {"domain": domain, "severity": severity}
    plans = {
        "shuffled": lambda: data.streams.shuffled(source, seed=seed, **where),
        "sorted_by_label": lambda: data.streams.sorted_by_label(source, seed=seed, **where),
        "dirichlet": lambda: data.streams.dirichlet(
            source, gamma=adapt.dirichlet_gamma, seed=seed, **where
        ),
    }
    if adapt.stream not in plans:
        raise ValueError(f"adapt.stream must be one of {list(plans)}; got {adapt.stream!r}.")
    return plans[adapt.stream]()


class Runner:
    """Evaluates methods of one seed, from one pristine checkpoint."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        plain: Problem,
        pristine: checkpoint.Pristine,
        *,
        seed: int,
        restore: str,
    ):
        self._config = config.adapt
        self._plain = plain
        self._pristine = pristine
        self._restore = restore
        self.seed = seed
        self.fingerprint = pristine.fingerprint
        self._key = jax.random.key(seed)
        self._compiled: dict[Any, Any] = {}
        self._batches: dict[Any, list[Any]] = {}

    def batches(self, source: data.Source, domain: str, severity: int) -> list[data.DomainBatch]:
        """The corrupted batches of a domain, made once."""
        where = (source.split, domain, severity)
        if where not in self._batches:
            loader = data.Loader(
                source,
                plan_for(self._config, source, domain, severity, self.seed),
                batch_size=self._config.batch_size,
                seed=self._config.corruption_seed,
            )
            self._batches[where] = list(loader)
        return self._batches[where]

    def run(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        batches: Iterable[data.DomainBatch],
    ) -> Outcome:
        """Runs a method with some settings over the batches of one domain."""
        static = tuple(sorted((k, v) for k, v in settings.items() if k not in methods_lib.TRACED))
        numbers = {k: jnp.float32(v) for k, v in settings.items() if k in methods_lib.TRACED}
        carry = None
        results, infos, labels, seconds, compiling = [], [], [], 0.0, 0.0
        for batch in batches:
            params = self._pristine.restore(self._restore)
            count = len(batch.id)
            images, ids = _padded(batch, self._config.batch_size)
            keys = ttt.sample_keys(self._key, ids)
            if method.scope == "stream" and carry is None:
                carry = jax.jit(method.build(settings).init)(params)
            arguments = (params, carry, images, keys, numbers)
            where = (name, static, tuple(sorted(numbers)), images.shape)
            if where not in self._compiled:
                start = time.perf_counter()
                program = jax.jit(self._program(method, settings))
                self._compiled[where] = program.lower(*arguments).compile()
                compiling += time.perf_counter() - start
            start = time.perf_counter()
            carry, output, info = jax.block_until_ready(self._compiled[where](*arguments))
            seconds += time.perf_counter() - start
            results.append(jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n], output))
            infos.append(jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n], info))
            labels.append(batch.label)
        output, info = jax.tree.map(
            lambda *parts: np.concatenate(parts), *zip(results, infos, strict=True)
        )
        return Outcome(
            logits=output["logits"],
            aux=output.get("aux"),
            ok=info.ok,
            resets=int(info.reset.sum()) if isinstance(info, ttt.StreamInfo) else 0,
            label=np.concatenate(labels),
            seconds=seconds,
            compile_seconds=compiling,
        )

    def _program(self, method: methods_lib.Method, settings: dict[str, Any]) -> Any:
        """``(params, carry, images, keys, numbers) -> (carry, output, info)``.

        ``numbers`` are the settings that may be traced, so candidates that differ in these alone
        share one compiled program.
        """

        def per_sample(params: Any, carry: Any, images: Any, keys: Any, numbers: Any) -> Any:
            predict = method.build(settings | numbers)
            run = ttt.batched(predict, chunk_size=self._config.chunk_size)
            return (carry, *run(params, images, keys))

        def stream(params: Any, carry: Any, images: Any, keys: Any, numbers: Any) -> Any:
            step = method.build(settings | numbers).step
            carry, (output, info) = jax.lax.scan(
                lambda carry, pair: step(params, carry, *pair), carry, (images, keys)
            )
            return carry, output, info

        return stream if method.scope == "stream" else per_sample

    def probe(self, batches: Iterable[data.DomainBatch]) -> dict[str, float]:
        """Mean auxiliary losses of the pristine model on a domain; not part of any timing."""
        if "probe" not in self._compiled:
            readings = methods_lib.probes(self._plain)

            def read(params: Any, images: jax.Array) -> dict[str, jax.Array]:
                return {
                    name: jax.vmap(fn, in_axes=(None, 0))(params, images)
                    for name, fn in readings.items()
                }

            self._compiled["probe"] = jax.jit(read)
        params = self._pristine.restore("memory")
        parts = []
        for batch in batches:
            images, _ = _padded(batch, self._config.batch_size)
            values = self._compiled["probe"](params, images)
            parts.append({k: np.asarray(v)[: len(batch.id)] for k, v in values.items()})
        return {name: float(np.concatenate([p[name] for p in parts]).mean()) for name in parts[0]}


def _padded(batch: data.DomainBatch, size: int) -> tuple[jax.Array, np.ndarray]:
    """Repeats the last example up to ``size``, so that every batch has one compiled program."""
    places = np.minimum(np.arange(size), len(batch.id) - 1)
    return jnp.asarray(batch.image[places]), batch.id[places]
