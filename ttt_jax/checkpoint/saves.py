"""Training states on disk, by step."""

import pathlib
import shutil
import warnings
from typing import Any

from ttt_jax import _arguments
from ttt_jax.checkpoint import store
from ttt_jax.checkpoint.errors import CheckpointError


class Saves:
    """The states of one training: the newest is kept, older ones go once it is complete.

    Args:
      folder: of this training alone; made by the first save, as ``folder/step_STEP``.
    """

    @_arguments.checked(folder=_arguments.path)
    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def _saves(self) -> list[tuple[int, pathlib.Path]]:
        if not self._folder.is_dir():
            return []
        saves = [path for path in self._folder.iterdir() if path.name.startswith("step_")]
        return sorted((int(path.name.removeprefix("step_")), path) for path in saves)

    def load(self, like: Any) -> tuple[int, Any]:
        """The newest state that reads back complete with its step, or ``(0, like)``.

        Warns of each newer one that does not.

        Args:
          like: a state of the layout that is asked for.
        """
        for step, path in reversed(self._saves()):
            try:
                return step, store.load(path, like=like).params
            except CheckpointError as error:
                warnings.warn(
                    f"The state {path} cannot be used, so an older one is: {error}", stacklevel=2
                )
        return 0, like

    def save(self, step: int, state: Any) -> None:
        """Saves a state; a killed process leaves this one or the one before.

        Args:
          step: its number, larger than those before.
          state: any pytree of arrays.
        """
        target = self._folder / f"step_{step}"
        # One of this step could not be used, or it would not be made again.
        shutil.rmtree(target, ignore_errors=True)
        older = self._saves()
        store.save(target, state)
        for _, path in older:
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Removes the folder, such as at the end of the training."""
        shutil.rmtree(self._folder, ignore_errors=True)
