"""The works that :mod:`benchmarks.vision` times: what is computed, and the FLOP it takes.

FLOP are 2 per multiply-add of matrix products and convolutions, as is usual; normalization,
activations, softmax and optimizer do not count. A layer that adapts costs three products a step:
its output, the gradient of its input and that of its weights. A frozen layer costs two.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ttt_jax as ttt
from ttt_jax import methods, models, views

ROTATION_LEARNING_RATE = 1e-3
PADDING = 4
TENT_LEARNING_RATE = 1e-3
# Gandelsman et al., 2022, as in their public code.
MAE_LEARNING_RATE, MAE_MOMENTUM, MASK_RATIO = 5e-3, 0.9, 0.75


class ResNetSizes(NamedTuple):
    """A ResNet on square RGB images, the augmented copies per step, the images per adaptation."""

    depth: int = 26
    width: int = 16
    groups: int = 8
    classes: int = 10
    image_size: int = 32
    copies: int = 32
    batch: int = 1


class ViTSizes(NamedTuple):
    """ViT-B/16 with the decoder of masked autoencoders; ``copies`` masks of an image per step."""

    image_size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    classes: int = 1000
    copies: int = 128
    batch: int = 1
    attention: str = "fused"

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def visible(self) -> int:
        """Patches of an image that the encoder sees."""
        return int(self.tokens * (1 - MASK_RATIO) + 1e-6)


class Program(NamedTuple):
    """One adaptation and its prediction, and what makes its parameters.

    ``init(key)`` gives them; ``shape`` is that of an adaptation's input, an image or a batch.
    """

    predictor: ttt.Predictor
    init: Callable[[jax.Array], Any]
    shape: tuple[int, ...]

    def predict(self, params: Any, inputs: jax.Array, keys: jax.Array) -> Any:
        """Adaptations ``inputs[B, *shape]``, ``keys[B]`` side by side on one device."""
        return self.over(None)(params, inputs, keys)

    def over(self, mesh: jax.sharding.Mesh | None) -> Callable[..., Any]:
        """:meth:`predict`, over the devices of a mesh."""
        return ttt.batched(self.predictor, mesh=mesh)


def rotation(sizes: ResNetSizes, dtype: str, num_steps: int, *, norm_only: bool) -> Program:
    """Rotation prediction on augmented copies of one image; all parameters, or norms only."""
    module = models.ResNet(
        depth=sizes.depth,
        width=sizes.width,
        groups=sizes.groups,
        num_classes=sizes.classes,
        dtype=jnp.dtype(dtype),
    )
    predict = methods.ttt_rotation(
        models.from_linen(module),
        models.from_linen(module, "rotation"),
        augment=views.image.shift(PADDING),
        copies=sizes.copies,
        optimizer=optax.sgd(ROTATION_LEARNING_RATE),
        select=ttt.select.norm_affine() if norm_only else ttt.select.everything(),
        num_steps=num_steps,
    )
    shape = (sizes.image_size, sizes.image_size, 3)
    return Program(predict, lambda key: models.init(module, key, shape), shape)


def tent(sizes: ResNetSizes, dtype: str, num_steps: int) -> Program:
    """Tent: one copy for a batch, entropy of its predictions, BatchNorm with its statistics."""
    module = models.ResNet(
        depth=sizes.depth,
        width=sizes.width,
        num_classes=sizes.classes,
        norm="batch",
        dtype=jnp.dtype(dtype),
    )
    stream = methods.tent(
        models.from_linen(module, norm="batch"),
        optimizer=optax.adam(TENT_LEARNING_RATE),
        num_steps=num_steps,
        predict="after",
    )
    predict = ttt.episode(stream)
    image = (sizes.image_size, sizes.image_size, 3)
    return Program(predict, lambda key: models.init(module, key, image), (sizes.batch, *image))


def mae(sizes: ViTSizes, dtype: str, num_steps: int) -> Program:
    """TTT-MAE: the encoder adapts on many masks of one image, then predicts without a mask."""
    module = models.ViT(
        image_size=sizes.image_size,
        patch=sizes.patch,
        width=sizes.width,
        depth=sizes.depth,
        heads=sizes.heads,
        num_classes=sizes.classes,
        decoder_width=sizes.decoder_width,
        decoder_depth=sizes.decoder_depth,
        decoder_heads=sizes.decoder_heads,
        attention=sizes.attention,
        dtype=jnp.dtype(dtype),
    )
    predict = methods.ttt_mae(
        models.from_linen(module),
        models.from_linen(module, "reconstruct"),
        patch=sizes.patch,
        mask_ratio=MASK_RATIO,
        num_masks=sizes.copies,
        optimizer=optax.sgd(MAE_LEARNING_RATE, momentum=MAE_MOMENTUM),
        select=ttt.select.paths("params/encoder/.*"),
        num_steps=num_steps,
    )
    shape = (sizes.image_size, sizes.image_size, 3)
    return Program(predict, lambda key: models.init(module, key, shape), shape)


def resnet_forward_flop(sizes: ResNetSizes) -> int:
    """FLOP of one image's forward pass through convolutions and dense layer.

    Padded pixels count; shortcuts do not.
    """
    side, channels = sizes.image_size, sizes.width
    total = 9 * 3 * channels * side**2
    for stride, features in ((1, sizes.width), (2, 2 * sizes.width), (2, 4 * sizes.width)):
        side //= stride
        convolutions = 2 * (sizes.depth - 2) // 6
        total += 9 * (channels + (convolutions - 1) * features) * features * side**2
        channels = features
    return 2 * (total + channels * sizes.classes)


def resnet_flop(sizes: ResNetSizes, num_steps: int, *, passes: int) -> int:
    """FLOP per image of steps of that many passes over its copies, and one prediction."""
    return resnet_forward_flop(sizes) * (sizes.copies * passes * num_steps + 1)


def mae_flop(sizes: ViTSizes, num_steps: int) -> int:
    """FLOP per image of the steps and one prediction.

    Of the encoder's tokens the visible ones count; of the decoder's all, and the pixels of the
    hidden ones only. Products of activations (attention) cost two gradients wherever they stand;
    the patch embedding needs no gradient of its input. No token of a block is left out, though
    parts of the decoder's first and last block (fixed mask tokens, unused visible outputs) could
    be, about 2 % of it.
    """

    def dense(width: int, tokens: int) -> int:
        return 12 * width**2 * tokens  # query, key, value, output and an MLP four times as wide

    def attention(width: int, tokens: int) -> int:
        return 2 * width * tokens**2

    pixels, total, visible = sizes.patch**2 * 3, sizes.tokens, sizes.visible
    encoder = sizes.depth * (dense(sizes.width, visible) + attention(sizes.width, visible))
    embedding = pixels * sizes.width * visible
    frozen = sizes.width * sizes.decoder_width * visible
    frozen += sizes.decoder_depth * dense(sizes.decoder_width, total)
    frozen += sizes.decoder_width * pixels * (total - visible)
    mixing = sizes.decoder_depth * attention(sizes.decoder_width, total)
    step = sizes.copies * (2 * embedding + 3 * encoder + 2 * frozen + 3 * mixing)
    prediction = sizes.depth * (dense(sizes.width, total) + attention(sizes.width, total))
    prediction += pixels * sizes.width * total + sizes.width * sizes.classes
    return 2 * (num_steps * step + prediction)


class Work(NamedTuple):
    """A work: its sizes, its program, its FLOP per image, and what is timed.

    ``num_steps`` are the numbers of steps that each way is timed at; ``samples`` says with how many
    images per call; ``options`` are those of XLA for ttt_jax on a GPU, as pairs.
    """

    sizes: Any
    smoke: Any
    program: Callable[..., Program]
    flop: Callable[..., int]
    dtypes: tuple[str, ...]
    num_steps: tuple[int, ...]
    samples: dict[str, int]
    options: tuple[tuple[str, Any], ...] = ()


_PEERS = {"ttt_jax": 512, "torch_loop": 32, "torch_func_vmap": 128}
_SMALL = {"depth": 8, "image_size": 16}

WORKS = {
    # First, as it takes half a card in one piece, and the others leave the free memory in pieces.
    "ttt_mae": Work(
        ViTSizes(),
        ViTSizes(16, 4, 16, 1, 2, 8, 1, 2, classes=10, copies=2),
        mae,
        mae_flop,
        ("bfloat16",),
        (20,),
        {"ttt_jax": 8, "torch_loop": 1, "torch_func_vmap": 2},
        # All products to cuBLAS, which adds biases by itself: 3 % faster than those of Triton.
        (("xla_gpu_enable_triton_gemm", False),),
    ),
    "rotation": Work(
        ResNetSizes(),
        ResNetSizes(**_SMALL, copies=2),
        functools.partial(rotation, norm_only=False),
        functools.partial(resnet_flop, passes=3),
        ("bfloat16", "float32"),
        (1, 10),
        _PEERS,
    ),
    "rotation_norm_only": Work(
        ResNetSizes(),
        ResNetSizes(**_SMALL, copies=2),
        functools.partial(rotation, norm_only=True),
        functools.partial(resnet_flop, passes=2),
        ("bfloat16",),
        (1,),
        _PEERS,
    ),
    "tent_batch": Work(
        ResNetSizes(copies=1, batch=128),
        ResNetSizes(**_SMALL, copies=1, batch=2),
        tent,
        functools.partial(resnet_flop, passes=2),
        ("bfloat16",),
        (1,),
        {"ttt_jax": 1024, "torch_ttt": 1024},
    ),
}
