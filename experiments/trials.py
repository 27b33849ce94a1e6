"""Which images come when: a trial is one stream, over one domain or over a sequence of them."""

from typing import Any, NamedTuple

import ml_collections
import numpy as np

from experiments import launch
from ttt_jax import data

# Of the trials; "none" takes the images as they are, such as those of a natural domain.
CORRUPTIONS = ("standard", "none")
STREAMS = ("shuffled", "sorted_by_label", "dirichlet")
SEQUENCES = ("none", "domains", "mixed", "gradual")


class Trial(NamedTuple):
    """One stream; a state that is carried along it is pristine at its start alone.

    Attributes:
      sequence: one of :data:`SEQUENCES`; ``"none"`` for a domain by itself.
      plans: run one after the other. Each has batches of its own, so that the statistics of a
        batch are never those of two domains unless a plan itself mixes them.
      name: what its domain is called where that is not what the plans say: images that are not
        corrupted are "clean" there, whatever domain they are of.
    """

    sequence: str
    plans: tuple[data.streams.Plan, ...]
    name: str | None = None

    @property
    def cells(self) -> tuple[tuple[str, int], ...]:
        """Its pairs (domain, severity), each of which becomes a row per method."""
        if self.name is not None:
            return ((self.name, 0),)
        return cells_of(
            np.concatenate([plan.domain for plan in self.plans]),
            np.concatenate([plan.severity for plan in self.plans]),
        )

    def named(self, batch: data.DomainBatch) -> data.DomainBatch:
        """A batch of its plans under the name of its domain."""
        if self.name is None:
            return batch
        return batch._replace(domain=np.full(len(batch.id), self.name))


def cells_of(domain: np.ndarray, severity: np.ndarray) -> tuple[tuple[str, int], ...]:
    """The different pairs of two columns, in order of appearance."""
    return tuple(dict.fromkeys(zip(domain.tolist(), severity.tolist(), strict=True)))


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses an order that there is not.

    Raises:
      ValueError: an unknown ``adapt.stream``, ``adapt.sequence`` or ``adapt.corruptions``, two
        that exclude each other, a severity that there is not, or fewer than one of
        ``adapt.batch_size``, ``adapt.parallel_streams`` or ``adapt.selection_passes``.
    """
    for name, least in (("batch_size", 1), ("chunk_size", 0), ("corruption_seed", 0)):
        if config.adapt[name] < least:
            raise ValueError(f"adapt.{name} must be at least {least}; got {config.adapt[name]}.")
    corruptions = launch.setting(config, "adapt.corruptions")
    if corruptions != "none":
        data.corruptions.check_name(data.corruptions.CORRUPTIONS[0], config.adapt.severity)
    if corruptions not in CORRUPTIONS:
        raise ValueError(
            f"adapt.corruptions must be one of {list(CORRUPTIONS)}; got {corruptions!r}."
        )
    parallel = launch.setting(config, "adapt.parallel_streams")
    if parallel < 1:
        raise ValueError(f"adapt.parallel_streams must be at least 1; got {parallel}.")
    passes = launch.setting(config, "adapt.selection_passes")
    if passes < 1:
        raise ValueError(f"adapt.selection_passes must be at least 1; got {passes}.")
    stream, sequence = config.adapt.stream, launch.setting(config, "adapt.sequence")
    if stream not in STREAMS:
        raise ValueError(f"adapt.stream must be one of {list(STREAMS)}; got {stream!r}.")
    if sequence not in SEQUENCES:
        raise ValueError(f"adapt.sequence must be one of {list(SEQUENCES)}; got {sequence!r}.")
    if sequence != "none" and corruptions == "none":
        raise ValueError(
            "adapt.sequence is a sequence of corruptions and needs adapt.corruptions='standard'; "
            f"got {sequence!r} with 'none'."
        )
    if sequence == "gradual" and stream != "shuffled":
        raise ValueError(
            "adapt.sequence='gradual' has an order of its own and needs adapt.stream='shuffled'; "
            f"got {stream!r}."
        )


def plan_for(
    adapt: ml_collections.ConfigDict, source: data.Source, domain: str, severity: int, seed: int
) -> data.streams.Plan:
    """The order of a domain's images, as ``adapt.stream`` says."""
    where: dict[str, Any] = {"seed": seed, "domain": domain, "severity": severity}
    if adapt.stream == "dirichlet":
        return data.streams.dirichlet(source, gamma=adapt.dirichlet_gamma, **where)
    plan = {"shuffled": data.streams.shuffled, "sorted_by_label": data.streams.sorted_by_label}
    return plan[adapt.stream](source, **where)


