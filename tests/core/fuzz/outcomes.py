"""What comes back from a call with a slip.

Clear is a ValueError or TypeError raised in ``ttt_jax`` whose text holds the argument's name and
the value. Unclear is any other error. What returns is compared with an independent expectation:
right where it is met, silent where it is not or where there is none.
"""

import collections
import itertools
import pathlib
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import ttt_jax
from tests.core.fuzz import kinds, slips
from tests.core.fuzz.calls import Call

CLEAR, RIGHT, UNCLEAR, SILENT = "clear", "right", "unclear", "silent"
_LIBRARY = str(pathlib.Path(ttt_jax.__file__).parent)


class Outcome(NamedTuple):
    """One call: the function, the slip (``"argument: slip"``), the class, and what was seen."""

    function: str
    slip: str
    outcome: str
    seen: str


def slips_of(call: Call) -> Iterator[tuple[str, dict[str, Any], slips.Slip]]:
    """``(argument, changed arguments, slip)`` for every slip that the signature offers."""
    parameters = call.parameters()
    for name, parameter in parameters.items():
        kind = call.kind(name)
        if kind is None or name not in call.arguments or parameter.kind is parameter.VAR_KEYWORD:
            continue
        valid = call.arguments[name]
        rest = parameter.kind is parameter.VAR_POSITIONAL
        if valid is None:
            offered = slips.of_nothing()
        else:
            offered = slips.OF_KIND[kind](valid[0] if rest else valid)
        for slip in offered:
            if slip.name == "none" and kinds.optional(parameter):
                continue
            value = (slip.value, *valid[1:]) if rest else slip.value
            yield name, {name: value}, slip
    for name, value in call.ranges.items():
        for number, wrong in enumerate(value if isinstance(value, tuple) else (value,)):
            yield name, {name: wrong}, slips.Slip(f"out of range {number}", wrong)
    named = [
        name
        for name, p in parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD and name in call.arguments and call.kind(name)
    ]
    for first, second in itertools.pairwise(named):
        if p_kind(call, first) != p_kind(call, second):
            swapped = {first: call.arguments[second], second: call.arguments[first]}
            yield first, swapped, slips.Slip(f"swapped with {second}", swapped[first])


def p_kind(call: Call, name: str) -> str:
    """Kinds of one form are one: two functions of as many arguments cannot be told apart."""
    kind = call.kind(name) or ""
    return "function" if kind in ("model", "apply", "function") else kind


def _shown(value: Any) -> set[str]:
    """The texts that show a value."""
    texts = {repr(value), str(value), type(value).__name__, getattr(value, "__name__", "")}
    if isinstance(value, jax.Array | np.ndarray):
        # In jax's own width, too.
        texts |= {str(value.shape), str(value.dtype), str(value.dtype).replace("64", "32")}
        number = getattr(value.dtype, "kind", "") in ("f", "i", "u", "b")
        flat = np.asarray(value).reshape(-1) if number else ()
        texts |= {f"{entry:g}" for entry in flat[:1]} | {str(entry) for entry in flat[:1]}
    if isinstance(value, list | tuple | set | dict):
        members = value.values() if isinstance(value, dict) else value
        texts |= {text for member in members for text in _shown(member)}
    if isinstance(value, float | int | np.generic) and not isinstance(value, bool):
        texts |= {f"{value:g}" if isinstance(value, float | int) else ""}
    if isinstance(value, np.generic):
        texts |= {str(value.shape), str(value.dtype)}
    if isinstance(value, dict):
        texts |= {repr(key) for key in value}
    if callable(value):
        texts |= {"unbatched(apply)", "batched(predictor)"}
    return {text for text in texts if text}


