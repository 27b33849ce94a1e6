"""Checks of what is given where the contract asks for one of its things.

Each failure is one sentence with the argument's name, what was given, and the fix. All are made
at construction, or while tracing: a compiled program holds none of them.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import _checks, _trees, base
from ttt_jax.base import Params

_MADE_BY = {
    base.Adapter: "ttt_jax.gradient_adapter(loss, optimizer, select=...)",
    base.Selection: "ttt_jax.select.everything()",
    base.Reset: "ttt_jax.resets.never()",
    base.Stream: "ttt_jax.online(adapter, apply, reset=...)",
}
KINDS = (
    *(base.Adapter, base.Selection, base.Reset, base.Stream),
    *(base.StatefulLoss, base.FromSource, base.AdapterState),
)


class OneInstance:
    """What ``unbatched`` returns: a model function at N = 1, known from one over a batch."""

    def __init__(self, apply: Callable[..., Any]):
        self._apply = apply

    def __call__(self, params: Params, x: Any, *rest: Any) -> Any:
        outputs = self._apply(params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x), *rest)
        return jax.tree.map(lambda leaf: leaf[0], outputs)


class OverInstances:
    """What ``batched`` returns: a predictor over many instances, known from one over one."""

    def __init__(self, run: Callable[..., Any]):
        self._run = run

    def __call__(self, params: Params, xs: Any, keys: Any) -> Any:
        return self._run(params, xs, keys)


def _plain(value: Any) -> Any:
    """The function within ``functools.partial`` and ``jax.jit``, which change no shape."""
    while True:
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, jax.stages.Wrapped) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        else:
            return value


def is_unbatched(value: Any) -> bool:
    """Whether a function is one that ``unbatched`` returned."""
    return isinstance(_plain(value), OneInstance)


def _is_factory(value: Any) -> bool:
    """Whether a function is one of the library itself: what those return are closures."""
    module = getattr(value, "__module__", None) or ""
    if not inspect.isfunction(value) or not module.startswith("ttt_jax."):
        return False
    return getattr(sys.modules.get(module), value.__name__, None) is value


def article(word: str) -> str:
    return f"{'an' if word[0] in 'AEIOUaeiou' else 'a'} {word}"


def described(value: Any) -> str:
    """What was given, in words: a kind of the contract, a function, a module, a value."""
    if isinstance(value, KINDS):
        return article(type(value).__name__)
    if inspect.isfunction(value):
        return f"the function {value.__name__}"
    if isinstance(value, OneInstance):
        return "unbatched(apply)"
    if isinstance(value, OverInstances):
        return "batched(predictor)"
    if isinstance(value, str | bytes | int | float | complex | np.generic):
        return f"{type(value).__name__} {value!r}"
    if value is None:
        return "None"
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, value))}"
    return article(type(value).__name__)


def _called(value: Any) -> str:
    """How a factory that was given in place of its result is called."""
    parameters = inspect.signature(value).parameters.values()
    needs = any(
        parameter.default is parameter.empty and parameter.kind != parameter.VAR_POSITIONAL
        for parameter in parameters
    )
    place = value.__module__.removeprefix("ttt_jax.").split(".")[0]
    return f"{place}.{value.__name__}({'...' if needs else ''})"


def require(argument: str, value: Any, kind: type) -> None:
    """Raises ``TypeError`` unless ``value`` is of this kind of the contract."""
    if isinstance(value, kind):
        return
    fix = f": make one with {_MADE_BY[kind]}" if kind in _MADE_BY else ""
    if _is_factory(value):
        fix = f": call {_called(value)}"
    raise TypeError(f"{argument} must be {article(kind.__name__)}; got {described(value)}{fix}.")


def is_flax(value: Any) -> bool:
    """Whether an object is of a class of flax or derived from one."""
    return any(cls.__module__.partition(".")[0] == "flax" for cls in type(value).__mro__)


def require_function(argument: str, value: Any, form: str, count: int | None = None) -> None:
    """Raises ``TypeError`` unless ``value`` may be called with the arguments of ``form``.

    Args:
      argument: the name that the message begins with.
      value: what was given.
      form: in words, ``"(params, x, key) -> scalar"``.
      count: of its arguments; read from ``form`` where it begins with them.
    """
    rule = f"{argument} must be a function {form}; got {described(value)}"
    if is_flax(value):
        raise TypeError(f"{rule}: build it with models.from_linen or models.from_nnx.")
    if isinstance(value, tuple) and not isinstance(value, KINDS) and value and callable(value[0]):
        raise TypeError(f"{rule}: pass its first entry (from_nnx returns a function and params).")
    if not callable(value):
        raise TypeError(f"{rule}. Pass the function itself.")
    if _is_factory(value) and value.__module__.startswith(_FACTORIES):
        raise TypeError(f"{rule}, which builds one: call {_called(value)}.")
    if count is None and form.startswith("(") and "..." not in form:
        count = len(_WITHIN.sub("", form[1 : form.index(")")]).split(","))
    if count is not None and not _takes(value, count):
        raise TypeError(f"{rule}, which does not take {count} arguments: wrap it in one that does.")


# The axes of an argument, as in "(params, inputs[N, ...])".
_WITHIN = re.compile(r"\[[^]]*\]")


def _takes(value: Any, count: int) -> bool:
    """Whether a function can be called with so many arguments by position, as far as it says."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


