"""Which images come when: streams over one domain, or over a sequence of them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np

from experiments import launch
from ttt_jax import data
from ttt_jax.task import Examples


@dataclasses.dataclass(frozen=True)
class Order:
    """One stream of images; a state that is carried along it is pristine at its start alone.

    Attributes:
      source: the images.
      plans: one after the other. Each has batches of its own, so that the statistics of a batch
        are never those of two domains unless a plan itself mixes them.
      sequence: that of ``adapt.sequence``; ``"none"`` for a domain by itself.
      batch_size: images per batch.
      seed: of the corruptions.
      domain: what the domain is called where that is not what the plans say: images that are not
        corrupted are "clean" there, whatever domain they are of.
    """

    source: data.Source
    plans: tuple[data.streams.Plan, ...]
    sequence: str
    batch_size: int
    seed: int
    domain: str | None = None

    @property
    def name(self) -> str:
        """The domain, or the kind of sequence."""
        domains = dict.fromkeys(np.concatenate([plan.domain for plan in self.plans]).tolist())
        if self.domain is not None:
            return self.domain
        return next(iter(domains)) if len(domains) == 1 else self.sequence

    @property
    def num_cells(self) -> int:
        """How many pairs of a domain and a severity it has, each of which is a row."""
        plans = (
            zip(plan.domain.tolist(), plan.severity.tolist(), strict=True) for plan in self.plans
        )
        return len({pair for pairs in plans for pair in pairs})

    def __iter__(self) -> Iterator[Examples]:
        for plan in self.plans:
            loader = data.Loader(self.source, plan, batch_size=self.batch_size, seed=self.seed)
            for batch in loader:
                count = len(batch.id)
                domain = batch.domain if self.domain is None else np.full(count, self.domain)
                tags = {"domain": domain, "severity": batch.severity}
                tags["sequence"] = np.full(count, self.sequence)
                yield Examples(batch.id, batch.image, batch.label, tags)


def names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The names of the streams of both roles, as :func:`streams` gives them."""
    clean = launch.setting(config, "data.domain")
    if launch.setting(config, "adapt.corruptions") == "none":
        return tuple(dict.fromkeys((clean, "clean")))
    if (sequence := launch.setting(config, "adapt.sequence")) != "none":
        return clean, sequence
    corruptions = data.corruptions
    return clean, *corruptions.CORRUPTIONS, *corruptions.VALIDATION_CORRUPTIONS


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses orders that exclude each other; each by itself is of the table of keys.

    Raises:
      ValueError: naming them.
    """
    corruptions = launch.setting(config, "adapt.corruptions")
    stream, sequence = config.adapt.stream, launch.setting(config, "adapt.sequence")
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


def streams(
    config: ml_collections.ConfigDict, source: data.Source, role: str, seed: int
) -> Mapping[str, Order]:
    """The streams of a role by name.

    Args:
      config: see ``experiments/configs``.
      source: the validation split, or the test split for ``"reported"``.
      role: ``"validation"``: the validation corruptions; ``"choosing"``: the same, in
        ``adapt.selection_passes`` passes, each in an order of its own: what a stream of 10,000
        images does to a method does not show on the 1,000 of a validation split;
        ``"reported"``: the images as they are, and the corruptions.
      seed: of the order.
    """
    if role == "reported":
        orders = [_clean(config, source, seed)]
        if (name := launch.setting(config, "data.domain")) != "clean":
            orders[0] = dataclasses.replace(orders[0], domain=name)
        if launch.setting(config, "adapt.corruptions") != "none":
            orders += _over(config, source, data.corruptions.CORRUPTIONS, seed)
    else:
        passes = launch.setting(config, "adapt.selection_passes") if role == "choosing" else 1
        rounds = [_validation(config, source, seed + 1000 * number) for number in range(passes)]
        orders = [
            dataclasses.replace(
                same[0], plans=tuple(plan for order in same for plan in order.plans)
            )
            for same in zip(*rounds, strict=True)
        ]
    return {order.name: order for order in orders}


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


def _validation(config: Any, source: data.Source, seed: int) -> list[Order]:
    if launch.setting(config, "adapt.corruptions") == "none":
        return [_clean(config, source, seed)]
    return _over(config, source, data.corruptions.VALIDATION_CORRUPTIONS, seed)


def _order(config: Any, source: data.Source, sequence: str, *plans: data.streams.Plan) -> Order:
    return Order(source, plans, sequence, config.adapt.batch_size, config.adapt.corruption_seed)


def _clean(config: Any, source: data.Source, seed: int) -> Order:
    """The images as they are: always a stream by itself."""
    return _order(config, source, "none", _plan(config.adapt, source, "clean", 0, seed))


def _over(config: Any, source: data.Source, corruptions: tuple[str, ...], seed: int) -> list[Order]:
    """The streams over some corruptions: one each, or a single ``adapt.sequence`` of all."""
    adapt, sequence = config.adapt, launch.setting(config, "adapt.sequence")
    if sequence == "gradual":
        plans = [data.streams.gradual(source, name, seed=seed) for name in corruptions]
    elif sequence == "mixed":
        # Each domain in an order of its own: else the stream would show the versions of one
        # image close together.
        parts = [
            _plan(adapt, source, name, adapt.severity, seed * len(corruptions) + number)
            for number, name in enumerate(corruptions)
        ]
        plans = [data.streams.mixed(parts, seed=seed)]
    else:
        plans = [_plan(adapt, source, name, adapt.severity, seed) for name in corruptions]
    if sequence == "none":
        return [_order(config, source, sequence, plan) for plan in plans]
    return [_order(config, source, sequence, *plans)]


def _plan(
    adapt: Any, source: data.Source, domain: str, severity: int, seed: int
) -> data.streams.Plan:
    """The order of a domain's images, as ``adapt.stream`` says."""
    options: dict[str, Any] = {"seed": seed, "domain": domain, "severity": severity}
    if adapt.stream == "dirichlet":
        return data.streams.dirichlet(source, gamma=adapt.dirichlet_gamma, **options)
    plan = {"shuffled": data.streams.shuffled, "sorted_by_label": data.streams.sorted_by_label}
    return plan[adapt.stream](source, **options)
