"""Right calls of data, checkpoints and models."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.core.fuzz import things
from tests.core.fuzz.calls import Table
from ttt_jax import checkpoint, data, models
from ttt_jax.data import corruptions, streams

TABLE = Table()
add = TABLE.add
FOLDER = pathlib.Path(tempfile.mkdtemp())
IMAGE = {"image": things.COLORS}


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
    allowed="split: text, split: upper, data_dir: text",
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
    allowed="module: module, method: function",
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
    allowed="module: module, norm: number, method: function",
)
add(
    "models.linen_statistics",
    models.linen_statistics,
    lambda f: f(things.net_params(), things.IMAGES),
    module=things.NET,
    method="__call__",
    kinds={"method": "text", "norm": "text"},
    allowed="module: module, norm: number, method: function",
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
PIECES = ["<end>", "A", "B", "AB"]
add(
    "data.tokenizers.from_gguf",
    data.tokenizers.from_gguf,
    lambda tokenizer: jnp.asarray(tokenizer.sizes),
    fields={
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.token_type": [3, 1, 1, 1],
        "tokenizer.ggml.merges": ["A B"],
    },
    ranges={"fields": ({}, {"tokenizer.ggml.model": "bert"})},
)
add(
    "data.tokenizers.from_file",
    data.tokenizers.from_file,
    path="nothing/tokenizer.json",
    ranges={"path": "."},
    only_refusals=True,
)
add(
    "models.Decoder",
    models.Decoder,
    lambda module: module.lazy_init(things.KEY, jax.ShapeDtypeStruct((1, 4), jnp.int32)),
    vocabulary=5,
    width=8,
    depth=2,
    heads=2,
    kinds={
        **{key: None for key in ("parent", "name", "dtype", "logits_dtype")},
        "attention": "text",
        "form": "text",
    },
    ranges={"kv_heads": 3, "head_size": 3, "stages": ((1, 2),), "activation": "wrong"},
)
PRETRAINED = {"dtype": jnp.float32, "kinds": {"dtype": None, "options": None}}
add(
    "models.load_gguf",
    models.load_gguf,
    path="nothing.gguf",
    **PRETRAINED,
    ranges={"path": ([], ["nothing.gguf", 3]), "dtype": (jnp.int32, "wide")},
    only_refusals=True,
)
add(
    "models.load_hugging_face",
    models.load_hugging_face,
    folder="nothing",
    **PRETRAINED,
    ranges={"dtype": (jnp.int32, "wide")},
    only_refusals=True,
)
add("models.patchify", models.patchify, images=things.COLORS[None], patch=4, ranges={"patch": 3})
add(
    "models.unpatchify",
    models.unpatchify,
    patches=np.ones((1, 4, 48), np.float32),
    patch=4,
    size=(8, 8),
    ranges={"size": ((9, 8), (8,)), "patch": 3},
)

NOTHING_TO_SLIP = ("data.demo", "models.demo")