_FACTORIES = (
    *("ttt_jax.losses.", "ttt_jax.predictors", "ttt_jax.online", "ttt_jax.batching"),
    *("ttt_jax.methods.", "ttt_jax.resets", "ttt_jax.select", "ttt_jax.adapters"),
)


def require_model_function(
    place: str, value: Any, name: str = "apply", extra: int | None = 0
) -> None:
    """Raises ``TypeError`` unless ``value`` may be a model function over a batch.

    Args:
      place: the public function, such as ``losses.entropy``.
      value: what was given.
      name: of the argument.
      extra: how many arguments follow the inputs: a mask, a key; ``None`` for any number.
    """
    argument = f"{name}, the model function of {place},"
    form = f"(params, inputs[N, ...]{'' if extra == 0 else ', ...'})"
    require_function(argument, value, form, None if extra is None else 2 + extra)
    if is_unbatched(value):
        raise TypeError(
            f"{name}: {place} needs the model function itself, over inputs[N, ...]; got "
            "unbatched(apply), which adds that axis on its own: pass apply."
        )


def require_predictor(argument: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` may be a predictor over one instance."""
    if isinstance(value, base.Stream):
        raise TypeError(
            f"{argument} must be a predictor (params, x, key) -> (output, Info); got a Stream: "
            "scan its step, or make a predictor of it with ttt_jax.episode or ttt_jax.unroll."
        )
    require_function(argument, value, "(params, x, key) -> (output, Info)")
    if is_unbatched(value):
        raise TypeError(
            f"{argument} must be a predictor (params, x, key) -> (output, Info); got "
            "unbatched(apply): wrap it in ttt_jax.source or ttt_jax.episodic."
        )
    if isinstance(_plain(value), OverInstances):
        raise TypeError(
            f"{argument} must be a predictor over one instance; got batched(predictor), which runs "
            "over many already: pass the predictor itself."
        )


def require_key(place: str, key: Any, *, maps: bool = False) -> None:
    """Raises unless ``key`` is one PRNG key: the contract's typed one, or raw ``uint32`` data.

    Where ``place`` maps over keys made of it, or a caller's own ``vmap`` maps over it, a generator
    whose draws depend on the rest of the batch is refused too.
    """
    shape = getattr(key, "shape", ())
    typed = _trees.is_key(key)
    raw = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and len(shape) == 1
    if (typed and shape == ()) or raw:
        # What vmap maps over says which axis it is; its type is not public.
        if maps or getattr(key, "batch_dim", None) is not None:
            _checks.check_mapped_keys(place if maps else f"{place} under vmap", key)
        return
    if typed:
        raise ValueError(
            f"{place} needs one key per instance; got keys of shape {shape}. Run many instances "
            "with ttt_jax.batched."
        )
    raise TypeError(
        f"{place} needs a typed PRNG key; got key = {described(key)}. Make one with "
        "jax.random.key(seed), or many with ttt_jax.sample_keys."
    )


def require_array(place: str, output: Any, role: str = "logits") -> None:
    """Raises ``TypeError`` where a model function returned several outputs in place of one."""
    if hasattr(output, "shape") and hasattr(output, "dtype"):
        return
    entry = ""
    if isinstance(output, Mapping) and output:
        name = role if role in output else next(iter(output))
        entry = f"[{name!r}]"
    elif isinstance(output, tuple | list) and output:
        entry = f".{output._fields[0]}" if hasattr(output, "_fields") else "[0]"
    what = described(output)
    if isinstance(output, tuple | list):
        what = f"a {type(output).__name__} of {len(output)}"
    raise TypeError(
        f"{place} needs a model function that returns one array; it returned {what}: select the "
        f"{role}, as in lambda params, x: apply(params, x){entry}."
    )
