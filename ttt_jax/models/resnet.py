"""The residual network of the TTT paper, with its rotation branch.

Sun et al., 2020, "Test-Time Training with Self-Supervision for Generalization under Distribution
Shifts" (ICML): a CIFAR network of depth 6n + 2 in pre-activation basic blocks (He et al., 2016),
GroupNorm with 8 groups, and a rotation head on a deep copy of what follows ``layer2``.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax import _arguments
from ttt_jax.kernels import conv as conv_kernels
from ttt_jax.models._checks import check_images, nearest
from ttt_jax.models.conv import Conv3x3
from ttt_jax.models.initializers import he_normal_fan_out, xavier_uniform

_NORMS = ("group", "batch")
FORMS = (*conv_kernels.FORMS, "fused")
"""``fused``: whole blocks as GPU kernels; the others are forms of one convolution."""
_PLAN = ((1, 1), (2, 2), (4, 2))
"""Per layer: width as a multiple of the first, and stride."""


class _Scale(nn.Module):
    """The parameters of a GroupNorm, for a kernel that applies it."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        return (
            self.param("scale", nn.initializers.ones, (channels,), jnp.float32),
            self.param("bias", nn.initializers.zeros, (channels,), jnp.float32),
        )


class _Kernel(nn.Module):
    """The parameter of a :class:`Conv3x3`, for a kernel that applies it."""

    @nn.compact
    def __call__(self, channels: int, features: int) -> jax.Array:
        return self.param("kernel", he_normal_fan_out, (3, 3, channels, features), jnp.float32)


class _Block(nn.Module):
    """norm, relu, conv, norm, relu, conv, plus the block's own input."""

    features: int
    stride: int
    groups: int
    norm: str
    conv: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """``[N, H, W, C] -> [N, H / stride, W / stride, features]``, or Maps to Maps."""
        if isinstance(x, conv_kernels.Maps):
            layers = []
            for index, channels in ((1, x.values.shape[-1]), (2, self.features)):
                scale, bias = _Scale(name=f"gn{index}")(channels)
                kernel = _Kernel(name=f"conv{index}")(channels, self.features)
                layers.append(conv_kernels.Layer(scale, bias, kernel))
            return conv_kernels.block(x, *layers, stride=self.stride, groups=self.groups)
        shortcut = x
        if self.stride == 2:
            shortcut = nn.avg_pool(shortcut, (2, 2), strides=(2, 2))
        if x.shape[-1] != self.features:
            extra = self.features - x.shape[-1]
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, extra)))
        prefix = "gn" if self.norm == "group" else "bn"
        for index, stride in ((1, self.stride), (2, 1)):
            norm = _make_norm(self.norm, self.groups, self.dtype, f"{prefix}{index}")
            x = nn.relu(_normalize(norm, x, train))
            x = Conv3x3(self.features, stride, self.conv, self.dtype, name=f"conv{index}")(x)
        return x + shortcut


class _Layer(nn.Module):
    """n blocks, named by their number; the first one may halve the image."""

    blocks: int
    features: int
    stride: int
    groups: int
    norm: str
    conv: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        shared = (self.groups, self.norm, self.conv, self.dtype)
        for index in range(self.blocks):
            stride = self.stride if index == 0 else 1
            x = _Block(self.features, stride, *shared, name=str(index))(x, train)
        return x


def _make_norm(norm: str, groups: int, dtype: Any, name: str) -> nn.Module:
    # flax keeps the statistics of both in float32, whatever the compute dtype.
    if norm == "group":
        return nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=dtype, name=name)
    return nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)


