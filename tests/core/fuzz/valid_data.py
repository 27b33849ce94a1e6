"""Right calls of views, data, checkpoints, models and kernels."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.core.fuzz import things, use
from tests.core.fuzz.calls import Table
from ttt_jax import checkpoint, data, models
from ttt_jax.data import corruptions, streams
from ttt_jax.kernels import attention, conv
from ttt_jax.views import augmix, image

TABLE = Table()
add = TABLE.add
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
add("views.augmix.augmix", augmix.augmix, key=things.KEY, **IMAGE)
add("views.augmix.draw_steps", augmix.draw_steps, key=things.KEY)
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

SEED = {"seed": 0}
add(
    "data.Source",
    data.Source,
    lambda s: s[0].image,
    name="toy",
    split="train",
    reader=things.Reader(),
    kinds={"reader": "record", "name": None},
    allowed="split: text, split: upper",
)
add(
    "data.Loader",
    data.Loader,
    lambda loader: jnp.zeros(len(loader)),
    source=things.SOURCE,
    plan=things.PLAN,
    batch_size=4,
    ranges={"batch_size": 0},
)
add(
    "data.load",
    data.load,
    name="npz:nothing",
    split="train",
    only_refusals=True,
    allowed="split: text, split: upper",
)
add(
    "data.long_tailed",
    data.long_tailed,
    lambda s: jnp.asarray(s.ids),
    source=things.SOURCE,
    imbalance=2.0,
    **SEED,
    ranges={"imbalance": 0.5},
)
add(
    "data.training_batches",
    data.training_batches,
    source=things.SOURCE,
    batch_size=4,
    **SEED,
    augment=lambda image, rng: image,
    ranges={"batch_size": (0, 99)},
    only_refusals=True,
)
add(
    "data.training_places",
    data.training_places,
    source=things.SOURCE,
    batch_size=4,
    **SEED,
    ranges={"batch_size": (0, 99)},
)
NOISE = {"name": "gaussian_noise", "severity": 3}
add("data.corruptions.check_name", corruptions.check_name, **NOISE, ranges={"severity": (0, 6)})
add(
    "data.corruptions.corrupt",
    corruptions.corrupt,
    image=np.repeat(things.COLORS, 4, 0),
    **NOISE,
    **SEED,
    ranges={"severity": (0, 6)},
    kinds={"seed": "count"},
    allowed="seed: list",
)
add(
    "data.corruptions.corrupt_batch",
    corruptions.corrupt_batch,
    images=things.COLORS[None],
    **NOISE,
    **SEED,
    ids=np.array([3]),
    ranges={"severity": (0, 6)},
    kinds={"ids": "array", "seed": "count"},
    allowed="seed: list",
)
for name in ("sequential", "shuffled", "sorted_by_label", "dirichlet"):
    own = {} if name == "sequential" else SEED
    own = own | ({"gamma": 0.5, "num_slots": 2} if name == "dirichlet" else {})
    add(
        f"data.streams.{name}",
        getattr(streams, name),
        source=things.SOURCE,
        **own,
        ranges={"severity": (1, 9), **({"gamma": 0.0} if name == "dirichlet" else {})},
    )
add("data.streams.gradual", streams.gradual, source=things.SOURCE, domain="fog", **SEED)
add(
    "data.streams.domains_in_sequence",
    streams.domains_in_sequence,
    plans=[things.PLAN],
    ranges={"plans": ([], [0.5])},
)
add("data.streams.mixed", streams.mixed, plans=[things.PLAN], **SEED, ranges={"plans": ([], [0.5])})

TREE = {"a": things.LOGITS}
SAVED = FOLDER / "saved"
checkpoint.save(SAVED, TREE)
add(
    "checkpoint.save",
    checkpoint.save,
    path=FOLDER / "new",
    params=TREE,
    metadata={"a": 1},
    only_refusals=True,
    ranges={"metadata": {"a": things.LOGITS}},
)
add(
    "checkpoint.load",
    checkpoint.load,
    path=SAVED,
    like=TREE,
    only_refusals=True,
    ranges={"like": {"b": things.LOGITS}},
    kinds={"sharding": None},
)
add("checkpoint.pristine", checkpoint.pristine, params=TREE, metadata={"a": 1}, only_refusals=True)
add("checkpoint.fingerprint", checkpoint.fingerprint, params=TREE)
add(
    "checkpoint.Saves",
    checkpoint.Saves,
    folder=FOLDER,
    kinds={"folder": "path"},
    only_refusals=True,
)


class Plain(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(36, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x.reshape(x.shape[0], -1))


NNX = Plain()
NORM = {"norm": "wrong"}
add(
    "models.from_linen",
    models.from_linen,
    lambda f: f(things.net_params(), things.IMAGES),
    module=things.NET,
    norm=4,
    kinds={"method": "text", "norm": "number", "rngs": None},
    method="__call__",
    allowed="module: module",
    ranges={"norm": ("wrong", -1, True)},
)
add(
    "models.from_nnx",
    models.from_nnx,
    lambda f: f[0](f[1], things.IMAGES),
    module=NNX,
    norm=4,
    kinds={"norm": "number"},
    ranges={"norm": ("wrong", -1)},
)
add(
    "models.linen_activations",
    models.linen_activations,
    lambda f: f(things.net_params(), things.IMAGES),
    module=things.NET,
    norm="running",
    method="__call__",
    kinds={"method": "text", "norm": "text", "layers": "record"},
    allowed="module: module, norm: number",
)
add(
    "models.linen_statistics",
    models.linen_statistics,
    lambda f: f(things.net_params(), things.IMAGES),
    module=things.NET,
    method="__call__",
    kinds={"method": "text", "norm": "text"},
    allowed="module: module, norm: number",
    ranges={"norm": "running"},
)
add(
    "models.nnx_statistics",
    models.nnx_statistics,
    lambda f: f(models.from_nnx(NNX)[1], things.IMAGES),
    module=NNX,
)
RESNET = models.ResNet(depth=8, width=8)
add(
    "models.init",
    models.init,
    module=RESNET,
    key=things.KEY,
    image_shape=(8, 8, 3),
    ranges={"image_shape": ((1, 8, 8, 3), (8, 8.5, 3), (8, 8, 0))},
    only_refusals=True,
)


def net(module):
    return module.lazy_init(things.KEY, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))


NET = {"parent": None, "name": None, "dtype": None}
add(
    "models.ResNet",
    models.ResNet,
    net,
    depth=8,
    width=8,
    num_classes=3,
    kinds=NET,
    ranges={"depth": (7, 0), "conv": "wrong"},
    allowed="projection: negative",
)
add(
    "models.ViT",
    models.ViT,
    net,
    image_size=8,
    width=8,
    depth=1,
    heads=2,
    decoder_width=8,
    decoder_depth=1,
    kinds=NET | {"image_size": "count"},
    ranges={"patch": 3, "heads": 3},
)
add(
    "models.load_resnet26_npz",
    models.load_resnet26_npz,
    path="nothing.npz",
    key=things.KEY,
    kinds={"dtype": None},
    only_refusals=True,
)
add("models.InstanceAware", models.InstanceAware, width=4.0, kinds={"width": None})
add("models.patchify", models.patchify, images=things.COLORS[None], patch=4, ranges={"patch": 3})
add(
    "models.unpatchify",
    models.unpatchify,
    patches=np.ones((1, 4, 48), np.float32),
    patch=4,
    size=(8, 8),
    ranges={"size": ((9, 8), (8,)), "patch": 3},
)

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
add("kernels.attention.fits", attention.fits, tokens=16, head_size=16)
add(
    "kernels.attention.form_of",
    attention.form_of,
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
        kinds={"dtype": "record"},
        allowed="dtype: none",
        ranges={"image_shape": (16, 16)},
    )
add(
    "kernels.conv.computes",
    conv.computes,
    dtype=jnp.float32,
    kinds={"dtype": "record"},
    allowed="dtype: none",
)
NOTHING_TO_SLIP = ("views.image.simclr", "data.demo", "models.demo")
