"""MEMO at 224 pixels: ResNet-50 and ViT-B/16, as :mod:`benchmarks.chunks` times them."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import ttt_jax as ttt
from benchmarks.works import Program
from ttt_jax import methods, models, views

# github.com/zhangmarvin/memo, ResNet-50 on ImageNet; crops in place of AugMix, whose cost on a host
# is not what is compared.
LEARNING_RATE, PADDING, VIEWS, CLASSES, SIZE = 2.5e-4, 16, 32, 1000, 224
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
"""Bottleneck blocks of each stage of ResNet-50, and their inner width."""


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride (as in torchvision), 1x1 with four times the width."""

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[N, H, W, C] -> [N, H / stride, W / stride, 4 width]``."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=True, epsilon=1e-5, dtype=self.dtype
        )
        strides = (self.stride, self.stride)
        shortcut = x
        if x.shape[-1] != 4 * self.width or self.stride != 1:
            shortcut = norm()(conv(4 * self.width, (1, 1), strides)(x))
        x = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        x = nn.relu(norm()(conv(self.width, (3, 3), strides, padding=((1, 1), (1, 1)))(x)))
        return nn.relu(norm()(conv(4 * self.width, (1, 1))(x)) + shortcut)


class ResNet50(nn.Module):
    """He et al., 2016, with the stride in the 3x3 convolution; source statistics."""

    stages: tuple[tuple[int, int], ...] = STAGES
    classes: int = CLASSES
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[N, H, W, 3] -> [N, classes]`` in float32."""
        first = self.stages[0][1]
        x = nn.Conv(
            first, (7, 7), (2, 2), padding=((3, 3), (3, 3)), use_bias=False, dtype=self.dtype
        )(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, dtype=self.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, (blocks, width) in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Bottleneck(width, stride, self.dtype)(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)).astype(jnp.float32))


def memo_resnet50(dtype: str, *, smoke: bool = False) -> Program:
    """One step of MEMO on all parameters of ResNet-50."""
    small: dict[str, Any] = {"stages": ((1, 4), (1, 8)), "classes": 10} if smoke else {}
    return _memo(ResNet50(dtype=jnp.dtype(dtype), **small), smoke)


def memo_vit(dtype: str, *, smoke: bool = False) -> Program:
    """One step of MEMO on all parameters of ViT-B/16."""
    sizes: dict[str, int] = {"image_size": SIZE, "patch": 16, "width": 768, "depth": 12}
    sizes |= {"heads": 12, "num_classes": CLASSES}
    if smoke:
        sizes = {"image_size": 32, "patch": 16, "width": 8, "depth": 1, "heads": 2}
        sizes |= {"num_classes": 10}
    return _memo(models.ViT(**sizes, dtype=jnp.dtype(dtype)), smoke)


def _memo(module: nn.Module, smoke: bool) -> Program:
    predict = methods.memo(
        models.from_linen(module),
        augment=views.image.shift(PADDING),
        num_views=2 if smoke else VIEWS,
        optimizer=optax.sgd(LEARNING_RATE),
        select=ttt.select.everything(),
    )
    side = 32 if smoke else SIZE
    shape = (side, side, 3)

    def init(key: jax.Array) -> Any:
        return module.init(key, jnp.zeros((1, *shape)))

    return Program(predict, init, shape)
