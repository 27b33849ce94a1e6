"""Streams as data: which example comes when, and under which corruption.

A :class:`Plan` holds three arrays and nothing else, so it can be sliced, saved, compared and
concatenated with NumPy. :class:`ttt_jax.data.Loader` carries it out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ttt_jax import _arguments
from ttt_jax.data import corruptions
from ttt_jax.data.sources import Source


class Plan(NamedTuple):
    """One row per step of the stream.

    Attributes:
      index: int64 ``[N]``, position in the source.
      domain: str ``[N]``, a corruption's name or ``"clean"``.
      severity: int32 ``[N]``, 1 to 5; 0 for ``"clean"``.
    """

    index: np.ndarray  # type: ignore[assignment]  # a tuple has a method of that name
    domain: np.ndarray
    severity: np.ndarray


def _plan(index: np.ndarray, domain: str, severity: int) -> Plan:
    if domain == "clean":
        if severity != 0:
            raise ValueError(f"The domain 'clean' has severity 0, not {severity!r}.")
    else:
        corruptions.check_name(domain, severity)
    count = len(index)
    return Plan(
        np.asarray(index, np.int64),
        np.full(count, domain),
        np.full(count, severity, np.int32),
    )


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@_arguments.checked()
def sequential(source: Source, *, domain: str = "clean", severity: int = 0) -> Plan:
    """Every example once, in the source's order.

    Args:
      source: the set.
      domain: ``"clean"`` or a corruption's name.
      severity: 0 for ``"clean"``, else 1 to 5.

    Raises:
      ValueError: unknown domain, or a severity that does not fit it.
    """
    return _plan(np.arange(len(source)), domain, severity)


@_arguments.checked(seed=_arguments.count(0))
def shuffled(source: Source, *, seed: int, domain: str = "clean", severity: int = 0) -> Plan:
    """Every example once, in random order: the i.i.d. stream.

    ``domain`` and ``severity`` as for :func:`sequential`; the order depends on ``seed`` alone,
    so the streams of several domains are comparable step by step.
    """
    return _plan(_rng(seed).permutation(len(source)), domain, severity)


@_arguments.checked(seed=_arguments.count(0))
def sorted_by_label(source: Source, *, seed: int, domain: str = "clean", severity: int = 0) -> Plan:
    """Every example once, one class after the other; classes and their members in random order.

    The most correlated stream there is. ``domain`` and ``severity`` as for :func:`sequential`.
    """
    rng, labels = _rng(seed), source.labels()
    groups = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    order = rng.permutation(len(groups))
    return _plan(np.concatenate([groups[k] for k in order]), domain, severity)


@_arguments.checked(
    seed=_arguments.count(0), num_slots=_arguments.integer, gamma=_arguments.number()
)
def dirichlet(
    source: Source,
    *,
    gamma: float,
    seed: int,
    num_slots: int | None = None,
    domain: str = "clean",
    severity: int = 0,
) -> Plan:
    """Every example once, with labels that come in runs: a temporally correlated stream.

    The protocol of NOTE (Gong et al. 2022, arXiv:2208.05117) and RoTTA (Yuan et al. 2023,
    arXiv:2303.13899; github.com/BIT-DA/RoTTA, ``ttasampler.py``): time is cut into slots; each
    class spreads its examples over the slots in proportions drawn from a symmetric Dirichlet
    distribution; inside a slot the classes follow one another, in random order.

    Args:
      source: the set.
      gamma: concentration, positive. Smaller is more correlated: 0.1 is RoTTA's. Even a large
        one leaves runs of ``N / (classes * num_slots)``; use :func:`shuffled` for i.i.d.
      seed: of the draw.
      num_slots: how many slots; None is RoTTA's rule, the number of classes up to 100.
      domain: as for :func:`sequential`.
      severity: as for :func:`sequential`.

    Raises:
      ValueError: ``gamma`` or ``num_slots`` is not positive, or as :func:`sequential`.
    """
    if not (np.isfinite(gamma) and gamma > 0):
        raise ValueError(
            f"gamma must be positive and finite, not {gamma!r}; smaller is more correlated."
        )
    rng, labels = _rng(seed), source.labels()
    classes = np.unique(labels)
    slots = min(len(classes), 100) if num_slots is None else num_slots
    if slots < 1:
        raise ValueError(f"num_slots must be at least 1, not {num_slots!r}.")
    pieces: list[list[np.ndarray]] = [[] for _ in range(slots)]
    for label in classes:
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(slots, gamma))
        cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
        for slot, piece in enumerate(np.split(members, cuts)):
            pieces[slot].append(piece)
    order = [slot[k] for slot in pieces for k in rng.permutation(len(slot))]
    return _plan(np.concatenate(order), domain, severity)


@_arguments.checked()
def domains_in_sequence(plans: Sequence[Plan]) -> Plan:
    """One plan after the other: the continual setting (CoTTA, arXiv:2203.13591).

    Raises:
      ValueError: no plan.
    """
    if not plans:
        raise ValueError("plans needs at least one plan, but none was given ([]).")
    return Plan(*(np.concatenate(column) for column in zip(*plans, strict=True)))


@_arguments.checked(seed=_arguments.count(0))
def mixed(plans: Sequence[Plan], *, seed: int) -> Plan:
    """Plans interleaved at random, each keeping its own inner order.

    So mixed shuffled plans are i.i.d. over domains, and mixed :func:`dirichlet` plans give the
    mixed and correlated setting.

    Raises:
      ValueError: no plan.
    """
    joined = domains_in_sequence(plans)
    turns = np.repeat(np.arange(len(plans)), [len(plan.index) for plan in plans])
    turns = _rng(seed).permutation(turns)
    order = np.empty(len(turns), np.int64)
    # The k-th turn of a plan takes its k-th row; rows of a plan lie together in `joined`.
    order[np.argsort(turns, kind="stable")] = np.arange(len(turns))
    return Plan(*(column[order] for column in joined))


@_arguments.checked(seed=_arguments.count(0))
def gradual(source: Source, domain: str, *, seed: int) -> Plan:
    """Every example once, shuffled, while severity climbs 1 to 5 and falls back to 1.

    The nine stages (1 2 3 4 5 4 3 2 1) are equally long to within one example (CoTTA's gradual
    setting, arXiv:2203.13591).

    Raises:
      ValueError: ``domain`` is no corruption.
    """
    corruptions.check_name(domain, 1)
    plan = shuffled(source, seed=seed, domain=domain, severity=1)
    stages = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1], np.int32)
    count = len(plan.index)
    return plan._replace(severity=stages[np.arange(count) * len(stages) // count])
