"""The bridge for Flax Linen: any module becomes a pure model function."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from ttt_jax import _arguments
from ttt_jax.models._checks import batch_size, check_method
from ttt_jax.models._instance_norm import InstanceAware, instance_aware
from ttt_jax.models._norm import Norm, Served, check_norm, refuse_single, source_weight

_BATCH_NORM_CALL = inspect.unwrap(nn.BatchNorm.__call__)
_BATCH_NORM_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(nn.BatchNorm)
    if field.name not in ("parent", "name", "use_running_average", "momentum")
)


@_arguments.checked(module=None, method=_arguments.named)
def from_linen(
    module: nn.Module,
    method: str | Callable[..., Any] | None = None,
    *,
    norm: Norm = "running",
    stochastic: bool = False,
    rngs: Sequence[str] = ("dropout",),
    kwargs: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Turns a Linen module into a pure model function.

    ``norm`` is served at every ``nn.BatchNorm`` during the forward pass, so that later layers
    see activations that are already renormalized. It overrides ``use_running_average``, however
    the module's author arranged it. Statistics are never written and never returned; with
    ``"batch"`` or a prior, gradients flow through the statistics of the batch, as in training.

    Args:
      module: an unbound ``flax.linen.Module``; it is not changed.
      method: the name (or the function) of the method to call; ``None`` for ``__call__``.
      norm: ``"running"``: source statistics. ``"batch"``: statistics of the given batch. A
        prior N >= 0, which may be traced: ``N / (N + n)`` source and ``n / (N + n)`` batch
        statistics, n the leading axis of ``inputs`` (instances, not pixels). MEMO's constant
        16/17 for 64 views of one image is ``norm=16 * 64``. ``InstanceAware()``: NOTE's correction
        of the source statistics, instance by instance.
      stochastic: whether ``apply`` takes a key and passes it to the module.
      rngs: the names of the module's random streams, used when ``stochastic``.
      kwargs: further keyword arguments of every call, such as ``{"train": False}``.

    Returns:
      ``apply(params, inputs[N, ...], *args) -> outputs[N, ...]``, or with ``stochastic=True``
      ``apply(params, inputs, *args, key)``. ``params`` is the variables dict,
      ``{"params": ..., "batch_stats": ...}``.

    Raises:
      TypeError: ``module`` is no Linen module, or ``norm`` of an impossible type.
      ValueError: an unknown method or ``norm``; from ``apply``: batch statistics of a single
        instance, a BatchNorm whose statistics are missing in ``params``, or no ``nn.BatchNorm``
        that ``norm`` could be served at beside a ``batch_stats`` collection (without one, a
        warning).
    """
    _check_module(module, method, "from_linen")
    check_norm(norm)
    names = (rngs,) if isinstance(rngs, str) else tuple(rngs)
    if stochastic and not names:
        raise ValueError(
            "from_linen: stochastic=True passes the key to named streams, received rngs=(): "
            'name at least one, such as rngs=("dropout",).'
        )
    fixed = dict(kwargs or {})
    mark = _Mark(norm)
    served = Served("from_linen", module, norm)

    def apply(params: Any, inputs: Any, *args: Any) -> Any:
        streams = None
        if stochastic:
            args, streams = args[:-1], _streams(names, args)
        size = batch_size(inputs, "from_linen", norm)
        options, unwrap = mark.options(fixed, size)
        with nn.intercept_methods(_interceptor(norm, size, met=served.meet)):
            made = module.apply(params, inputs, *args, rngs=streams, method=method, **options)
        served.check(params)
        return made[0] if unwrap else made

    return apply


