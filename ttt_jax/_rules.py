"""Rules of arguments: what is refused, in one sentence with the name, the value and the fix."""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ttt_jax import _checks, _contract, _trees, base

Rule = Callable[[str, str, Any], Any]
"""``(place, name, value) -> value``: raises, or returns what the function is given."""


def _refuse(name: str, rule: str, value: Any, fix: str = "") -> typing.NoReturn:
    end = f": {fix}." if fix else "."
    raise TypeError(f"{name} must be {rule}; got {_contract.described(value)}{end}")


def function(count: int, form: str = "") -> Rule:
    """A function that takes so many arguments."""
    words = form or f"of {count} argument{'s' * (count != 1)}"

    def rule(place: str, name: str, value: Any) -> Any:
        _contract.require_function(name, value, words, count)
        return value

    return rule


def model(place: str, name: str, value: Any) -> Any:
    """A model function over a batch."""
    _contract.require_model_function(place, value, name, extra=int(name == "reconstruct"))
    return value


def loss(place: str, name: str, value: Any) -> Any:
    """An ``AuxLoss`` or a ``StatefulLoss``."""
    return value if isinstance(value, base.StatefulLoss) else plain_loss(place, name, value)


def predictor(place: str, name: str, value: Any) -> Any:
    """A predictor over one instance."""
    _contract.require_predictor(name, value)
    return value


def plain_loss(place: str, name: str, value: Any) -> Any:
    """An ``AuxLoss``."""
    if isinstance(value, base.StatefulLoss):
        fix = "wrap a loss with a memory in one that starts from loss.init(params)"
        _refuse(name, "a function (params, x, key) -> scalar", value, fix)
    _contract.require_function(name, value, "(params, x, key) -> scalar")
    return value


def optimizer(place: str, name: str, value: Any) -> Any:
    """An optax transformation."""
    if not all(callable(getattr(value, part, None)) for part in ("init", "update")):
        fix = "Call a factory with its step size"
        raise TypeError(
            f"{name} must be an optax transformation such as optax.sgd(1e-3); got "
            f"{_contract.described(value)}. {fix}."
        )
    return value


def instance(*kinds: type) -> Rule:
    """An object of a class."""

    def rule(place: str, name: str, value: Any) -> Any:
        if not isinstance(value, kinds):
            if len(kinds) == 1 and kinds[0].__module__ == "ttt_jax.base":
                _contract.require(name, value, kinds[0])
            _refuse(name, " or ".join(_contract.article(kind.__name__) for kind in kinds), value)
        return value

    return rule


def having(what: str, *parts: str) -> Rule:
    """An object with these attributes."""

    def rule(place: str, name: str, value: Any) -> Any:
        if not all(hasattr(value, part) for part in parts):
            _refuse(name, f"{what} (with {', '.join(parts)})", value)
        return value

    return rule


def iterable(place: str, name: str, value: Any) -> Any:
    """What a ``for`` goes through."""
    if isinstance(value, (str, bytes, *_contract.KINDS)) or not hasattr(value, "__iter__"):
        _refuse(name, "an iterable, such as a list", value)
    return value


def named(place: str, name: str, value: Any) -> Any:
    """The name of a method, or a function of a module."""
    if not (isinstance(value, str) or callable(value)) or isinstance(value, _contract.KINDS):
        _refuse(name, "the name of a method or a function", value)
    return value


def params_or_function(place: str, name: str, value: Any) -> Any:
    """Parameters, or a function of no arguments that gives them."""
    if inspect.isroutine(value) or isinstance(value, functools.partial):
        return value
    return params(place, name, value)


def flag(place: str, name: str, value: Any) -> bool:
    """True or False, which decides while tracing and so has no array form."""
    if not isinstance(value, bool | np.bool_):
        _refuse(name, "True or False", value)
    return bool(value)


def text(place: str, name: str, value: Any) -> str:
    """A ``str``."""
    if not isinstance(value, str):
        _refuse(name, "a str", value)
    return value


def path(place: str, name: str, value: Any) -> Any:
    """A ``str`` or a path object."""
    if not isinstance(value, str) and not hasattr(value, "__fspath__"):
        _refuse(name, "a path", value)
    return value


def mapping(place: str, name: str, value: Any) -> Any:
    """A dict or another mapping."""
    if not isinstance(value, Mapping) and not hasattr(value, "keys"):
        _refuse(name, "a mapping such as a dict", value)
    return value


def sequence(*kinds: type) -> Rule:
    """A list or tuple (or an array, of numbers), all of its members of a class."""

    def rule(place: str, name: str, value: Any) -> Any:
        arrays = isinstance(value, np.ndarray | jax.Array) and value.ndim == 1
        if isinstance(value, _contract.KINDS) or not (
            arrays or (isinstance(value, Sequence) and not isinstance(value, str | bytes))
        ):
            _refuse(name, "a list or a tuple", value)
        known = tuple(kind for kind in kinds if kind is not float)
        for member in value if known else ():
            if known == (int,):
                integer(place, name, member)
                continue
            if not isinstance(member, known):
                names = " or ".join(kind.__name__ for kind in known)
                _refuse(name, f"a list of {names}", member)
        return value

    return rule