def first_images(
    config: ml_collections.ConfigDict,
    source: data.Source,
    domain: str,
    severity: int,
    count: int,
    seed: int,
) -> data.DomainBatch:
    """The first images of the shuffled split as one batch: the same ones under every corruption.

    Args:
      config: its ``adapt.corruption_seed`` draws the corruptions.
      source: the split.
      domain: a corruption; what the images are called where they are left as they are.
      severity: 1 to 5; 0 leaves the images as they are.
      count: how many images.
      seed: of the order.
    """
    corruption = domain if severity else "clean"
    plan = data.streams.shuffled(source, seed=seed, domain=corruption, severity=severity)
    plan = data.streams.Plan(*(column[:count] for column in plan))
    loader = data.Loader(source, plan, batch_size=count, seed=config.adapt.corruption_seed)
    return next(iter(loader))


def checked(config: ml_collections.ConfigDict, source: data.Source, seed: int) -> list[Trial]:
    """The trials of the validation split: its corruptions, or the images as they are."""
    if launch.setting(config, "adapt.corruptions") == "none":
        return [clean(config, source, seed)]
    return over(config, source, data.corruptions.VALIDATION_CORRUPTIONS, seed)


def choosing(config: ml_collections.ConfigDict, source: data.Source, seed: int) -> list[Trial]:
    """The trials that choose settings: those of :func:`checked`, one after the other.

    A state that is carried along does not start anew with ``adapt.selection_passes``: what a
    stream of 10,000 images does to a method does not show on the 1,000 of a validation split.
    """
    passes = launch.setting(config, "adapt.selection_passes")
    # Each pass in an order of its own.
    rounds = [checked(config, source, seed + 1000 * number) for number in range(passes)]
    return [
        same[0]._replace(plans=tuple(plan for trial in same for plan in trial.plans))
        for same in zip(*rounds, strict=True)
    ]


def reported(config: ml_collections.ConfigDict, source: data.Source, seed: int) -> list[Trial]:
    """The trials that are reported: the images as they are, and the corruptions if any."""
    plain = clean(config, source, seed)
    name = launch.setting(config, "data.domain")
    if name != "clean":
        plain = plain._replace(name=name)
    if launch.setting(config, "adapt.corruptions") == "none":
        return [plain]
    return [plain, *over(config, source, data.corruptions.CORRUPTIONS, seed)]


def clean(config: ml_collections.ConfigDict, source: data.Source, seed: int) -> Trial:
    """The images as they are: always a stream by itself."""
    return Trial("none", (plan_for(config.adapt, source, "clean", 0, seed),))


def over(
    config: ml_collections.ConfigDict, source: data.Source, corruptions: tuple[str, ...], seed: int
) -> list[Trial]:
    """The trials over some corruptions: one each, or a single ``adapt.sequence`` of all."""
    check(config)
    adapt, sequence = config.adapt, launch.setting(config, "adapt.sequence")
    if sequence == "gradual":
        plans = [data.streams.gradual(source, name, seed=seed) for name in corruptions]
    elif sequence == "mixed":
        # Each domain in an order of its own: else the stream would show the versions of one
        # image close together.
        parts = [
            plan_for(adapt, source, name, adapt.severity, seed * len(corruptions) + place)
            for place, name in enumerate(corruptions)
        ]
        plans = [data.streams.mixed(parts, seed=seed)]
    else:
        plans = [plan_for(adapt, source, name, adapt.severity, seed) for name in corruptions]
    if sequence == "none":
        return [Trial(sequence, (plan,)) for plan in plans]
    return [Trial(sequence, tuple(plans))]