class _Mark:
    """Keeps ``nn.jit`` inside a module from reusing what it traced under another ``norm``.

    Its cache knows the module and what is mutable, not the interceptor: a collection that nobody
    has, mutable under a name of its own, tells the programs apart.
    """

    def __init__(self, norm: Norm):
        self._number = next(_NUMBERS)
        # The value of an array is not in the name: each call traces anew.
        self._fresh = not isinstance(norm, str | int | float)

    def options(self, fixed: Mapping[str, Any], size: int) -> tuple[dict[str, Any], bool]:
        """Options of ``module.apply``, and whether the output then comes in a pair."""
        number = next(_NUMBERS) if self._fresh else self._number
        mutable = fixed.get("mutable", False)
        names = [mutable] if isinstance(mutable, str) else mutable or ()
        if not isinstance(names, list | tuple | set):
            return dict(fixed), False
        names = [*names, f"ttt_jax_norm_{number}_{size}"]
        return {**fixed, "mutable": names}, mutable is False


_NUMBERS = itertools.count()


@_arguments.checked(module=None, method=_arguments.named)
def linen_statistics(
    module: nn.Module,
    method: str | Callable[..., Any] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    outputs: bool = False,
    norm: Norm = "batch",
) -> Callable[[Any, Any], Any]:
    """Builds the function that collects a batch's normalization statistics.

    Every BatchNorm is served with the statistics of the batch, as in training, or with a blend of
    them and the source's. A layer that ``method`` does not reach keeps its source statistics; one
    that is called several times gets the mean over its calls.

    Args:
      module: an unbound ``flax.linen.Module`` with ``nn.BatchNorm`` layers.
      method: the method that is run; ``None`` for ``__call__``.
      kwargs: further keyword arguments of the call.
      outputs: whether the outputs of the same pass come back too, for an adaptation in training
        mode; gradients flow through the statistics, as in :func:`from_linen`.
      norm: what every BatchNorm is served with meanwhile, as in :func:`from_linen`; what is
        collected are the statistics of the batch in any case. RoTTA's robust normalization, 0.05
        of a batch of n, is the prior ``19 * n``. ``InstanceAware()`` corrects those of the batch.

    Returns:
      ``collect(params, x[N, ...]) -> statistics``: shaped like ``params``, with the batch's
      mean and (biased) variance in ``batch_stats`` and ``None`` everywhere else, the layout of
      ``ttt_jax.select.statistics()``. With ``outputs``: ``(outputs, statistics)``.

    Raises:
      TypeError: ``module`` is no Linen module.
      ValueError: an unknown method; from ``collect``: a single instance, ``params`` without
        a ``batch_stats`` collection, or a method that meets no ``nn.BatchNorm``.
    """
    _check_module(module, method, "linen_statistics")
    check_norm(norm)
    if isinstance(norm, str) and norm == "running":
        raise ValueError(
            "linen_statistics collects the statistics of a batch that is served with them, or with "
            'a prior; received norm="running": use from_linen for the source\'s.'
        )
    fixed = dict(kwargs or {})
    mark = _Mark(norm)
    served = Served("linen_statistics", module, norm)

    def collect(params: Any, x: Any) -> Any:
        if "batch_stats" not in params:
            raise ValueError(
                "linen_statistics: params needs a batch_stats collection, received "
                f"{sorted(params)}: pass the whole variables dict of a model with BatchNorm."
            )
        size = batch_size(x, "linen_statistics", norm)
        options, _ = mark.options({**fixed, "mutable": ["batch_stats"]}, size)
        with nn.intercept_methods(_interceptor(norm, size, calls={}, met=served.meet)):
            made, updated = module.apply(params, x, method=method, **options)
        served.check(params)
        holes = {name: jax.tree.map(lambda _: None, params[name]) for name in params}
        holes["batch_stats"] = jax.tree.map(
            lambda new, old: new.astype(old.dtype), updated["batch_stats"], params["batch_stats"]
        )
        return (made, holes) if outputs else holes

    return collect


def _check_module(module: Any, method: Any, bridge: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{bridge} takes a flax.linen.Module, received {type(module).__name__}: "
            "use from_nnx for an NNX module."
        )
    if isinstance(method, str):
        check_method(type(module), method, bridge)


