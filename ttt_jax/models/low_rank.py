"""Low-rank leaves of ``qwix`` beside the kernels of a pretrained model."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from ttt_jax import _arguments, _contract, _extras
from ttt_jax.kernels import shared_outputs

_Module = TypeVar("_Module", bound=nn.Module)


def _patterns(place: str, name: str, value: Any) -> Any:
    many = [value] if isinstance(value, str) else value
    if not isinstance(many, list | tuple) or not many or not all(isinstance(p, str) for p in many):
        raise ValueError(
            f"{name} of low_rank must be a regular expression of module paths, or a list of them; "
            f"got {_contract.described(value) if callable(value) else repr(value)}."
        )
    return value


@_arguments.checked(
    module=_arguments.instance(nn.Module),
    rank=_arguments.count(1),
    alpha=_arguments.number(0.0, above=True),
    paths=_patterns,
)
def low_rank(
    module: _Module,
    params: Any,
    key: jax.Array,
    inputs: Any,
    *,
    rank: int,
    alpha: float,
    paths: str | Sequence[str] = (".*/query", ".*/value"),
) -> tuple[_Module, Any]:
    """Adds ``alpha / rank * a b`` to the kernels of some modules; ``b`` is zero at first.

    So the model computes what it did. The leaves are ``kernel_lora_a`` and ``kernel_lora_b``, which
    :func:`ttt_jax.select.lora` chooses.

    Args:
      module: an unbound Linen module.
      params: its variables.
      key: for the values of ``a`` (uniform, variance ``2 / inputs``).
      inputs: an example of the module's inputs; only shapes matter.
      rank: r of every pair of factors.
      alpha: the factor is ``alpha / rank``: with an ``alpha`` that grows with the rank, the size of
        a step does not depend on it.
      paths: regular expressions of module paths (``layers/mlp/down``), each a full match.

    Returns:
      The module with factors, and the variables with theirs.

    Raises:
      ImportError: ``qwix`` is missing.
      ValueError: an argument out of range, no module with a path that matches, one that multiplies
        parameters in a loop (the fast weights of a TTT layer), or variables that have low-rank
        leaves already.

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, Eq. 3.
    """
    qwix = _extras.load("qwix", "lora")
    given = traverse_util.flatten_dict(params, sep="/")
    if held := [path for path in given if re.search("_lora_[ab]$", path)]:
        raise ValueError(
            "low_rank needs variables without low-rank leaves, as a second call takes the first "
            f"one's out of the model; got {held[0]!r}: name all paths in one call."
        )
    pattern = paths if isinstance(paths, str) else "|".join(f"(?:{path})" for path in paths)
    provider = qwix.LoraProvider(module_path=pattern, rank=rank, alpha=alpha)
    widened = qwix.apply_lora_to_model(module, provider)

    def factors(key: jax.Array) -> dict[str, Any]:
        flat = traverse_util.flatten_dict(widened.init(key, inputs), sep="/")
        return {path: leaf for path, leaf in flat.items() if re.search("_lora_[ab]$", path)}

    try:
        # Compiled, so that the values of the base, which nobody asks for, are not computed.
        made = jax.jit(factors)(key)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "low_rank needs paths of modules that multiply their kernels outside of a loop; got "
            f"{paths!r}, among them one that does not, as a TTT layer with its fast weights: name "
            "projections, such as '.*ttt/.*' of one."
        ) from error
    if not made:
        known = sorted(
            path.removesuffix("/kernel").partition("/")[2]
            for path in given
            if path.endswith("/kernel")
        )
        raise ValueError(
            f"low_rank needs paths that match a module with a kernel; got {paths!r}. Modules: "
            f"{', '.join(known)}."
        )
    return widened, traverse_util.unflatten_dict(given | made, sep="/")


def narrow_factors(params: Any, dtype: Any) -> Any:
    """The variables with the low-rank leaves in the compute dtype.

    ``qwix`` multiplies them as they are, and a product of float32 is slow on matrix units. The
    gradient goes to the leaves that were given, in their own dtype.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(
        {
            path: _written_once(leaf.astype(dtype)) if re.search("_lora_[ab]$", path) else leaf
            for path, leaf in flat.items()
        },
        sep="/",
    )


