"""The activations of a Linen module's layers, for losses that look inside a model."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from flax.traverse_util import flatten_dict

from ttt_jax import _arguments
from ttt_jax.models._norm import Norm
from ttt_jax.models.linen import from_linen

# A collection of its own, so that nothing which a model sows itself is mistaken for a layer.
_COLLECTION = "ttt_jax_activations"
_NAME = "__call__"


@runtime_checkable
class FusedOutput(Protocol):
    """The output of layers that a kernel computed together, in place of an array.

    No module was called for such a layer, so that there is no activation to collect. A class that
    a kernel returns needs the method and no base class.
    """

    def fused_layers(self) -> tuple[str, ...]:
        """Names the layers that the kernel computed."""
        ...


@_arguments.checked(module=None, method=_arguments.named)
def linen_activations(
    module: nn.Module,
    method: str | Callable[..., Any] | None = None,
    *,
    layers: tuple[type[nn.Module], ...] = (nn.BatchNorm, nn.GroupNorm, nn.LayerNorm),
    norm: Norm = "running",
    kwargs: Mapping[str, Any] | None = None,
) -> Callable[[Any, Any], dict[str, Any]]:
    """Builds the function that collects the outputs of a module's layers.

    The outputs are differentiable, under ``nn.remat`` and ``nn.jit`` too.

    Args:
      module: an unbound ``flax.linen.Module``; it is not changed.
      method: the name (or the function) of the method that is run; ``None`` for ``__call__``.
      layers: the classes whose outputs are collected, subclasses included. Layers inside one of
        them are part of it.
      norm: how every BatchNorm is served, as in :func:`from_linen`.
      kwargs: further keyword arguments of every call, such as ``{"train": False}``.

    Returns:
      ``collect(params, inputs[N, ...]) -> {path: output[N, ...]}`` with paths such as
      ``"layer1/0/gn1"`` (the class name for the module itself). A layer that is called several
      times has one entry for each call: ``path/0``, ``path/1``.

    Raises:
      TypeError: ``module`` is no Linen module, or ``norm`` of an impossible type.
      ValueError: an unknown method or ``norm``; from ``collect``: no such layer was called, the
        ResNet's fused kernels took their place, or one lies in ``nn.scan`` or ``nn.vmap``; and
        the errors of :func:`from_linen`.
    """
    options = {**(kwargs or {}), "mutable": [_COLLECTION]}
    apply = from_linen(module, method, norm=norm, kwargs=options)
    kinds = tuple(layers)

    def collect(params: Any, inputs: Any) -> dict[str, Any]:
        # The bridge's own interceptor is entered later and so runs inside this one.
        with nn.intercept_methods(_recorder(kinds)):
            _, variables = apply(params, inputs)
        found: dict[str, Any] = {}
        for path, outputs in flatten_dict(variables.get(_COLLECTION, {})).items():
            name = "/".join(path[:-1]) or type(module).__name__
            if len(outputs) == 1:
                found[name] = outputs[0]
            else:
                found.update({f"{name}/{i}": output for i, output in enumerate(outputs)})
        if not found:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"linen_activations: {type(module).__name__} called no layer of the classes "
                f"({names}): pass the classes that it uses as layers. {_FUSED}"
            )
        return found

    return collect


_FUSED = 'The fused kernels of the ResNet have no layers: build the model with conv="lax".'


def _recorder(kinds: tuple[type[nn.Module], ...]) -> Callable[..., Any]:
    """Sows the output of every outermost layer of these classes."""
    inside = False

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal inside
        fused = [arg for arg in args if isinstance(arg, FusedOutput)]
        if fused:
            layers = ", ".join(fused[0].fused_layers())
            raise ValueError(f"linen_activations: a kernel computed {layers}. {_FUSED}")
        module = context.module
        if inside or context.method_name != "__call__" or not isinstance(module, kinds):
            return next_fun(*args, **kwargs)
        inside = True
        try:
            output = next_fun(*args, **kwargs)
        finally:
            inside = False
        if not module.sow(_COLLECTION, _NAME, output):
            raise ValueError(
                f"linen_activations: {'/'.join(module.path)!r} lies in nn.scan or nn.vmap, which "
                "does not pass activations on: write the layers out, or give the transform "
                f'variable_axes for the collection "{_COLLECTION}".'
            )
        return output

    return record