def _streams(names: tuple[str, ...], args: tuple[Any, ...]) -> dict[str, jax.Array]:
    if not args:
        raise ValueError(
            "from_linen: a stochastic model function is called as apply(params, inputs, key), "
            "received no key: pass one, or build it with stochastic=False."
        )
    if len(names) == 1:
        return {names[0]: args[-1]}
    return dict(zip(names, jax.random.split(args[-1], len(names)), strict=True))


def _interceptor(
    norm: Norm,
    size: int,
    calls: dict[int, tuple[Any, int, Any]] | None = None,
    met: Callable[[], None] = lambda: None,
) -> Callable[..., Any]:
    """Serves ``norm`` at every BatchNorm; with ``calls``, also stores the batch's statistics."""
    busy = False

    def serve(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal busy
        # A subclass that calls super().__call__ passes here twice; only the inner call normalizes.
        inner = getattr(context.orig_method, "func", None) is _BATCH_NORM_CALL
        if busy or not inner or context.module.is_initializing():
            return next_fun(*args, **kwargs)
        busy = True
        met()
        try:
            return _batch_norm(context.module, norm, size, calls, *args, **kwargs)
        finally:
            busy = False

    return serve


def _batch_norm(
    module: nn.BatchNorm,
    norm: Norm,
    size: int,
    calls: dict[int, tuple[Any, int, Any]] | None,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    where = f"BatchNorm {'/'.join(module.path)!r}"
    if not module.has_variable("batch_stats", "mean"):
        raise ValueError(
            f'from_linen: {where} has no statistics in params["batch_stats"]: pass the whole '
            "variables dict, not the params collection alone."
        )
    variables = dict(module.variables)
    if calls is not None and id(module) in calls:
        # An earlier call has stored what it collected where the source's statistics were.
        variables["batch_stats"] = calls[id(module)][2]
    variables["batch_stats"] = dict(variables["batch_stats"])
    # A detached layer of the same options, so that every number comes from flax's own arithmetic
    # and nothing is written to the module. With momentum 0 its updated running statistics are
    # exactly those of the batch.
    options = {name: getattr(module, name) for name in _BATCH_NORM_FIELDS}
    layer = nn.BatchNorm(**options, momentum=0.0, parent=None)
    if isinstance(norm, str) and norm == "running":
        return layer.apply(variables, x, True, mask=mask)  # type: ignore[return-value]

    aware = isinstance(norm, InstanceAware)
    if aware and mask is not None:
        raise ValueError(f"InstanceAware has no form with a mask, received one at {where}.")
    if isinstance(norm, InstanceAware) and calls is None:
        return instance_aware(layer, variables, x, variables["batch_stats"], norm.width)
    refuse_single("batch" if aware else norm, size, where)
    output, batch = layer.apply(variables, x, False, mask=mask, mutable=["batch_stats"])
    if calls is not None:
        # By object, not by path: flax traces the body of a scan several times, and each trace has
        # modules of its own. The entry keeps its module alive, so that no id comes back.
        count = calls[id(module)][1] + 1 if id(module) in calls else 1
        calls[id(module)] = (module, count, variables["batch_stats"])
        for name, new in batch["batch_stats"].items():
            old = module.get_variable("batch_stats", name) if count > 1 else new
            module.put_variable("batch_stats", name, old + (new - old) / count)
    if isinstance(norm, str):
        return output
    if isinstance(norm, InstanceAware):
        return instance_aware(layer, variables, x, batch["batch_stats"], norm.width)
    weight = source_weight(norm, size)
    blended = jax.tree.map(
        lambda source, test: (weight * source + (1 - weight) * test).astype(source.dtype),
        dict(variables["batch_stats"]),
        dict(batch["batch_stats"]),
    )
    return layer.apply({**variables, "batch_stats": blended}, x, True, mask=mask)  # type: ignore[return-value]
