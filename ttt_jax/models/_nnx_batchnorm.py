"""Serving ``norm`` at the BatchNorms of an NNX module, without touching the user's module.

``nnx.merge`` gives a fresh object for every call of a model function; its BatchNorms get a class
of the same layout whose call honours ``norm``. The options travel as attributes, so NNX's own
transformations inside the module (``nnx.jit``, ``nnx.remat``, ``nnx.scan``) see them.
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from ttt_jax.models._norm import Norm, refuse_single, source_weight


class _Served(nnx.BatchNorm):
    """A BatchNorm that overrides its caller's choice of statistics.

    Attributes:
      ttt_norm: ``"running"``, ``"batch"``, ``"collect"``, ``"traced"`` or the prior as a number.
      ttt_size: the number of instances in the batch.
      ttt_where: the layer's name, for error messages.
      ttt_weight: for a prior, the share of the source statistics, shaped like them.
      ttt_calls: for ``"collect"``, how many calls were averaged.
    """

    ttt_norm: str | float
    ttt_size: int
    ttt_where: str
    ttt_weight: Any = None
    ttt_calls: int

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        call = nnx.BatchNorm.__call__
        norm = self.ttt_norm
        if norm == "running":
            return call(self, x, True, mask=mask)
        refuse_single("batch" if norm == "collect" else norm, self.ttt_size, self.ttt_where)
        # A detached layer, whose Variables belong to the current trace: nothing is written to self.
        graphdef, state = nnx.split(self)
        layer = nnx.merge(graphdef, nnx.as_pure(state))
        if norm == "batch":
            return call(layer, x, False, mask=mask)
        test = _batch_statistics(self, x, mask)
        if norm == "collect":
            self.ttt_calls += 1
            for mine, new in ((self.mean, test["mean"]), (self.var, test["var"])):
                old = mine[...] if self.ttt_calls > 1 else new
                mine[...] = old + (new - old) / self.ttt_calls
            return call(layer, x, False, mask=mask)
        weight = self.ttt_weight
        layer.mean = nnx.BatchStat(weight * self.mean[...] + (1 - weight) * test["mean"])
        layer.var = nnx.BatchStat(weight * self.var[...] + (1 - weight) * test["var"])
        return call(layer, x, True, mask=mask)


def _batch_statistics(layer: Any, x: jax.Array, mask: jax.Array | None) -> Any:
    """Mean and variance of the batch, as flax computes them.

    Linen's layer gives them: NNX's stops the gradient where it stores its own, which would make
    a prior of 0 differ from ``"batch"``. With momentum 0 Linen's update is exactly the batch's.
    """
    scale, bias = (None if leaf is None else leaf[...] for leaf in (layer.scale, layer.bias))
    arrays = (x, layer.mean[...], layer.var[...], scale, bias)
    x = layer.promote_dtype(arrays, dtype=layer.dtype)[0]
    same = ("axis", "dtype", "axis_name", "axis_index_groups", "use_fast_variance")
    linen = nn.BatchNorm(
        use_running_average=False,
        momentum=0.0,
        use_bias=False,
        use_scale=False,
        parent=None,
        **{name: getattr(layer, name) for name in same},
    )
    source = {"mean": layer.mean[...], "var": layer.var[...]}
    _, update = linen.apply({"batch_stats": source}, x, mask=mask, mutable=["batch_stats"])
    return update["batch_stats"]


@functools.cache
def _served(cls: type) -> type:
    """The class that puts ``_Served`` between a user's subclass and ``nnx.BatchNorm``."""
    return _Served if cls is nnx.BatchNorm else type(cls.__name__, (cls, _Served), {})


def serve(model: nnx.Module, norm: Norm, size: int, *, collect: bool = False) -> bool:
    """Makes every BatchNorm of ``model``, a private object, use ``norm``.

    Args:
      model: the freshly merged module; changed in place.
      norm: see :func:`ttt_jax.models.from_nnx`.
      size: the number of instances in the batch.
      collect: use the batch's statistics and store them in the layers' ``BatchStat``.

    Returns:
      Whether there is such a layer.
    """
    layers: list[tuple[Any, Any]] = [
        (path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)
    ]
    for path, layer in layers:
        layer.__class__ = _served(layer.__class__)
        layer.ttt_size, layer.ttt_calls = size, 0
        layer.ttt_where = f"BatchNorm {'/'.join(map(str, path))!r}"
        if isinstance(norm, str):
            layer.ttt_norm = "collect" if collect else norm
        else:
            layer.ttt_norm = "traced" if isinstance(norm, jax.Array) else float(cast(float, norm))
            # As wide as the statistics, so that a scan over stacked layers slices it with them.
            weight = jnp.broadcast_to(source_weight(norm, size), layer.mean.shape)
            layer.ttt_weight = nnx.data(weight)
    return bool(layers)
