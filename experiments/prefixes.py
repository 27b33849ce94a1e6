"""Runs whose first steps are those of shorter runs, which then need not be made.

A traced method predicts after every inner step, and step i draws the same numbers however many
follow. So the outcome of k steps is the beginning of that of more, up to rounding: programs of
different lengths are compiled differently. That bits never depend on what a process did before, all
trials of a family take the program of its longest one, also where a trial is run by itself.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from experiments import methods as methods_lib
from experiments.outcome import Outcome

_MOST_BYTES = 2**30


class Prefixes:
    """Outcomes of the longest runs of a family, for its shorter ones.

    Args:
      longest: the most steps of each method among the trials of the family.
    """

    def __init__(self, longest: Mapping[str, int]):
        self._longest = longest
        self._whole: dict[Hashable, Outcome] = {}

    def outcome(
        self,
        name: str,
        method: methods_lib.Method,
        settings: dict[str, Any],
        images: Hashable,
        run: Callable[[dict[str, Any]], Outcome],
    ) -> Outcome:
        """The outcome of a method on some images.

        Args:
          name: of the method.
          method: if it is traced, its longest run is made, once.
          settings: of the run that is asked for.
          images: what identifies the model and the images.
          run: makes the outcome of some settings.

        Returns:
          The outcome. Where an image of the longest run was given up, which may have been after
          the steps that are asked for, it is that of a run by itself.
        """
        steps = settings.get("num_steps", 0)
        longest = self._longest.get(name, 0)
        if not method.traced or longest < steps:
            return run(settings)
        full = settings | {"num_steps": longest}
        key = (name, tuple(sorted(full.items())), images)
        whole = self._whole.pop(key, None)
        if whole is None:
            whole = run(full)
            self._keep(key, whole)
        else:
            self._whole[key] = whole
            whole = whole._replace(compile_seconds=0.0)
        if steps == longest:
            return whole
        if not whole.ok.all():
            return run(settings)
        return whole._replace(
            logits=whole.logits[:, : steps + 1],
            aux=None if whole.aux is None else whole.aux[:, : steps + 1],
            seconds=whole.seconds * sum(method.cost(settings)) / sum(method.cost(full)),
            program_steps=longest,
        )

    def _keep(self, key: Hashable, outcome: Outcome) -> None:
        self._whole[key] = outcome
        while len(self._whole) > 1 and sum(map(_bytes, self._whole.values())) > _MOST_BYTES:
            del self._whole[next(iter(self._whole))]


def _bytes(outcome: Outcome) -> int:
    return outcome.logits.nbytes + (0 if outcome.aux is None else outcome.aux.nbytes)
