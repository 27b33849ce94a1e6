"""A small vision transformer with a rotation head and a masked-autoencoder decoder.

Dosovitskiy et al., 2021 ("An Image is Worth 16x16 Words", ICLR) for the encoder, pre-norm, with
the mean of the tokens instead of a class token; He et al., 2022 ("Masked Autoencoders Are Scalable
Vision Learners", CVPR) for the decoder, the fixed sine-cosine positions and the initialization.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _arguments, _trees
from ttt_jax.kernels import attention
from ttt_jax.models._checks import check_images
from ttt_jax.models.initializers import xavier_uniform
from ttt_jax.models.transformer import Block, Dense


@_arguments.checked(images=_arguments.array(4), patch=_arguments.count())
def patchify(images: jax.Array, patch: int) -> jax.Array:
    """Cuts images into patches, row by row; pixels of a patch are in the order (p, q, C).

    Args:
      images: ``[N, H, W, C]``.
      patch: the side of a patch; divides H and W.

    Returns:
      ``[N, P, patch * patch * C]`` with ``P = (H / patch) * (W / patch)``.

    Raises:
      ValueError: a rank other than 4, or sides that ``patch`` does not divide.
    """
    check_images(images, model="patchify")
    n, height, width, channels = images.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"patch divides both sides of the image, received patch={patch} for shape "
            f"{images.shape}: choose a divisor, or resize the images."
        )
    rows, columns = height // patch, width // patch
    grid = images.reshape(n, rows, patch, columns, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, patch * patch * channels)


@_arguments.checked(
    patches=_arguments.array(3, like="[N, P, D]"),
    patch=_arguments.count(),
    size=_arguments.sequence(),
)
def unpatchify(patches: jax.Array, patch: int, size: tuple[int, int]) -> jax.Array:
    """The inverse of :func:`patchify`.

    Args:
      patches: ``[N, P, patch * patch * C]``.
      patch: the side of a patch.
      size: ``(H, W)`` of the images.

    Returns:
      ``[N, H, W, C]``.

    Raises:
      ValueError: patches that do not make up images of that size.
    """
    if len(size) != 2:
        raise ValueError(f"size is (H, W) of the images, received {size}: give two integers.")
    rows, columns = size[0] // patch, size[1] // patch
    fits = (
        patches.ndim == 3
        and size == (rows * patch, columns * patch)
        and patches.shape[1] == rows * columns
        and patches.shape[2] % (patch * patch) == 0
    )
    if not fits:
        raise ValueError(
            "unpatchify takes patches [N, P, patch * patch * C] with P = H * W / patch^2, received "
            f"{patches.shape} for patch={patch} and size={size}."
        )
    n, channels = patches.shape[0], patches.shape[2] // (patch * patch)
    grid = patches.reshape(n, rows, columns, patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n, *size, channels)


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed position embeddings: one half of the features encodes the row, the other the column.

    Frequencies run from 1 to 1/10000, as in He et al., 2022 (appendix A.1).

    Returns:
      float32 ``[rows * columns, width]``, patches in row-major order.

    Raises:
      ValueError: a ``width`` that is no multiple of 4.
    """
    if width < 4 or width % 4:
        raise ValueError(
            f"Sine-cosine positions need a width that is a multiple of 4, received {width}."
        )
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(place, frequencies) for place in (row, column)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class _Encoder(nn.Module):
    """Embeds the patches it is given, at their places, and mixes them."""

    width: int
    depth: int
    heads: int
    dtype: Any
    num_prompts: int = 0
    attention: str = "xla"

    @nn.compact
    def __call__(self, patches: jax.Array, positions: jax.Array) -> jax.Array:
        x = Dense((self.width,), dtype=self.dtype, name="patch_embed")(patches)
        x = x + positions.astype(self.dtype)
        if self.num_prompts:
            # Drawn like the embedding that makes the other tokens (VPT's published rule).
            limit = math.sqrt(6.0 / (patches.shape[-1] + self.width))
            prompt = self.param(
                "prompt",
                lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -limit, limit),
                (self.num_prompts, self.width),
            ).astype(self.dtype)
            prompts = jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape))
            x = jnp.concatenate([prompts, x], axis=1)
        for index in range(self.depth):
            x = Block(self.heads, self.dtype, self.attention, name=f"block_{index}")(x)
        # Prompts steer the patches through attention; heads and decoder see the patches alone.
        x = x[:, self.num_prompts :]
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)


