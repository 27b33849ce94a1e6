"""Pictures of instances: as they are, shifted, and what is predicted before and after."""

import base64
import io
import pathlib

import numpy as np
import PIL.Image

from experiments import launch
from experiments.report.read import ReportError

_WIDTH = 96


_NAMES = ("clean", "shifted", "domain", "label", "before", "after")


def examples(path: pathlib.Path, said: list[str]) -> list[dict[str, str]]:
    """Returns the instances in ``examples.npz``; none where there is no such file.

    Args:
      path: arrays ``clean`` and ``shifted`` [K, H, W, C] in [0, 1], and ``label``, ``before``,
        ``after``, ``domain`` [K]. Images are returned as PNG files in ``data:`` addresses.
      said: notes, to which a damaged file is added.

    Raises:
      ReportError: an array is missing.
    """
    if not path.exists():
        return []
    try:
        held = launch.read_npz(path, "Its pictures are not shown; remove it.")
    except launch.UserError as error:
        said.append(str(error))
        return []
    missing = ", ".join(name for name in _NAMES if name not in held)
    if missing:
        raise ReportError(f"{path}: needs the arrays {missing}; it has {[*held]}.")
    columns = [map(_png if held[name].ndim == 4 else str, held[name]) for name in _NAMES]
    return [dict(zip(_NAMES, values, strict=True)) for values in zip(*columns, strict=True)]


def _png(image: np.ndarray) -> str:
    pixels = np.clip(np.rint(255 * np.asarray(image, np.float32)), 0, 255).astype(np.uint8)
    picture = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    height = round(_WIDTH * picture.height / picture.width)
    held = io.BytesIO()
    picture.resize((_WIDTH, height), PIL.Image.Resampling.NEAREST).save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
