"""3x3 convolutions in two forms of equal result.

With private kernels per instance (``vmap`` over kernels) XLA's convolution becomes one grouped
convolution with as many groups as instances. Measured: on a CPU that is far slower than a batched
matrix product over patches; in float32 it is 2.8 times slower on an H100 and 2.2 times on an H200
(ResNet-26, 64 instances of 32 views, one step and one prediction, 155 against 71 ms); in bfloat16
the grouped convolution wins by 1.8 on an H100. Patches are nine shifted slices: cut by
``conv_general_dilated_patches`` the same work takes 309 ms.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.kernels import _arguments

FORMS = ("auto", "lax", "patches")
"""The forms of :func:`conv3x3`."""


def conv3x3(
    images: jax.Array, kernel: jax.Array, *, stride: int = 1, form: str = "auto"
) -> jax.Array:
    """Returns the convolution of images with a 3x3 kernel and padding 1.

    Args:
      images: ``[N, H, W, C]``.
      kernel: ``[3, 3, C, O]`` (HWIO), of the same dtype.
      stride: 1 or 2.
      form: ``"lax"`` (XLA's convolution), ``"patches"`` (nine shifted copies and one matrix
        product) or ``"auto"``: patches on a CPU and for float32 on a GPU, otherwise lax.

    Returns:
      ``[N, ceil(H / stride), ceil(W / stride), O]`` in the dtype of ``images``.

    Raises:
      ValueError: an unknown ``form`` or ``stride``, or shapes that do not fit.
    """
    images, kernel = _arguments.array("images", images, 4), _arguments.array("kernel", kernel, 4)
    _arguments.integer("stride", stride, 1)
    if form not in FORMS:
        raise ValueError(f"form of conv is one of {FORMS}, received {form!r}: choose one of them.")
    if stride not in (1, 2):
        raise ValueError(f"conv3x3 has stride 1 or 2, received {stride!r}: use one of them.")
    if images.ndim != 4 or kernel.shape[:3] != (3, 3, images.shape[-1]):
        raise ValueError(
            "conv3x3 takes images [N, H, W, C] and a kernel [3, 3, C, O], received "
            f"{images.shape} and {kernel.shape}: transpose or reshape them."
        )
    if form == "auto":
        form = _choose(jax.default_backend(), images.dtype)
    return _patches(images, kernel, stride) if form == "patches" else _lax(images, kernel, stride)


def _choose(backend: str, dtype: Any) -> str:
    if backend == "cpu":
        return "patches"
    # Where neither was measured (float16, say), XLA's own form is the conservative choice.
    if backend in ("gpu", "cuda", "rocm") and dtype == jnp.float32:
        return "patches"
    return "lax"


def _lax(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _patches(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    n, height, width, channels = images.shape
    rows, columns = -(-height // stride), -(-width // stride)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        jax.lax.slice(
            padded,
            (0, p, q, 0),
            (n, p + (rows - 1) * stride + 1, q + (columns - 1) * stride + 1, channels),
            (1, stride, stride, 1),
        )
        for p in range(3)
        for q in range(3)
    ]
    patches = jnp.concatenate(shifted, axis=-1)
    return jnp.dot(patches, kernel.reshape(9 * channels, -1))