class _Decoder(nn.Module):
    """Puts a mask token at every hidden place and predicts all patches."""

    width: int
    depth: int
    heads: int
    outputs: int
    dtype: Any
    attention: str = "xla"

    @nn.compact
    def __call__(self, visible: jax.Array, keep: jax.Array, positions: jax.Array) -> jax.Array:
        n, total = visible.shape[0], positions.shape[1]
        x = Dense((self.width,), dtype=self.dtype, name="embed")(visible)
        token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        hidden = jnp.broadcast_to(token.astype(self.dtype), (n, total, self.width))
        # Without the promise, the derivative has to look for the last writer of every place.
        x = hidden.at[jnp.arange(n)[:, None], keep].set(x, unique_indices=True)
        x = x + positions.astype(self.dtype)
        for index in range(self.depth):
            x = Block(self.heads, self.dtype, self.attention, name=f"block_{index}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = Dense((self.outputs,), dtype=self.dtype, name="pixels")(x)
        return x.astype(jnp.float32)


class _HeadBlocks(nn.Module):
    """Mixes the encoder's tokens further, for the classifier alone."""

    depth: int
    heads: int
    dtype: Any
    attention: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.depth):
            x = Block(self.heads, self.dtype, self.attention, name=f"block_{index}")(x)
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)


