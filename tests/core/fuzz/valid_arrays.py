"""Right calls of views and kernels: functions of arrays."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from tests.core.fuzz import things, use
from tests.core.fuzz.calls import Table
from ttt_jax.kernels import attention, conv, ttt_linear, ttt_mlp
from ttt_jax.views import augmix, image

TABLE = Table()
add = functools.partial(TABLE.add, traced=True)
FOLDER = pathlib.Path(tempfile.mkdtemp())
IMAGE = {"image": things.COLORS}

add("views.image.shift", image.shift, use.view, padding=1)
add("views.image.crop_flip", image.crop_flip, use.view, padding=1)
add("views.image.every_view", image.every_view, lambda v: v(things.COLORS), padding=1, flipped=True)
add(
    "views.image.resized_crop",
    image.resized_crop,
    use.view,
    min_area=0.5,
    ranges={"min_area": (0.0, 50.0)},
)
add(
    "views.image.color_jitter",
    image.color_jitter,
    use.view,
    strength=0.4,
    probability=0.8,
    ranges={"strength": (-0.1, 40.0), "probability": 80.0},
)
add(
    "views.image.grayscale",
    image.grayscale,
    use.view,
    probability=0.2,
    ranges={"probability": 20.0},
)
add(
    "views.image.chain",
    image.chain,
    use.view,
    steps=(image.flip, image.grayscale(0.2)),
    kinds={"steps": "function"},
)
add("views.image.flip", image.flip, key=things.KEY, **IMAGE)
add("views.image.luma", image.luma, allowed="image: higher rank, image: lower rank", **IMAGE)
add("views.image.adjust_color", image.adjust_color, factors=np.ones(3, np.float32), **IMAGE)
add(
    "views.image.stretch",
    image.stretch,
    corner=np.zeros(2, np.float32),
    share=np.full(2, 0.5, np.float32),
    **IMAGE,
)

DRAW = augmix.draw_steps(things.KEY)
ONE_CHAIN = jax.tree.map(lambda leaf: leaf[0], DRAW)
SCALARS = {"operation": jnp.int32(1), "level": jnp.float32(0.5), "negative": jnp.bool_(True)}
# A raw key takes seconds to compile here; flip has the same rule.
RAW = {"allowed": "key: raw"}
add("views.augmix.augmix", augmix.augmix, key=things.KEY, **IMAGE, **RAW)
add("views.augmix.draw_steps", augmix.draw_steps, key=things.KEY, **RAW)
add(
    "views.augmix.mix",
    augmix.mix,
    chains=np.stack([things.BYTES] * 3),
    weights=np.full(3, 1 / 3, np.float32),
    share=0.5,
    **IMAGE,
    kinds={"share": "number"},
    ranges={"share": 50.0},
)
add(
    "views.augmix.to_bytes",
    augmix.to_bytes,
    allowed="image: higher rank, image: lower rank",
    **IMAGE,
)
add(
    "views.augmix.apply_chain",
    augmix.apply_chain,
    pixels=things.BYTES,
    draw=ONE_CHAIN,
    kinds={"draw": "record"},
)
add("views.augmix.apply_operation", augmix.apply_operation, pixels=things.BYTES, **SCALARS)
add("views.augmix.value_tables", augmix.value_tables, pixels=things.BYTES, level=jnp.float32(0.5))
add(
    "views.augmix.affine_matrices",
    augmix.affine_matrices,
    height=8,
    width=8,
    level=jnp.float32(0.5),
    sign=jnp.int32(1),
)
add("views.augmix.warp", augmix.warp, pixels=things.BYTES, matrix=np.eye(2, 3, dtype=np.float32))

HEADS = dict.fromkeys(("query", "value"), np.ones((1, 4, 2, 8), np.float32))
HEADS["key"] = np.ones((1, 4, 2, 8), np.float32)
ARRAYS = {"key": "array"}
add("kernels.attention.attend", attention.attend, **HEADS, form="xla", kinds=ARRAYS)
add("kernels.attention.products", attention.products, **HEADS, kinds=ARRAYS)
add(
    "kernels.attention.flash",
    attention.flash,
    **HEADS,
    implementation="xla",
    kinds=ARRAYS | {"implementation": "text"},
)
add("kernels.attention.fits", attention.fits, traced=False, tokens=16, head_size=16)
add(
    "kernels.attention.form_of",
    attention.form_of,
    traced=False,
    attention="xla",
    dtype=jnp.float32,
    kinds={"dtype": "record"},
    allowed="dtype: none",
)
KERNEL = np.ones((3, 3, 3, 16), np.float32)
add(
    "kernels.conv.conv3x3",
    conv.conv3x3,
    images=things.COLORS[None],
    kernel=KERNEL,
    ranges={"stride": 3},
)
add(
    "kernels.conv.stem",
    conv.stem,
    images=np.ones((1, 16, 16, 3), np.float32),
    kernel=KERNEL,
    only_refusals=True,
)
LAYER = conv.Layer(*(np.ones(s, np.float32) for s in ((16,), (16,), (3, 3, 16, 16))))
MAPS = conv.Maps(np.ones((1, 256, 16), np.float32), np.ones((1, 2, 16), np.float32), 16, 16)
add(
    "kernels.conv.block",
    conv.block,
    maps=MAPS,
    first=LAYER,
    second=LAYER,
    stride=1,
    groups=4,
    only_refusals=True,
    ranges={"stride": 3, "groups": 5},
    kinds={"maps": "record", "first": "record", "second": "record"},
)
SHAPE = dict(image_shape=(16, 16, 3), width=16, groups=4, dtype=jnp.float32)
for name in ("fits", "supported"):
    add(
        f"kernels.conv.{name}",
        getattr(conv, name),
        **SHAPE,
        traced=False,
        kinds={"dtype": "record"},
        allowed="dtype: none, groups: negative",
        ranges={"image_shape": (16, 16)},
    )
add(
    "kernels.conv.computes",
    conv.computes,
    traced=False,
    dtype=jnp.float32,
    kinds={"dtype": "record"},
    allowed="dtype: none",
)
NOTHING_TO_SLIP = ("views.image.simclr",)
for name in ("fits", "supported"):
    add(
        f"kernels.ttt_linear.{name}",
        getattr(ttt_linear, name),
        traced=False,
        width=64,
        chunk_size=16,
        dtype=jnp.float32,
        kinds={"dtype": "record"},
        allowed="dtype: none",
    )
for name in ("fits", "supported"):
    add(
        f"kernels.ttt_mlp.{name}",
        getattr(ttt_mlp, name),
        traced=False,
        width=64,
        hidden=256,
        chunk_size=16,
        dtype=jnp.float32,
        kinds={"dtype": "record"},
        allowed="dtype: none",
    )
ROWS = dict.fromkeys(("q", "k", "v"), np.ones((4, 16), np.float32))
ROW = np.ones(16, np.float32)
add(
    "kernels.ttt_linear.ttt_linear",
    ttt_linear.ttt_linear,
    **ROWS,
    gate=np.ones(4, np.float32),
    scale=ROW,
    state=(np.ones((16, 16), np.float32), ROW),
    norm=(ROW, ROW),
    only_refusals=True,
)
WIDE = np.ones((16, 64), np.float32)
add(
    "kernels.ttt_mlp.ttt_mlp",
    ttt_mlp.ttt_mlp,
    **ROWS,
    gate=np.ones(4, np.float32),
    scale=ROW,
    state=(WIDE, WIDE[0], WIDE.T, ROW),
    norm=(ROW, ROW),
    only_refusals=True,
)
