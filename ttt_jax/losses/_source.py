"""What the losses that compare with the source share: its statistics, images and features."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _contract
from ttt_jax.source import value_of


def images_of(batch: Any) -> Any:
    """The images of a batch of ``ttt_jax.data`` (its attribute ``image``), or the batch itself."""
    return getattr(batch, "image", batch)


def moments_of(name: str, source: Any, fields: tuple[str, str], maker: str) -> tuple[Any, Any]:
    """The two moments of ``source``; refuses what ``maker`` did not make."""
    value = value_of(source)
    if not isinstance(value, dict) or set(value) != set(fields):
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"losses.{name} needs source statistics with the fields {sorted(fields)}; got {found}. "
            f"Make them with source_statistics(losses.{maker}(...), params, loader)."
        )
    return value[fields[0]], value[fields[1]]


def check_features(name: str, features: Any, count: int, width: int | None = None) -> jax.Array:
    """Returns features ``[N, D]`` in float32 after checking both axes."""
    _contract.require_array(f"losses.{name}", features, "features")
    shape = jnp.shape(features)
    if len(shape) != 2 or shape[0] != count or (width is not None and shape[1] != width):
        raise ValueError(
            f"losses.{name} needs a model function that maps inputs[N, ...] to vectors "
            f"[{count}, {'D' if width is None else width}]; got shape {shape}. Pool other axes, "
            "pass the model function itself (not unbatched), and take the source's statistics "
            "from the same one."
        )
    return features.astype(jnp.float32)