class ViT(nn.Module):
    """A vision transformer for classification, rotation prediction and reconstruction.

    Parameter paths begin with ``encoder/``, ``decoder/``, ``head/``, ``head_blocks/`` and
    ``rotation_head/``, so ``ttt_jax.select.paths(r".*encoder/.*")`` is the encoder alone, as
    adapted by TTT-MAE (Gandelsman et al., 2022). There is no class token: heads see the mean of
    the tokens, the encoder's or those of ``head_blocks``.

    Attributes:
      image_size: the side of square images, or ``(H, W)``.
      patch: the side of a patch; divides the image's sides.
      channels: image channels.
      width: encoder features; a multiple of 4 and of ``heads``.
      depth: encoder blocks.
      heads: attention heads of the encoder.
      num_classes: the number of classes.
      rotation_classes: outputs of the rotation head.
      decoder_width: decoder features; a multiple of 4 and of ``decoder_heads``.
      decoder_depth: decoder blocks.
      decoder_heads: attention heads of the decoder; ``None``: as many as in the encoder.
      head_depth: transformer blocks, as wide as the encoder, between its tokens and the
        classifier: the head of TTT-MAE's probing, which learns on features that it leaves as they
        are. 0 classifies the mean of the encoder's own tokens.
      num_prompts: learned tokens ``encoder/prompt`` ``[num_prompts, width]`` beside the patches
        at the encoder's input (Jia et al., 2022, "Visual Prompt Tuning", the shallow form). They
        have no position, and no head pools them. 0 leaves parameters and outputs as they are
        without.
      attention: ``"xla"``, or ``"fused"``: one kernel, or flash attention, on NVIDIA GPUs with a
        16-bit compute dtype, equal up to rounding and differentiable once, and XLA's form
        elsewhere; see :func:`ttt_jax.kernels.attention.attend`.
      dtype: the compute dtype. Parameters and outputs are float32, and so are softmax and
        normalization statistics.

    Raises:
      ValueError: an impossible option when built; images of the wrong rank, size or channel
        count when called.
    """

    image_size: int | tuple[int, int] = 32
    patch: int = 4
    channels: int = 3
    width: int = 192
    depth: int = 6
    heads: int = 3
    num_classes: int = 10
    rotation_classes: int = 4
    decoder_width: int = 96
    decoder_depth: int = 2
    decoder_heads: int | None = None
    head_depth: int = 0
    num_prompts: int = 0
    attention: str = "xla"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        integers = ("patch", "width", "decoder_width", "head_depth", "num_prompts")
        counts = ("channels", "depth", "heads", "num_classes", "rotation_classes", "decoder_depth")
        _arguments.check_fields(
            self,
            **dict.fromkeys(integers, _arguments.integer),
            **dict.fromkeys(counts, _arguments.count()),
        )
        size: Any = self.image_size
        sides = size if isinstance(size, tuple | list) else (size, size)
        if len(sides) != 2 or not all(_trees.is_integer(side, 1) for side in sides):
            raise ValueError(
                "image_size is the side of square images, or (H, W), received "
                f"{self.image_size!r}: give integers of at least 1."
            )
        if self.decoder_heads is not None:
            _arguments.check_fields(self, decoder_heads=_arguments.count())
        height, width = self._size()
        if self.patch < 1 or height % self.patch or width % self.patch:
            raise ValueError(
                f"patch divides both sides of the image, received patch={self.patch} and "
                f"image_size={self.image_size}: choose a divisor."
            )
        if self.head_depth < 0:
            raise ValueError(
                f"head_depth is at least 0, received {self.head_depth}: choose 0 for a linear "
                "classifier of the encoder's tokens."
            )
        if self.num_prompts < 0:
            raise ValueError(
                f"num_prompts is at least 0, received {self.num_prompts}: choose 0 for a model "
                "without prompt tokens."
            )
        if self.attention not in attention.FORMS:
            raise ValueError(
                f'attention is "xla" or "fused", received {self.attention!r}: choose one of them.'
            )
        for name, features, heads in (
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads or self.heads),
        ):
            if features % 4 or features % heads:
                raise ValueError(
                    f"{name} is a multiple of 4 (sine-cosine positions) and of its attention "
                    f"heads, received {name}={features} with {heads} heads."
                )
        super().__post_init__()

    def setup(self) -> None:
        """Names the parts; a part has parameters once a method that uses it was initialized."""
        options = (self.dtype, self.num_prompts, self.attention)
        self.encoder = _Encoder(self.width, self.depth, self.heads, *options)
        self.decoder = _Decoder(
            self.decoder_width,
            self.decoder_depth,
            self.decoder_heads or self.heads,
            self.patch * self.patch * self.channels,
            self.dtype,
            self.attention,
        )
        if self.head_depth:
            mixing = (self.head_depth, self.heads, self.dtype, self.attention)
            self.head_blocks = _HeadBlocks(*mixing)
        self.head = nn.Dense(self.num_classes, kernel_init=xavier_uniform)
        self.rotation_head = nn.Dense(self.rotation_classes, kernel_init=xavier_uniform)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Classifies: ``[N, H, W, C] -> logits [N, num_classes]``, float32."""
        if not self.head_depth:
            return self.head(self.features(images))
        tokens = self.head_blocks(self._tokens(images))
        return self.head(jnp.mean(tokens.astype(jnp.float32), axis=1))

    def rotation(self, images: jax.Array) -> jax.Array:
        """Predicts the rotation: ``[N, H, W, C] -> logits [N, rotation_classes]``, float32."""
        return self.rotation_head(self.features(images))

    def features(self, images: jax.Array) -> jax.Array:
        """The mean of the encoder's tokens: ``[N, H, W, C] -> [N, width]``, float32."""
        return jnp.mean(self._tokens(images).astype(jnp.float32), axis=1)

    def reconstruct(self, images: jax.Array, keep: jax.Array) -> jax.Array:
        """Reconstructs every patch from the visible ones; the encoder sees these alone.

        Args:
          images: ``[N, H, W, C]``.
          keep: integer ``[N, K]``, the visible patches of each image, without repetition.

        Returns:
          float32 ``[N, P, patch * patch * C]``; pixels as in :func:`patchify`.

        Raises:
          ValueError: ``keep`` of another rank, batch, dtype, or with more patches than there are.
        """
        patches = self._patches(images)
        n, total = patches.shape[:2]
        integer = jnp.issubdtype(keep.dtype, jnp.integer)
        if keep.ndim != 2 or not integer or keep.shape[0] != n or not 1 <= keep.shape[1] <= total:
            raise ValueError(
                f"keep holds integer patch indices [N, K] with N={n} and 1 <= K <= {total}, "
                f"received {keep.dtype} of shape {keep.shape}."
            )
        places = keep[:, :, None]
        visible = jnp.take_along_axis(patches, places, axis=1)
        table = jnp.broadcast_to(self._positions(self.width), (n, total, self.width))
        tokens = self.encoder(visible, jnp.take_along_axis(table, places, axis=1))
        return self.decoder(tokens, keep, self._positions(self.decoder_width))

    def all_heads(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs every head, so that one ``init`` creates every parameter."""
        keep = jnp.zeros((images.shape[0], 1), jnp.int32)
        return self(images), self.rotation(images), self.reconstruct(images, keep)

    def _tokens(self, images: jax.Array) -> jax.Array:
        return self.encoder(self._patches(images), self._positions(self.width))

    def _patches(self, images: jax.Array) -> jax.Array:
        check_images(images, model="ViT", channels=self.channels, size=self._size())
        return patchify(images, self.patch)

    @nn.nowrap
    def _size(self) -> tuple[int, int]:
        size = self.image_size
        return (size[0], size[1]) if isinstance(size, tuple | list) else (size, size)

    @nn.nowrap
    def _positions(self, width: int) -> jax.Array:
        height, columns = (side // self.patch for side in self._size())
        return jnp.asarray(sincos_positions(height, columns, width))[None]

    @nn.nowrap
    def finish_init(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing is shared between the heads, so the variables are returned as they are."""
        return dict(variables)
