"""Pictures of instances: as they are, shifted, and what is predicted before and after."""

import base64
import io
import pathlib
from typing import NamedTuple

import numpy as np
import PIL.Image

from experiments.report.read import ReportError

_WIDTH = 96


class Example(NamedTuple):
    """One instance; the images are PNG files as ``data:`` addresses."""

    clean: str
    shifted: str
    domain: str
    label: str
    before: str
    after: str


def examples(path: pathlib.Path) -> list[Example]:
    """Returns the instances in ``examples.npz``; none where there is no such file.

    Args:
      path: arrays ``clean`` and ``shifted`` [K, H, W, C] in [0, 1], and ``label``, ``before``,
        ``after``, ``domain`` [K].

    Raises:
      ReportError: an array is missing.
    """
    if not path.exists():
        return []
    with np.load(path, allow_pickle=False) as held:
        missing = [name for name in Example._fields if name not in held.files]
        if missing:
            raise ReportError(
                f"{path}: needs the arrays {', '.join(missing)}; it has {held.files}."
            )
        images = [[_png(image) for image in held[name]] for name in ("clean", "shifted")]
        texts = [map(str, held[name]) for name in ("domain", "label", "before", "after")]
        return [Example(*parts) for parts in zip(*images, *texts, strict=True)]


def _png(image: np.ndarray) -> str:
    pixels = np.clip(np.rint(255 * np.asarray(image, np.float32)), 0, 255).astype(np.uint8)
    picture = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    height = round(_WIDTH * picture.height / picture.width)
    held = io.BytesIO()
    picture.resize((_WIDTH, height), PIL.Image.Resampling.NEAREST).save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
