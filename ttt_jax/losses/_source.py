"""What the losses that compare with the source share: its statistics, images and features."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import _contract, _trees
from ttt_jax.source import Moments, value_of


def images_of(batch: Any) -> Any:
    """The images of a batch of ``ttt_jax.data`` (its attribute ``image``), or the batch itself."""
    return getattr(batch, "image", batch)


def moments_of(name: str, source: Any, maker: str) -> Moments:
    """The moments of ``source``, which a checkpoint may give as a dict; refuses another maker's."""
    value = value_of(source)
    if isinstance(value, dict) and set(value) == set(Moments._fields):
        value = Moments(**value)
    if not isinstance(value, Moments):
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
    elif _fits(value, outer=maker == "feature_moments"):
        return value
    else:
        found = jax.tree.map(jnp.shape, value)
    raise ValueError(
        f"losses.{name} needs source statistics with the fields {list(Moments._fields)}, as "
        f"losses.{maker} has them; got {found}. Make them with "
        f"source_statistics(losses.{maker}(...), params, loader)."
    )


def _fits(moments: Moments, outer: bool) -> bool:
    """Whether these are vectors with their covariance, or else means with their variances."""
    if not _trees.same_structure(moments.mean, moments.centered):
        return False
    means, centered = (list(map(jnp.shape, jax.tree.leaves(tree))) for tree in moments)
    if outer:
        same = _trees.same_structure(moments.mean, 0) and len(means[0]) == 1
        return same and centered[0] == means[0] * 2
    return means == centered


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