def _is_clear(error: BaseException, changes: dict[str, Any], slip: slips.Slip) -> bool:
    if not isinstance(error, ValueError | TypeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.startswith(_LIBRARY):
        return False
    text = str(error)
    named = any(re.search(rf"\b{name}\b", text) for name in changes)
    values = [slip.value, *changes.values()]
    return named and any(shown in text for value in values for shown in _shown(value))


def _traced(call: Call, result: Any) -> Any:
    """A jaxpr of the use of a result, or the result itself."""
    if call.use is None:
        return result
    closed = jax.make_jaxpr(lambda: call.use(result))()
    text = re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr))
    # As a float32 prints it, whether it came from Python or from NumPy.
    return re.sub(r"\d+\.\d+(e[+-]?\d+)?", lambda m: f"{float(m[0]):.4g}", text), closed.consts


def _same(a: Any, b: Any) -> bool:
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(_equal(x, y) for x, y in zip(leaves, others, strict=True))


def _is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, str) or callable(x):
        return x == y or callable(x)
    x, y = (np.asarray(jax.random.key_data(v) if _is_key(v) else v) for v in (x, y))
    if x.dtype.kind not in "fiub":
        return bool(x.shape == y.shape and (x == y).all())
    return x.shape == y.shape and np.allclose(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


def _used(call: Call, result: Any) -> None:
    if call.use is not None:
        jax.eval_shape(lambda: call.use(result))


def _begun(result: Any) -> Any:
    """The first entry of a generator, whose checks may wait for it."""
    return next(result) if isinstance(result, Iterator) else result


class Runner:
    """Runs the slips of one function; what the right call gives is computed once."""

    def __init__(self, name: str, call: Call):
        self._name, self._call = name, call
        self._expected: Any = None

    def right(self) -> Any:
        if self._expected is None:
            self._expected = _traced(self._call, _begun(self._call.result()))
        return self._expected

    def _value(self, result: Any) -> Any:
        return jax.jit(result)() if self._call.traced else result

    def _is_right(self, result: Any) -> bool:
        """Whether a result has the program of the right call, or else its value."""
        if _same(_traced(self._call, result), self.right()):
            return True
        if not self._call.traced:
            return False
        return _same(self._value(result), self._value(self._call.result()))

    def _all_right(self) -> bool:
        """Whether the right forms of all arguments together give what the right call gives."""
        if self._call.only_refusals:
            return False
        changes: dict[str, Any] = {}
        for argument, change, slip in slips_of(self._call):
            if slip.expects == "same" and not self._is_allowed(argument, slip):
                changes |= change
        return self._outcome("", changes, slips.Slip("together", None, "same"))[0] == RIGHT

    def _is_allowed(self, argument: str, slip: slips.Slip) -> bool:
        names = {argument, f"{argument}: {slip.name}", f"*: {slip.name}"}
        return bool(names & self._call.allowed)

    def outcomes(self) -> list[Outcome]:
        found, all_right = [], self._all_right()
        for argument, changes, slip in slips_of(self._call):
            label = f"{argument}: {slip.name}"
            if self._is_allowed(argument, slip):
                continue
            if self._call.only_refusals and slip.expects != "refusal":
                continue
            if slip.expects == "same" and all_right:
                found.append(Outcome(self._name, label, RIGHT, "together with the others"))
                continue
            found.append(Outcome(self._name, label, *self._outcome(argument, changes, slip)))
        return found

    def _outcome(self, argument: str, changes: dict, slip: slips.Slip) -> tuple[str, str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = _begun(self._call.result(**changes))
                if slip.expects == "same":
                    return (RIGHT if self._is_right(result) else SILENT), "differs"
                _used(self._call, result)
        except Exception as error:
            clear = _is_clear(error, changes, slip)
            return (CLEAR if clear else UNCLEAR), f"{type(error).__name__}: {error}"
        if slip.expects == "nan" and slips.is_nan(self._value(result)):
            return RIGHT, "nan"
        return SILENT, f"returned {type(result).__name__}"


def counted(outcomes: list[Outcome]) -> dict[str, int]:
    """How many calls, and of each class."""
    count = collections.Counter(outcome.outcome for outcome in outcomes)
    return {"calls": len(outcomes), **{n: count[n] for n in (CLEAR, RIGHT, UNCLEAR, SILENT)}}
