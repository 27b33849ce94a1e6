"""What a method measures of the training images before it sees a test image."""

import time
from typing import Any, NamedTuple

import jax
import ml_collections

import ttt_jax as ttt
from experiments import methods as methods_lib, problem as problem_lib
from ttt_jax import checkpoint, data


class Measured(NamedTuple):
    """Source statistics, and the seconds they took; ``((), 0.0)`` where none are needed."""

    statistics: Any
    seconds: float


class SourceData:
    """The source statistics of one seed's model, measured once for each method and settings.

    They come from the training split alone: statistics of test images would leak them.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, pristine: checkpoint.Pristine, *, seed: int
    ):
        self._config, self._pristine, self._seed = config, pristine, seed
        self._images: data.Source | None = None
        self._measured: dict[Any, Measured] = {}

    def measure(self, name: str, method: methods_lib.Method, settings: dict[str, Any]) -> Measured:
        """What ``method.measurement`` asks for; settings that are traced do not change it."""
        if method.measurement is None:
            return Measured((), 0.0)
        fixed = {k: v for k, v in settings.items() if k not in methods_lib.TRACED}
        where = (name, *sorted(fixed.items()))
        if where not in self._measured:
            wanted = method.measurement(settings)
            loader = self._loader(wanted)
            fn = jax.jit(wanted.fn)
            start = time.perf_counter()
            statistics = ttt.source_statistics(
                lambda params, batch: fn(params, batch.image),
                self._pristine.restore("memory"),
                loader,
                reduce=wanted.reduce,
            )
            jax.block_until_ready(statistics)
            self._measured[where] = Measured(statistics.value, time.perf_counter() - start)
        return self._measured[where]

    def _loader(self, wanted: methods_lib.Measurement) -> data.Loader:
        """Training images in random order, neither corrupted nor augmented."""
        if self._images is None:
            self._images = problem_lib.load_data(self._config, "train")
        plan = data.streams.shuffled(self._images, seed=self._seed)
        plan = data.streams.Plan(*(column[: wanted.num_images] for column in plan))
        return data.Loader(self._images, plan, batch_size=wanted.batch_size)
