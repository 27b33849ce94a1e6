"""Runs whose first steps are those of shorter runs, which then need not be made.

A traced method predicts after every inner step, and step i draws the same numbers however many
follow. So the outcome of k steps is the beginning of that of more.
"""

import collections
from collections.abc import Hashable, Sequence
from typing import Any

from experiments import methods as methods_lib
from experiments.outcome import Outcome
from ttt_jax import data

_KEPT = 64
"""Outcomes that are kept, the latest ones: a few megabytes each."""


class Prefixes:
    """The longest outcomes of traced methods, by all that made them but the number of steps."""

    def __init__(self) -> None:
        self._outcomes: collections.OrderedDict[Hashable, Outcome] = collections.OrderedDict()

    def find(self, key: Hashable, num_steps: int) -> Outcome | None:
        """The outcome of that many steps, if one of as many or more is there.

        Its time is its share of the longer run's; nothing is compiled for it. None, too, where an
        image of the longer run was given up: that may have been after these steps.
        """
        longer = self._outcomes.get(key)
        if longer is None or not longer.ok.all():
            return None
        steps = longer.logits.shape[1] - 1
        if steps < num_steps:
            return None
        return longer._replace(
            logits=longer.logits[:, : num_steps + 1],
            aux=None if longer.aux is None else longer.aux[:, : num_steps + 1],
            seconds=longer.seconds * (num_steps + 1) / (steps + 1),
            compile_seconds=0.0,
        )

    def keep(self, key: Hashable, outcome: Outcome) -> None:
        """Keeps an outcome, in the place of a shorter one."""
        self._outcomes[key] = outcome
        self._outcomes.move_to_end(key)
        if len(self._outcomes) > _KEPT:
            self._outcomes.popitem(last=False)


def key_of(
    name: str,
    method: methods_lib.Method,
    settings: dict[str, Any],
    model: Hashable,
    batches: Sequence[data.DomainBatch],
) -> Hashable | None:
    """What an outcome depends on beside its number of steps; None for a method without a trace."""
    if not method.traced or "num_steps" not in settings:
        return None
    rest = tuple(sorted((k, v) for k, v in settings.items() if k != "num_steps"))
    images = tuple(
        (batch.id.tobytes(), batch.domain.tobytes(), batch.severity.tobytes()) for batch in batches
    )
    return (name, rest, model, images)
