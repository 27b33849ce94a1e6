"""The slips: what is passed in place of a right argument, by the kind of the parameter."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from tests.core import models
from tests.core.fuzz import things
from ttt_jax import losses, resets, select


class Slip(NamedTuple):
    """One wrong value.

    Attributes:
      name: of the slip.
      value: what is passed.
      expects: ``"refusal"``; ``"same"``, the value of the right call or a refusal; ``"nan"``, a
        result that is not finite or a refusal.
    """

    name: str
    value: Any
    expects: str = "refusal"


# Another thing of the contract, and what has nothing to do with it.
_STRANGE = {
    "text": "wrong",
    "none": None,
    "adapter": things.ADAPTER,
    "stream": things.STREAM,
    "selection": things.FEW,
    "reset": things.RESET,
    "function": things.main_loss,
    "number": 0.5,
    "module": things.MODULE,
    "optimizer": things.SGD,
    "array": things.LOGITS,
    "mapping": {"a": things.LOGITS},
    "key": things.KEY,
}
_ODD = ("text", "none", "adapter", "function", "number")


def _odd(*names: str) -> Iterator[Slip]:
    for name in names:
        yield Slip(name, _STRANGE[name])


def _count(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "function")
    yield Slip("half", valid + 0.5)
    yield Slip("nan", float("nan"))
    yield Slip("negative", -1)
    yield Slip("flag", True)
    yield Slip("list", [valid])
    yield Slip("numpy", np.int64(valid), "same")


def _number(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "function", "mapping")
    yield Slip("nan", float("nan"))
    yield Slip("numpy nan", np.float32("nan"))
    yield Slip("vector", np.full(2, valid, np.float32))
    yield Slip("complex", complex(valid, 1.0))
    yield Slip("numpy", np.float32(valid), "same")


def _flag(valid: bool) -> Iterator[Slip]:
    yield from _odd("none", "adapter", "function", "array")
    yield Slip("text", str(not valid))
    yield Slip("nan", float("nan"))
    yield Slip("number", 2)
    yield Slip("numpy", np.bool_(valid), "same")


def _text(valid: str) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "function", "number")
    yield Slip("upper", valid.upper() + "_")
    yield Slip("bytes", valid.encode())
    yield Slip("list", [valid])


def _array(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "function", "mapping")
    array = np.asarray(valid)
    yield Slip("list", array.tolist(), "same")
    yield Slip("strings", array.astype(str))
    yield Slip("higher rank", array[None])
    if array.ndim:
        yield Slip("lower rank", array[0])
    if array.dtype.kind == "f":
        yield Slip("nan", np.full_like(array, np.nan), "nan")
        yield Slip("complex", array.astype(np.complex64))


def _labels(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "function")
    yield Slip("list", valid.tolist(), "same")
    yield Slip("halves", valid + 0.5)
    yield Slip("nan", valid * np.nan)
    yield Slip("out of range", valid + 99)
    yield Slip("fewer", valid[:-1])
    yield Slip("higher rank", valid[None])


def _key(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "function")
    yield Slip("seed", 0)
    yield Slip("several", jax.random.split(things.KEY, 3))
    yield Slip("floats", np.zeros(2, np.float32))
    yield Slip("not called", jax.random.key)
    yield Slip("raw", jax.random.key_data(valid), "same")


def _keys(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "function")
    yield Slip("seeds", np.arange(len(valid)))
    yield Slip("one", valid[0])
    yield Slip("fewer", valid[:-1])
    yield Slip("higher rank", valid[None])
    yield Slip("list", list(valid), "same")


def _function(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "stream", "number", "module", "array")
    yield Slip("not called", losses.entropy)
    yield Slip("with params", (valid, things.PARAMS))


def _apply(valid: Any) -> Iterator[Slip]:
    yield from _function(valid)
    yield Slip("predictor", things.PREDICT)
    yield Slip("loss", things.entropy)


def _model(valid: Any) -> Iterator[Slip]:
    yield from _apply(valid)
    yield Slip("unbatched", ttt.unbatched(models.classify))
    yield Slip("unbatched, jitted", jax.jit(ttt.unbatched(models.classify)))


def _loss(valid: Any) -> Iterator[Slip]:
    yield from _function(valid)
    yield Slip("model function", models.classify)


def _predictor(valid: Any) -> Iterator[Slip]:
    yield from _function(valid)
    yield Slip("unbatched", things.one)
    yield Slip("batched", ttt.batched(things.PREDICT))
    yield Slip("model function", models.classify)


def _of_contract(own: str, factory: Any, valid: Any) -> Iterator[Slip]:
    names = ("text", "none", "number", "adapter", "stream", "selection", "reset", "optimizer")
    yield from _odd(*(name for name in names if name != own), "function")
    yield Slip("not called", factory)
    yield Slip("list", [valid])


def _params(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "adapter", "stream", "selection", "function", "module")
    yield Slip("not called", models.make_params)


def _record(valid: Any) -> Iterator[Slip]:
    yield from _odd("text", "none", "adapter", "function", "number", "module")


def _path(valid: Any) -> Iterator[Slip]:
    yield from _odd("none", "adapter", "function", "number", "array", "mapping")


OF_KIND: dict[str, Callable[[Any], Iterator[Slip]]] = {
    "count": _count,
    "number": _number,
    "flag": _flag,
    "text": _text,
    "array": _array,
    "labels": _labels,
    "key": _key,
    "keys": _keys,
    "function": _function,
    "apply": _apply,
    "model": _model,
    "loss": _loss,
    "predictor": _predictor,
    "params": _params,
    "record": _record,
    "from_source": _record,
    "task": _record,
    "path": _path,
    "adapter": functools.partial(_of_contract, "adapter", ttt.gradient_adapter),
    "stream": functools.partial(_of_contract, "stream", ttt.online),
    "selection": functools.partial(_of_contract, "selection", select.everything),
    "reset": functools.partial(_of_contract, "reset", resets.never),
    "optimizer": functools.partial(_of_contract, "optimizer", optax.sgd),
    "tree": lambda valid: _odd("text", "adapter", "function", "module", "selection", "optimizer"),
}


def of_nothing() -> Iterator[Slip]:
    """For an argument that is left out of the right call."""
    return _odd("text", "adapter", "function", "module")


def is_nan(tree: Any) -> bool:
    """Whether any number of a result is not finite."""
    leaves = [
        leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") or isinstance(leaf, float)
    ]
    floats = [leaf for leaf in leaves if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)]
    return any(not np.isfinite(np.asarray(leaf)).all() for leaf in floats)
