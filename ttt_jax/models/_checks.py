"""Checks shared by the models and the bridges: each failure is one sentence with its fix."""

import difflib
from collections.abc import Iterable
from typing import Any

import jax

from ttt_jax._checks import leading_size


def nearest(name: str, options: Iterable[str]) -> str:
    """Names the options closest to ``name``, for the end of an error message."""
    known = sorted(set(options))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return "did you mean " + " or ".join(repr(option) for option in close) + "?"
    return "known names: " + ", ".join(repr(option) for option in known) + "."


def check_method(owner: type, method: str, bridge: str) -> None:
    """Raises ``ValueError`` when ``owner`` has no method of that name."""
    if callable(getattr(owner, method, None)):
        return
    # Methods of the user's own classes come first in a person's mind, so flax's are left out.
    options = {
        name
        for cls in owner.__mro__
        if cls.__module__.partition(".")[0] not in ("flax", "builtins")
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("_")
    } | {"__call__"}
    raise ValueError(
        f"{bridge}: {owner.__name__} has no method {method!r}; {nearest(method, options)}"
    )


def check_images(
    images: jax.Array,
    *,
    model: str,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Raises ``ValueError`` unless ``images`` is ``[N, H, W, C]`` of the size a model takes."""
    if images.ndim != 4:
        raise ValueError(
            f"{model} takes images [N, H, W, C], received shape {images.shape}: add the batch axis "
            "with images[None], or wrap the model function in ttt_jax.unbatched."
        )
    if channels is not None and images.shape[3] != channels:
        raise ValueError(
            f"{model} was built for {channels} channels, received images of shape {images.shape}: "
            "pass channels-last images with that many channels, or initialise it for these."
        )
    if size is not None and images.shape[1:3] != size:
        raise ValueError(
            f"{model} was built for {size[0]}x{size[1]} images, received shape {images.shape}: "
            "resize the images, or build the model with this image_size."
        )


def batch_size(inputs: Any, bridge: str, norm: Any) -> int:
    """The length of the leading axis of ``inputs``, any pytree of arrays ``[N, ...]``.

    It must be that of all leaves where ``norm`` takes statistics from the inputs.
    """
    leaves = jax.tree.leaves(inputs)
    if not leaves or getattr(leaves[0], "ndim", 0) < 1:
        raise ValueError(
            f"{bridge}: a model function takes inputs with a leading batch axis [N, ...], "
            f"received {jax.tree.map(lambda leaf: getattr(leaf, 'shape', leaf), inputs)}: "
            "add the axis with x[None]."
        )
    if isinstance(norm, str) and norm == "running":
        return int(leaves[0].shape[0])
    return leading_size(f"{bridge}: inputs whose statistics are taken", inputs)