@jax.custom_vjp
def _written_once(leaf: jax.Array) -> jax.Array:
    """The leaf; its gradient, which is put together from those of the layers, becomes an array.

    Without a loop over the layers XLA would else put it together anew inside every sum over it:
    the norm, the test for NaN, both moments.
    """
    return leaf


_written_once.defvjp(
    lambda leaf: (leaf, None),
    lambda _, cotangent: (jax.lax.optimization_barrier(cotangent),),
    **shared_outputs.DECLARED,
)


@_arguments.checked(rank=_arguments.count(1))
def pad_rank(params: Any, rank: int, like: Any = None) -> Any:
    """Low-rank leaves padded with zeros, so that tasks of several ranks and targets stack.

    What is added has gradient zero, as both of its factors are zero, and stays zero under any
    optimizer that does not move a leaf without a gradient. The model of the larger rank R computes
    ``alpha / R * a b``: build it with an ``alpha`` R / r times as large as that of rank r, and
    output, gradients and updates are those of rank r. With ``like``, of a model that has low-rank
    leaves in more places, a task whose own are in fewer gets factors of zeros in the others: it
    adapts its own alone, beside tasks that adapt all.

    Args:
      params: variables, or an adapter with None in place of the base's leaves.
      rank: R, at least that of every pair of factors.
      like: a tree of the same kind, with the leaves that the padded one is to have; None for those
        of ``params``. Its values do not matter.

    Returns:
      A tree like ``params``, and with ``like`` one of its layout but for the ranks.

    Raises:
      ValueError: no low-rank leaves, a larger rank among them, factors whose ranks differ, or, with
        ``like``, leaves that it does not have.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    pairs = _pairs_of("params", flat, params)
    for path in pairs:
        other = path.removesuffix("a") + "b"
        a, b = flat[path], flat.get(other)
        if b is None or b.ndim < 2 or a.shape[-1] != b.shape[-2] or a.shape[-1] > rank:
            shapes = f"{a.shape} and {None if b is None else b.shape}"
            raise ValueError(
                "rank must be at least the r of all factors [..., r] and [..., r, outputs]; got "
                f"{rank}, and factors of shapes {shapes} at {path!r}."
            )
        missing = rank - a.shape[-1]
        flat[path] = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        flat[other] = jnp.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, missing), (0, 0)])
    if like is not None:
        wanted = traverse_util.flatten_dict(like, sep="/")
        places = _pairs_of("like", wanted, like)
        if extra := sorted(set(flat) - set(wanted)):
            raise ValueError(
                f"like must have every leaf of params; it has none at {extra[0]!r}: give the "
                "variables, or the adapter, of the model with more low-rank leaves."
            )
        for path in set(places) - set(pairs):
            a, b = wanted[path], wanted[path.removesuffix("a") + "b"]
            flat[path] = jnp.zeros((*a.shape[:-1], rank), a.dtype)
            flat[path.removesuffix("a") + "b"] = jnp.zeros(
                (*b.shape[:-2], rank, b.shape[-1]), b.dtype
            )
        # In the order of the other, so that the trees are of one structure.
        flat = {path: flat.get(path) for path in wanted}
    return traverse_util.unflatten_dict(flat, sep="/")


def _pairs_of(name: str, flat: dict[str, Any], tree: Any) -> list[str]:
    """The paths of the first factors."""
    pairs = [path for path, leaf in flat.items() if path.endswith("_lora_a") and leaf is not None]
    if not pairs:
        raise ValueError(
            f"{name} of pad_rank must have leaves named ..._lora_a and ..._lora_b; got "
            f"{_contract.described(tree)} without: give the variables that low_rank returned, or "
            "select.lora().split of them."
        )
    return pairs
