"""What one set of images tells about a model and its adaptation, from one compiled program."""

import inspect
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

import ttt_jax as ttt
from experiments import choice, launch, settings as settings_lib
from experiments.settings import Settings
from experiments.tasks.images import ImageModel
from ttt_jax import budget, diagnostics, methods
from ttt_jax.task import Task

# The methods whose private steps descend one loss that is known here.
METHODS = ("ttt_rotation", "ttt_mae", "memo")
# Learning rates of a map, relative to that of the config.
FACTORS = (0.3, 1.0, 3.0, 10.0)


def candidates_of(
    config: ml_collections.ConfigDict, label: str, task: Task
) -> tuple[str, list[Settings]]:
    """What a method of the config that can be diagnosed is, and its candidates.

    Returns:
      Its name in :data:`METHODS`, and its settings.

    Raises:
      UserError: the config lacks it, or it is of another kind.
      ValueError: options that are missing or impossible.
    """
    grids = settings_lib.candidates(config, task)
    names = {known: grid[0].settings.get("method", known) for known, grid in grids.items()}
    names = {known: name for known, name in names.items() if name in METHODS}
    if label not in names:
        raise launch.UserError(
            "--method must be a method of the config with private steps on one loss "
            f"({', '.join(names) or 'none'}); got {label!r}."
        )
    grid = [candidate.settings for candidate in grids[label]]
    if "learning_rate" not in grid[0]:
        raise launch.UserError(
            f"methods.{label} has no learning_rate, around which the map lies; give it one."
        )
    return names[label], grid


def settings_of(workdir: pathlib.Path, method: str, grid: Sequence[Settings]) -> Settings:
    """The settings of a method: the only ones, or of several candidates those that adapt chose.

    Raises:
      UserError: nothing was chosen yet.
    """
    if len(grid) == 1:
        return grid[0]
    path = workdir / "selection.json"
    chosen = choice.read(path)["chosen"].get(method) if path.exists() else None
    if chosen not in grid:
        raise launch.UserError(
            f"methods.{method} has {len(grid)} candidates, and {path} chose none of them; run "
            "experiments.adapt in this work folder first, or override the options that are tuples "
            f"with one value each, as --config.methods.{method}.learning_rate='(0.01,)'."
        )
    return chosen


def rates_of(settings: Settings, wanted: Sequence[float] | None) -> tuple[float, ...]:
    """The learning rates of the map, increasing; that of the settings is always among them."""
    own = settings["learning_rate"]
    rates = [float(f"{factor * own:.6g}") for factor in FACTORS] if wanted is None else wanted
    return tuple(sorted({*rates, own}))


def auxiliary_of(
    name: str, heads: Mapping[str, Any], settings: Settings
) -> tuple[ttt.AuxLoss, Callable[[Any, jax.Array], jax.Array] | None]:
    """The auxiliary task of a method in :data:`METHODS` under all of its settings.

    Returns:
      The loss that its inner steps descend, and where there is a right answer without labels its
      accuracy ``(params, image) -> scalar``.
    """
    augment = heads[settings.get("augment", "augment")]
    if name == "ttt_mae":
        loss = ttt.losses.masked_reconstruction(
            heads["reconstruct"],
            patch=heads["patch"],
            mask_ratio=settings["mask_ratio"],
            num_masks=settings["num_masks"],
        )
        return loss, None
    if name == "memo":
        num_views = settings["num_views"]
        return ttt.losses.marginal_entropy(heads["classify"], augment, num_views=num_views), None
    loss = ttt.losses.rotation(heads["rotation"], copies=settings["copies"], augment=augment)
    return loss, diagnostics.auxiliary_accuracy(heads["rotation"])


class Program:
    """The measurements of a set of images, compiled for the first one of each."""

    def __init__(
        self,
        network: ImageModel,
        method: str,
        settings: Settings,
        learning_rates: Sequence[float],
        chunk_size: int | str | None,
    ):
        """What to measure.

        Args:
          network: the model.
          method: one of :data:`METHODS`, whose loss the steps descend.
          settings: of the method; those that are left out have its defaults.
          learning_rates: of the map, L of them; ``settings["learning_rate"]`` among them.
          chunk_size: private copies of the model in flight at once; as many as fit where it is no
            number, or 0.
        """
        parameters = inspect.signature(getattr(methods, method)).parameters.values()
        defaults = {p.name: p.default for p in parameters if isinstance(p.default, int | float)}
        settings = {"select": "all", **defaults, **settings}
        heads = network.heads(norm=settings.get("prior", "running"), private=True)
        loss, accuracy = auxiliary_of(method, heads, settings)
        select = settings_lib.selection(settings["select"])

        def make(learning_rate: jax.Array) -> ttt.Adapter:
            optimizer = settings_lib.optimizer(settings | {"learning_rate": learning_rate})
            return ttt.gradient_adapter(loss, optimizer, select=select)

        self._probe = diagnostics.probe(
            ttt.unbatched(heads["classify"]), loss, make,
            select=select, learning_rates=learning_rates, num_steps=settings["num_steps"],
            accuracy=accuracy,
        )  # fmt: skip
        self._rates, self._chunk_size = learning_rates, chunk_size
        self._rate_index = list(learning_rates).index(settings["learning_rate"])
        self._compiled: Any = None

    def __call__(
        self, params: Any, images: jax.Array, labels: jax.Array, keys: jax.Array
    ) -> dict[str, Any]:
        """The measured fields of a row; see :func:`ttt_jax.diagnostics.summary`.

        "Before" is the model that the steps start from, under the settings' ``prior`` if they
        have one.

        Args:
          params: of the model.
          images: ``[N, H, W, C]``, N the same in every call.
          labels: ``[N]``.
          keys: ``[N]``.

        Raises:
          ValueError: the settings adapt no parameter that classifier and auxiliary head share.
        """
        arguments = (params, images, labels, keys)
        start = time.perf_counter()
        if self._compiled is None:
            self._compiled = self._fitting(arguments)
        compiled = time.perf_counter()
        values = jax.block_until_ready(self._compiled(*arguments))
        done = time.perf_counter()
        # JSON has no number that is not finite.
        row = jax.tree.map(
            lambda value: value if math.isfinite(value) else None,
            {name: np.asarray(value).tolist() for name, value in values.items()},
        )
        for rule in ("label_free", "oracle"):
            row[f"{rule}_learning_rate"] = self._rates[row.pop(f"{rule}_rate_index")]
        return row | {"seconds": done - compiled, "compile_seconds": compiled - start}

    def _fitting(self, arguments: tuple[Any, ...]) -> Any:
        def compile_for(size: int) -> Any:
            # Each learning rate has a copy of its own.
            run = ttt.batched(self._probe, chunk_size=max(1, size // len(self._rates)))

            def measure(params: Any, images: Any, labels: Any, keys: jax.Array) -> Any:
                seen, info = run(params, (images, labels), keys)
                return diagnostics.summary(seen, info, labels, rate_index=self._rate_index)

            return jax.jit(measure).lower(*arguments).compile()

        if isinstance(self._chunk_size, int) and self._chunk_size:
            return compile_for(self._chunk_size)
        most = len(arguments[1]) * len(self._rates)
        return budget.largest_chunk(compile_for, budget.free_bytes(), most=most).compiled