def plain_number(place: str, name: str, value: Any) -> Any:
    """A NumPy number as Python's own; of which range or kind it is, the function knows.

    NumPy's have a dtype of their own, which would widen a computation in bfloat16.
    """
    single = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim)
    return value.item() if single else value


def integer(place: str, name: str, value: Any) -> int:
    """A static integer, whose range the function knows."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        _refuse(name, "an integer", value)
    return int(value)


def count(least: int = 1) -> Rule:
    """A static integer of at least ``least``."""
    return lambda place, name, value: _checks.check_count(name, value, least)


def number(low: float = -np.inf, high: float = np.inf, *, above: bool = False) -> Rule:
    """One number in a range, as far as it is known; a traced one is taken as it is."""

    def rule(place: str, name: str, value: Any) -> Any:
        _checks.check_number(name, value, low, high, above=above)
        return plain_number(place, name, value)

    return rule


def array(
    *ranks: int, kinds: str = "fiub", host: bool = False, like: str = "", finite: bool = False
) -> Rule:
    """An array of numbers, or lists that make one, of one of these ranks (of any, without).

    Args:
      *ranks: how many axes it may have.
      kinds: NumPy's letters of the dtypes.
      host: whether lists become NumPy arrays, rather than jax's.
      like: the shape in words.
      finite: whether nan and infinity are refused where the values are known.
    """
    shapes = {0: "a number", 1: "[N]", 2: "[N, D]", 3: "[H, W, C]", 4: "[N, H, W, C]"}
    due = like or " or ".join(shapes[rank] for rank in ranks)
    rule_text = f"an array{' ' * bool(due)}{due} of {'finite ' * finite}numbers"

    def rule(place: str, name: str, value: Any) -> Any:
        given = value
        # A record is a tuple, too.
        if isinstance(value, str | bytes | dict | None) or hasattr(value, "_fields"):
            _refuse(name, rule_text, value)
        if not isinstance(value, jax.Array | np.ndarray):
            try:
                value = np.asarray(value) if host else jnp.asarray(value)
            except (TypeError, ValueError, OverflowError):
                _refuse(name, rule_text, value)
        kind = "k" if _trees.is_key(value) else _kind(value.dtype)
        if kind not in kinds or (ranks and value.ndim not in ranks):
            raise ValueError(f"{name} must be {rule_text}; got {_contract.described(given)}.")
        known = _checks.known(value) if finite and kind == "f" else None
        if known is not None and not np.isfinite(known.astype(np.float32)).all():
            worst = known[~np.isfinite(known.astype(np.float32))].flat[0]
            raise ValueError(f"{name} must be {rule_text}; got {worst}, NaN or infinity.")
        return value if host or not isinstance(value, np.ndarray) else jnp.asarray(value)

    return rule


def _kind(dtype: Any) -> str:
    # bfloat16 and its kin are floating to jax alone.
    return "f" if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype).kind


def one_key(place: str, name: str, value: Any) -> Any:
    """One PRNG key."""
    _contract.require_key(place, value)
    return value


def many_keys(place: str, name: str, value: Any) -> Any:
    """Typed keys [N], or a list of them."""
    if isinstance(value, list | tuple) and value and all(map(_trees.is_key, value)):
        value = jnp.stack(value)
    if not _trees.is_key(value) or value.ndim != 1:
        raise ValueError(
            f"{place} needs {name}, typed PRNG keys [N]; got {_contract.described(value)}. Make "
            "them with ttt_jax.sample_keys(jax.random.key(seed), ids)."
        )
    return value


def params(place: str, name: str, value: Any) -> Any:
    """Parameters: any pytree but a function, a module or a thing of the contract."""
    if _is_no_tree(value):
        _refuse(name, "a pytree of arrays, such as a dict", value)
    return value


def tree(place: str, name: str, value: Any) -> Any:
    """Any pytree, but no function, text, or thing of the contract."""
    if _is_no_tree(value):
        _refuse(name, "data", value)
    return value


def _is_no_tree(value: Any) -> bool:
    strange = isinstance(value, (str, bytes, type, optax.GradientTransformation, *_contract.KINDS))
    # Modules that are trees may be callable, too: those hold their parameters.
    lone = callable(value) or _contract.is_flax(value)
    return strange or (lone and jax.tree_util.all_leaves([value]))


def count_or(word: str) -> Rule:
    """A count, 0 included, or one word."""

    def rule(place: str, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return _checks.check_count(name, value, 0)
        if value != word:
            raise ValueError(f"{name} must be a number, None or {word!r}; got {value!r}.")
        return value

    return rule
