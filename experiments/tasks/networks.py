"""Models of image tasks behind one face, whether Linen or NNX: parameters and functions by name."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen, nnx

from experiments import launch, settings
from experiments.tasks import ANY_OPTION
from ttt_jax import data, kernels, models

MODELS: dict[str, Any] = {"resnet": models.ResNet, "vit": models.ViT}

# Methods of a module that are no functions of images.
_NO_HEADS = ("setup", "finish_init", "all_heads", "project")


class Network(NamedTuple):
    """A model of a config.

    Attributes:
      module: a Linen module, or an NNX module made with a fixed seed.
      factory: ``factory(rngs=nnx.Rngs(...)) -> nnx.Module``; None for Linen.
      image_shape: ``(H, W, C)``.
    """

    module: Any
    factory: Any
    image_shape: tuple[int, ...]

    def init(self, key: jax.Array) -> Any:
        """Freshly initialized parameters."""
        if self.factory is not None:
            return models.from_nnx(self.factory(rngs=nnx.Rngs(key)))[1]
        if hasattr(self.module, "finish_init"):
            return models.init(self.module, key, self.image_shape)
        method = "all_heads" if hasattr(self.module, "all_heads") else None
        return self.module.init(key, jnp.zeros((1, *self.image_shape)), method=method)

    def heads(self) -> list[str]:
        """The heads that methods take by name: the public methods of the module's own class.

        ``project`` is one where the module has a width ``projection``.
        """
        kind, base = type(self.module), nnx.Module if self.factory is not None else linen.Module
        names = [name for name in dir(kind) if name[0] != "_" and not hasattr(base, name)]
        none = {*_NO_HEADS, *getattr(kind, "__dataclass_fields__", ())}
        found = [n for n in names if n not in none and inspect.isfunction(getattr(kind, n))]
        return [*found, "project"] if getattr(self.module, "projection", 0) else found

    def apply(self, method: str | None, norm: Any) -> Any:
        """``(params, images, ...) -> outputs`` of a method, ``None`` for the call itself."""
        if self.factory is not None:
            return models.from_nnx(self.module, method or "__call__", norm=norm)[0]
        return models.from_linen(self.module, method, norm=norm)

    def statistics(self, method: str | None, *, outputs: bool = False) -> Any:
        """As ``models.linen_statistics``: the statistics of a batch at every BatchNorm."""
        if self.factory is not None:
            return models.nnx_statistics(self.module, method or "__call__", outputs=outputs)
        return models.linen_statistics(self.module, method, outputs=outputs)

    def activations(self) -> Any:
        """``(params, images) -> pytree`` of the outputs of normalization layers; None for NNX."""
        return None if self.factory is not None else models.linen_activations(self.module)


# Options that the images say, or the class makes itself.
_FROM_IMAGES = ("num_classes", "image_size", "channels", "rngs", "parent", "name", "self")


def options_of(name: str) -> tuple[str, ...]:
    """The options that a model may have in a config; ``ANY_OPTION`` where it takes whatever comes.

    Raises:
      ValueError: an unknown model.
    """
    if ":" not in name and name not in MODELS:
        raise ValueError(
            f"model.name must be one of {sorted(MODELS)}, or PACKAGE.MODULE:NAME; got {name!r}."
        )
    factory = settings.imported(name, "model.name") if ":" in name else MODELS[name]
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return ANY_OPTION
    return tuple(p.name for p in parameters if p.name not in _FROM_IMAGES)


def build(
    config: ml_collections.ConfigDict, source: data.Source, *, shared_kernels: bool
) -> Network:
    """The model that a config describes, for images like those of a source.

    Args:
      config: ``model.name`` is one of :data:`MODELS`, or ``package.module:name`` of a Linen class
        or of a function ``(num_classes, rngs, ...) -> nnx.Module``; the rest are its options.
      source: the images; their shape and classes complete the options.
      shared_kernels: whether all instances use the same kernels (training, a prediction without
        adaptation): XLA's own convolution is then the fastest, but for fused kernels where they
        fit.

    Raises:
      ValueError: an unknown model, or options that it has not.
    """
    name = config.model.name
    options = {key: value for key, value in config.model.items() if key != "name"}
    known = options_of(name)
    for key in options:
        if key not in known and known != ANY_OPTION:
            hint = launch.nearest(key, known) or f"; it has {', '.join(known)}."
            raise ValueError(f"model.{key} is no option of model.name={name!r}{hint}")
    options["num_classes"] = source.num_classes
    shape = tuple(source.image_shape)
    if "dtype" in options:
        options["dtype"] = jnp.dtype(options["dtype"])
    if ":" in name:
        return _imported(settings.imported(name, "model.name"), options, shape, name)
    if name == "vit":
        options |= {"image_size": shape[0], "channels": shape[2]}
    if name == "resnet" and shared_kernels:
        options["conv"] = _shared_form(models.ResNet(**options), shape)
    return Network(MODELS[name](**options), None, shape)


def _imported(factory: Any, options: dict[str, Any], shape: tuple[int, ...], name: str) -> Network:
    try:
        if isinstance(factory, type) and issubclass(factory, linen.Module):
            return Network(factory(**options), None, shape)
        module = factory(**options, rngs=nnx.Rngs(0))
    except TypeError as error:
        raise ValueError(f"model.name={name!r} does not take its options: {error}.") from error
    return Network(module, lambda rngs: factory(**options, rngs=rngs), shape)


def _shared_form(net: models.ResNet, image_shape: tuple[int, ...]) -> str:
    sizes = (image_shape, net.width, net.groups, net.dtype)
    fused = net.norm == "group" and kernels.conv.supported(*sizes)
    return "fused" if fused else "lax"
