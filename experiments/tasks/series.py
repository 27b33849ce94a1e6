"""Forecasts of time series: a linear map from what was seen to what comes.

An instance is a window ``x [L]`` of a series; ``y [H]``, the values after it, are forecast from the
last S of the window. What may be learned at test time needs no label: each H values inside of the
window, forecast from the S before them.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import ttt_jax as ttt
from experiments.config_keys import ABSENT, NEEDED, TEXT, Key, Rule, number, whole
from ttt_jax import metrics
from ttt_jax.task import Examples, Task

_ROLES = {"train": 1, "validation": 2, "reported": 3}

# The keys that this task reads, beside those of all.
_PERIODS = Rule(
    "be a positive period for each of train, validation and reported",
    lambda value: {*value} == {"train", "validation", "reported"} and min(value.values()) > 0,
)
KEYS = {
    "data.file": Key(TEXT, "an npz file of series, '' to draw them", NEEDED),
    "data.window": Key(whole(2), "values of a window", NEEDED),
    "data.seen": Key(whole(1), "values that a forecast is made from", NEEDED),
    "data.horizon": Key(whole(1), "values that are forecast", NEEDED),
    "data.length": Key(whole(2), "values of a series that is drawn", ABSENT, ("data.file", "")),
    "data.noise": Key(number(0), "added to a series that is drawn", ABSENT, ("data.file", "")),
    "data.periods": Key(_PERIODS, "of series that are drawn", ABSENT, ("data.file", "")),
}


def task(config: ml_collections.ConfigDict) -> Task:
    """The task of a config: ``data.window`` L, ``data.seen`` S, ``data.horizon`` H, ``data.file``.

    The file is an ``npz`` with a series ``[T]`` for each of ``train``, ``validation`` and
    ``reported``, in order of time; without one the series are drawn, and those that are not for
    training change their pace.

    Raises:
      ValueError: windows shorter than S + H, or too short a series.
    """
    window, seen, horizon = config.data.window, config.data.seen, config.data.horizon
    if window < seen + horizon:
        raise ValueError(
            f"data.window must be at least data.seen + data.horizon, {seen + horizon}, so that "
            f"there are forecasts inside of it to learn from; got {window}."
        )
    inside = np.arange(window - seen - horizon + 1)[:, None] + np.arange(seen + horizon)

    def forecast(params: Any, windows: jax.Array) -> jax.Array:
        """The values ``[N, H]`` after windows ``[N, >= S]``, about the level of their last S."""
        last = windows[:, -seen:]
        level = last.mean(axis=1, keepdims=True)
        weights = params["params"]
        return (last - level) @ weights["kernel"] + weights["bias"][None] + level

    def hindcast(params: Any, windows: jax.Array) -> jax.Array:
        """Mean squared error ``[N]`` of all forecasts inside of windows ``[N, L]``."""
        parts = windows[:, inside].reshape(-1, seen + horizon)
        gaps = forecast(params, parts[:, :seen]) - parts[:, seen:]
        return jnp.square(gaps).reshape(len(windows), -1).mean(axis=1)

    def loss(params: Any, examples: Examples, key: jax.Array) -> jax.Array:
        return jnp.square(forecast(params, examples.x) - examples.y).mean()

    def streams(role: str, seed: int) -> dict[str, Any]:
        examples = _windows(config, role, seed)
        return {"series": list(ttt.task.in_batches([examples], config.adapt.batch_size))}

    def squared_error(output: Any, source: Any, examples: Examples) -> np.ndarray:
        return np.square(np.asarray(output) - examples.y).mean(axis=1)

    def worse(output: Any, source: Any, examples: Examples) -> np.ndarray:
        before = squared_error(source, source, examples)
        return squared_error(output, source, examples) > before

    return Task(
        name="series",
        init=lambda key: {
            "params": {
                "kernel": 0.1 * jax.random.normal(key, (seen, horizon)),
                "bias": jnp.zeros(horizon),
            }
        },
        heads=lambda: {"forecast": forecast, "hindcast": hindcast},
        augment=None,
        loss=loss,
        training=lambda seed: _Training(_windows(config, "train", seed), config, seed),
        streams=streams,
        metrics={"mse": metrics.mean(squared_error), "harmed": metrics.mean(worse)},
        chooses="mse",
    )


def fingerprint(config: ml_collections.ConfigDict) -> dict[str, int]:
    """The values of the series of every role."""
    return {f"series of {role}": zlib.crc32(_series(config, role, 0).tobytes()) for role in _ROLES}


def hindcasts(
    forecast: Callable[..., Any],
    hindcast: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation,
    select: ttt.Selection = ttt.select.everything(),  # noqa: B008 (immutable)
    num_steps: int = 1,
) -> ttt.Predictor:
    """Gradient steps on the forecasts inside of a window, then the forecast of what follows it.

    Args:
      forecast: model function ``(params, windows[N, L]) -> [N, H]``.
      hindcast: ``(params, windows[N, L]) -> [N]``, the error inside of each.
      optimizer: of the steps.
      select: what adapts.
      num_steps: S, static.
    """

    def loss(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return ttt.unbatched(hindcast)(params, x)

    adapter = ttt.gradient_adapter(loss, optimizer, select=select)
    return ttt.episodic(adapter, ttt.unbatched(forecast), num_steps=num_steps)


def _series(config: ml_collections.ConfigDict, role: str, seed: int) -> np.ndarray:
    """The values ``[T]`` of a role."""
    data = config.data
    if data.file:
        with np.load(data.file) as arrays:
            if role not in arrays:
                raise ValueError(
                    f"data.file needs a series named {role!r}; {data.file} has "
                    f"{', '.join(arrays) or 'none'}. Save it with np.savez({role}=...)."
                )
            return arrays[role].astype(np.float32)
    rng = np.random.default_rng((_ROLES[role], seed))
    phase = 2 * np.pi * np.arange(data.length) / data.periods[role]
    waves = np.sin(phase) + 0.5 * np.sin(3 * phase + 1)
    return (waves + data.noise * rng.normal(size=data.length)).astype(np.float32)


def _windows(config: ml_collections.ConfigDict, role: str, seed: int) -> Examples:
    """The windows of a role, one after each forecast: every value is forecast once."""
    window, horizon = config.data.window, config.data.horizon
    series = _series(config, role, seed)
    if series.ndim != 1 or len(series) < window + horizon:
        raise ValueError(
            f"the series of {role!r} must be [T] with T of at least data.window + data.horizon, "
            f"{window + horizon}; got shape {series.shape}."
        )
    both = np.lib.stride_tricks.sliding_window_view(series, window + horizon)[::horizon]
    count = len(both)
    tags = {"split": np.full(count, role)}
    return Examples(np.arange(count), both[:, :window].copy(), both[:, window:].copy(), tags)


@dataclasses.dataclass(frozen=True)
class _Training:
    """Training windows; see :class:`ttt_jax.task.TrainingData`."""

    examples: Examples
    config: Any
    seed: int

    def __iter__(self) -> Iterator[Examples]:
        return ttt.task.in_batches([self.examples], self.config.train.batch_size)

    def steps(self, start: int) -> Iterator[Examples]:
        """Random windows, the same ones at step k wherever it began."""
        step = start
        while True:
            rng = np.random.default_rng((self.seed, step))
            index = rng.integers(len(self.examples.id), size=self.config.train.batch_size)
            yield ttt.task.take(self.examples, index)
            step += 1
