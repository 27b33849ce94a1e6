"""What a method is: how to build it, its grid of settings, its cost."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

# Settings that a program takes as arguments; all others are part of what is compiled.
TRACED = ("learning_rate", "memo_weight", "prior", "reset_below")

Settings = dict[str, Any]


class Measurement(NamedTuple):
    """What a method measures of the source data before it sees a test image.

    Attributes:
      fn: ``fn(params, images[N, H, W, C]) -> pytree`` of means over the images, or of one row
        for each.
      batch_size: images per call.
      num_images: how many training images are drawn; None for all.
      reduce: ``"mean"`` or ``"concatenate"``, as in ``ttt_jax.source_statistics``.
    """

    fn: Callable[[Any, Any], Any]
    batch_size: int
    num_images: int | None = None
    reduce: str = "mean"


class Method(NamedTuple):
    """One way to predict, over a grid of settings.

    Attributes:
      scope: ``per_sample``, ``batch`` or ``stream``.
      build: ``build(settings) -> Predictor`` (or ``Stream``); see :data:`TRACED`. With a
        measurement it is ``build(settings, statistics)``, with what was measured.
      grid: settings per candidate.
      cost: ``cost(settings) -> (forwards, backwards)`` per sample of the method itself, without
        probes.
      probe: the auxiliary loss of its ``aux`` output, a key of ``outputs.probes``, or None.
      traced: whether the logits have a leading axis over inner steps.
      reset: when a sample's, batch's or stream's state is dropped.
      predict: ``"before"`` or ``"after"`` the update; None where nothing adapts. A setting of
        that name comes first.
      whole_batch: whether one instance is a whole batch of images, as in scope ``batch`` and in
        a stream of batches.
      measurement: ``measurement(settings)``, the source statistics that the method needs; None
        for none. They are measured once for every seed, outside all timings.
    """

    scope: str
    build: Callable[..., Any]
    grid: tuple[Settings, ...]
    cost: Callable[[Settings], tuple[int, int]]
    probe: str | None = None
    traced: bool = False
    reset: str | None = None
    predict: str | None = None
    whole_batch: bool = False
    measurement: Callable[[Settings], Measurement] | None = None

    def built(self, settings: Settings, statistics: Any) -> Any:
        """The predictor or stream; ``statistics`` count only where there is a measurement."""
        if self.measurement is None:
            return self.build(settings)
        return self.build(settings, statistics)


def grid_of(options: ml_collections.ConfigDict) -> tuple[Settings, ...]:
    """The product of the options that are tuples; the others are the same in every candidate.

    Raises:
      ValueError: a tuple without values.
    """
    names = list(options)
    for name in names:
        if isinstance(options[name], tuple) and not options[name]:
            raise ValueError(f"{name} lists no candidate; give it at least one value.")
    values = [v if isinstance(v, tuple) else (v,) for v in (options[name] for name in names)]
    return tuple(dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values))


def with_defaults(grid: tuple[Settings, ...], **defaults: Any) -> tuple[Settings, ...]:
    """Fills in options that a config left out, so that the rows name them too."""
    return tuple(defaults | settings for settings in grid)
