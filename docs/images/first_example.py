"""Draws the picture of the README from the model and the digits that ship with the package.

Command: ``python docs/images/first_example.py``; half a minute on two CPU cores.

Runs the step of the README's example on all digits. Shown are the first five that the adapted model
gets right and the source model does not, then the first with which it is the other way around; the
caption says how many there are of each.
"""

import pathlib

import jax
import numpy as np
import optax
from PIL import Image, ImageDraw, ImageFont

import ttt_jax as ttt
from ttt_jax import data, models
from ttt_jax.views.image import shift

_FILE = pathlib.Path(__file__).with_suffix(".png")
_SIDE, _GAP, _LEFT, _LINE = 112, 16, 150, 34
_INK, _RIGHT, _WRONG = "#222222", "#1b7837", "#b2182b"


def predictions(digits: data.DemoDigits) -> tuple[np.ndarray, np.ndarray]:
    """The classes that the source model and the model adapted by MEMO name, ``[N]`` each."""
    net, params = models.demo()
    classify = models.from_linen(net, norm=16)
    adapter = ttt.gradient_adapter(
        ttt.losses.marginal_entropy(classify, shift(1), num_views=32),
        optax.sgd(0.03),
        select=ttt.select.everything(),
    )
    predict = ttt.episodic(adapter, ttt.unbatched(classify), num_steps=1)
    keys = ttt.sample_keys(jax.random.key(0), digits.id)
    after, _ = jax.jit(ttt.batched(predict))(params, digits.image, keys)
    before = jax.jit(models.from_linen(net))(params, digits.image)
    return np.asarray(before).argmax(-1), np.asarray(after).argmax(-1)


def _tile(image: np.ndarray) -> Image.Image:
    pixels = np.rint(255 * (1 - image[..., 0])).astype(np.uint8)
    return Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)


def picture(digits: data.DemoDigits, before: np.ndarray, after: np.ndarray) -> Image.Image:
    """The picture: one column per digit, with both images and both predictions."""
    source_right, adapted_right = before == digits.label, after == digits.label
    turned_right = np.flatnonzero(~source_right & adapted_right)
    turned_wrong = np.flatnonzero(source_right & ~adapted_right)
    shown = [*turned_right[:5], *turned_wrong[:1]]
    top = [_GAP, 2 * _GAP + _SIDE, 3 * _GAP + 2 * _SIDE, 3 * _GAP + 2 * _SIDE + _LINE]
    size = _LEFT + len(shown) * (_SIDE + _GAP), top[3] + 2 * _LINE + _GAP
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(20)
    for name, y in zip(("clean", "blurred"), top, strict=False):
        draw.text((_GAP, y + _SIDE // 2 - 12), name, _INK, font)
    for name, y in zip(("before", "after MEMO"), top[2:], strict=True):
        draw.text((_GAP, y), name, _INK, font)
    for column, index in enumerate(shown):
        x = _LEFT + column * (_SIDE + _GAP)
        page.paste(_tile(digits.clean[index]), (x, top[0]))
        page.paste(_tile(digits.image[index]), (x, top[1]))
        for y, named in zip(top[2:], (before[index], after[index]), strict=True):
            color = _RIGHT if named == digits.label[index] else _WRONG
            draw.text((x + _SIDE // 2 - 6, y), str(named), color, font)
    caption = (
        f"of {len(before)}: {len(turned_right)} turned right, {len(turned_wrong)} turned wrong"
    )
    draw.text((_GAP, top[3] + _LINE + 6), caption, _INK, font)
    return page


def main() -> None:
    """Writes ``docs/images/first_example.png``."""
    digits = data.demo()
    picture(digits, *predictions(digits)).quantize(64).save(_FILE, optimize=True)


if __name__ == "__main__":
    main()