def _normalize(norm: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    return norm(x, not train) if isinstance(norm, nn.BatchNorm) else norm(x)


class ResNet(nn.Module):
    """A CIFAR ResNet with a classification head and a rotation head.

    The rotation branch leaves the shared encoder (``conv1`` to ``layer{branch}``) and consists
    of ``rotation_layer*``, ``rotation_gn`` and ``rotation_fc``; :func:`ttt_jax.models.init`
    starts it as a copy of the main branch. With ``norm="batch"`` the normalizations are called
    ``bn1``, ``bn2``, ``bn`` and ``rotation_bn``. The parameter names are those of the public
    checkpoint read by :func:`ttt_jax.models.load_resnet26_npz`.

    Images have sides that are multiples of 4, because the network halves them twice and its
    shortcuts average 2x2 pixels. The number of channels is the one it was initialized with.

    Attributes:
      depth: 6n + 2 with n >= 1 blocks per layer.
      width: channels of the first layer; the others have 2 and 4 times as many.
      num_classes: the number of classes.
      groups: groups of every GroupNorm; divides ``width``. Unused with ``norm="batch"``.
      norm: ``"group"`` or ``"batch"``.
      branch: the last shared layer, 1, 2 or 3 (the paper: 2).
      rotation_classes: outputs of the rotation head.
      projection: outputs of the projection head of contrastive training, 0 for no such head. It
        is ``projection_hidden``, as wide as the features, relu and ``projection_out``.
      conv: the form of the convolutions: ``"lax"`` or ``"patches"``
        (:func:`ttt_jax.kernels.conv.conv3x3`), ``"fused"`` (GPU kernels over whole blocks, see
        :mod:`ttt_jax.kernels.conv`; elsewhere the same kernels interpreted, slowly), or
        ``"auto"``: fused where the kernels fit (:func:`ttt_jax.kernels.conv.fits`) and the
        batch is not empty, otherwise that of ``conv3x3``. All have the same parameters and give
        equal results and gradients, in parameters and images and of every order. Fused has them
        in reverse mode only: ``jax.jvp`` and ``jax.hessian`` need ``"lax"`` or ``"patches"``.
      dtype: the compute dtype. Parameters, statistics and logits are float32.

    Raises:
      ValueError: an impossible option when built; images of the wrong rank, size or channel
        count when called.
    """

    depth: int = 26
    width: int = 16
    num_classes: int = 10
    groups: int = 8
    norm: str = "group"
    branch: int = 2
    rotation_classes: int = 4
    projection: int = 0
    conv: str = "auto"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        integers = ("depth", "width", "groups", "branch", "projection")
        _arguments.check_fields(
            self,
            **dict.fromkeys(integers, _arguments.integer),
            num_classes=_arguments.count(),
            rotation_classes=_arguments.count(),
        )
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(
                f"A ResNet has depth 6n + 2 with n >= 1, received {self.depth}: use 8, 14, 20, 26."
            )
        if self.norm not in _NORMS:
            raise ValueError(
                f"norm is one of {_NORMS}, received {self.norm!r}; "
                f"{nearest(str(self.norm), _NORMS)}"
            )
        if self.norm == "group" and (self.groups < 1 or self.width % self.groups):
            raise ValueError(
                f"groups divides width, received groups={self.groups} and width={self.width}: "
                "choose a divisor."
            )
        if self.branch not in (1, 2, 3):
            raise ValueError(f"branch is the last shared layer, 1, 2 or 3, received {self.branch}.")
        if self.projection < 0:
            raise ValueError(f"projection is 0 or more outputs, received {self.projection}.")
        if self.conv not in FORMS:
            raise ValueError(
                f"conv is one of {FORMS}, received {self.conv!r}; {nearest(str(self.conv), FORMS)}"
            )
        if self.conv == "fused" and self.norm != "group":
            raise ValueError('conv="fused" has kernels for norm="group", received norm="batch".')
        super().__post_init__()

    def setup(self) -> None:
        """Names the parts; a part has parameters once a method that uses it was initialized."""
        form = "auto" if self.conv == "fused" else self.conv
        shared = (self.groups, self.norm, form, self.dtype)
        final = "gn" if self.norm == "group" else "bn"

        def layer(index: int, name: str) -> nn.Module:
            scale, stride = _PLAN[index - 1]
            blocks = (self.depth - 2) // 6
            return _Layer(blocks, scale * self.width, stride, *shared, name=name)

        self.conv1 = Conv3x3(self.width, 1, form, self.dtype)
        self.main_layers = [layer(i, f"layer{i}") for i in (1, 2, 3)]
        self.main_norm = _make_norm(self.norm, self.groups, self.dtype, final)
        self.fc = nn.Dense(self.num_classes, kernel_init=xavier_uniform)
        self.rotation_layers = [layer(i, f"rotation_layer{i}") for i in range(self.branch + 1, 4)]
        self.rotation_norm = _make_norm(self.norm, self.groups, self.dtype, f"rotation_{final}")
        self.rotation_fc = nn.Dense(self.rotation_classes, kernel_init=xavier_uniform)
        if self.projection:
            self.projection_hidden = nn.Dense(4 * self.width, kernel_init=xavier_uniform)
            self.projection_out = nn.Dense(self.projection, kernel_init=xavier_uniform)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies: ``[N, H, W, C] -> logits [N, num_classes]``, float32.

        Args:
          images: ``[N, H, W, C]``, normalized.
          train: for ``norm="batch"`` only: use and update batch statistics.
        """
        return self.fc(self.features(images, train))

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The pooled features before ``fc``: ``[N, H, W, C] -> [N, 4 * width]``, float32."""
        x = self._encode(images, train)
        for layer in self.main_layers[self.branch :]:
            x = layer(x, train)
        return _pool(_normalize(self.main_norm, _images(x), train))

    def rotation(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Predicts the rotation: ``[N, H, W, C] -> logits [N, rotation_classes]``, float32."""
        x = self._encode(images, train)
        for layer in self.rotation_layers:
            x = layer(x, train)
        return self.rotation_fc(_pool(_normalize(self.rotation_norm, _images(x), train)))

    def project(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Projects the features for a contrastive loss: ``[N, H, W, C] -> [N, projection]``.

        The head of SimCLR (Chen et al., 2020, section 4.2), float32.

        Raises:
          ValueError: a model without the head.
        """
        if not self.projection:
            raise ValueError("project needs a model with projection >= 1, received projection=0.")
        return self.projection_out(nn.relu(self.projection_hidden(self.features(images, train))))

    def all_heads(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Runs every head, so that one ``init`` creates every parameter."""
        heads = (self(images), self.rotation(images))
        return (*heads, self.project(images)) if self.projection else heads

    def _encode(self, images: jax.Array, train: bool) -> Any:
        channels: int | None = None
        if self.has_variable("params", "conv1"):
            channels = self.get_variable("params", "conv1")["kernel"].shape[2]
        check_images(images, model="ResNet", channels=channels)
        if min(images.shape[1:3]) < 4 or images.shape[1] % 4 or images.shape[2] % 4:
            raise ValueError(
                "ResNet takes images whose sides are multiples of 4, received shape "
                f"{images.shape}: pad or resize them."
            )
        if self._fused(images.shape[0], images.shape[1:]):
            kernel: jax.Array = self.get_variable("params", "conv1")["kernel"]
            x: Any = conv_kernels.stem(images.astype(self.dtype), kernel)
        else:
            x = self.conv1(images)
        for layer in self.main_layers[: self.branch]:
            x = layer(x, train)
        return x

    @nn.nowrap
    def _fused(self, count: int, shape: tuple[int, ...]) -> bool:
        # Initialization takes the flax layers, whose shapes it records.
        if self.norm != "group" or self.conv not in ("auto", "fused") or self.is_initializing():
            return False
        # A kernel runs once per image: of an empty batch there is nothing to run.
        if count == 0:
            return False
        options = (shape, self.width, self.groups, self.dtype)
        if self.conv == "auto":
            return conv_kernels.supported(*options)
        if not conv_kernels.fits(*options):
            raise ValueError(
                'conv="fused" takes width 16, float32 or bfloat16, images of at most 16 channels '
                "whose sides are powers of two with 16 x 16 to 32 x 32 pixels in all; received "
                f'width {self.width}, {jnp.dtype(self.dtype)} and images {shape}: use conv="auto".'
            )
        if not conv_kernels.computes(self.dtype):
            raise ValueError(
                'conv="fused" in bfloat16 takes a GPU of compute capability 8 or more, received '
                f'{jax.devices()[0].compute_capability}: use float32, or conv="auto".'
            )
        return True

    @nn.nowrap
    def finish_init(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Makes the rotation branch a copy of the main one, all but ``rotation_fc``."""
        final = "gn" if self.norm == "group" else "bn"
        parts = [f"layer{i}" for i in range(self.branch + 1, 4)] + [final]
        copies = {
            name: {f"rotation_{part}": tree[part] for part in parts if part in tree}
            for name, tree in variables.items()
        }
        return {
            name: {**tree, **jax.tree.map(jnp.array, copies[name])}
            for name, tree in variables.items()
        }


def _images(x: Any) -> jax.Array:
    return x.images() if isinstance(x, conv_kernels.Maps) else x


def _pool(x: jax.Array) -> jax.Array:
    return jnp.mean(nn.relu(x).astype(jnp.float32), axis=(1, 2))
