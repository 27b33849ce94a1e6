"""One piece of a sweep's work, as its plan names it; apart, so that reading a plan needs no jax."""

import pathlib
from typing import NamedTuple


class Unit(NamedTuple):
    """What one process does: the training of a model, or a trial.

    Attributes:
      kind: ``"model"`` or ``"trial"``.
      id: what identifies it: its settings, the code and the data.
      digest: that of its variant; of the first one, for a model that several trials share.
      needs: the id of the model that a trial adapts; None for a model.
      label: its overrides, for people.
      pack: trials of the same pack may share a process, see
        :func:`experiments.sweeping.plan.pack_key`.
    """

    kind: str
    id: str
    digest: str
    needs: str | None
    label: str
    pack: str = ""

    def folder(self, workdir: pathlib.Path) -> pathlib.Path:
        """Where everything of it is."""
        return workdir / f"{self.kind}s" / self.id
