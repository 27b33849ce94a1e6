"""What a package of an extra is called when it is missing."""

import importlib
from typing import Any

__all__ = ["load"]


def load(module: str, extra: str) -> Any:
    """The imported module, which one of the extras of ``ttt_jax`` installs.

    Called where the module is used, so that importing ``ttt_jax`` never needs an extra.

    Args:
      module: the dotted name to import, such as ``"scipy.ndimage"``.
      extra: the extra that installs it.

    Raises:
      ImportError: the module's package is not installed; the message names the extra. An error
        inside an installed package is passed on as it is.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{module} is needed here and not installed; "
            f"it comes with the extra {extra!r}: pip install 'ttt_jax[{extra}]'."
        ) from error
