"""Selections: which parameters adapt.

A selection offers floating-point leaves only, never an integer or key leaf. Where ``params``
has a top-level ``params`` collection (the Linen layout), nothing outside it is offered, except
by :func:`statistics`. A selection that matches nothing raises ``ValueError`` naming the
nearest paths: a silent no-op is the most common mistake in test-time adaptation.
"""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _contract, _trees
from ttt_jax.base import Params, Selection

__all__ = [
    "Description",
    "biases",
    "describe",
    "everything",
    "exclude",
    "lora",
    "norm_affine",
    "paths",
    "statistics",
    "union",
]


class _Leaf(NamedTuple):
    """A leaf, its ``a/b/c`` path, and the parts of it: a name may itself hold slashes."""

    path: str
    parts: tuple[str, ...]
    value: Any


_Chooser = Callable[[list[_Leaf]], list[bool]]


def _leaves(params: Params) -> list[_Leaf]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_trees.is_hole)
    return [
        _Leaf(_trees.path_name(path), tuple(_trees.path_name((part,)) for part in path), leaf)
        for path, leaf in flat
    ]


def _last(leaf: _Leaf) -> str:
    return leaf.parts[-1] if leaf.parts else ""


def _in_collection(named: list[_Leaf], collection: str | None = None) -> list[bool]:
    """Which leaves lie where a selection may choose."""
    if collection is None:
        has_params = any(leaf.parts[:1] == ("params",) for leaf in named)
        collection = "params" if has_params else None
    return [collection is None or leaf.parts[:1] == (collection,) for leaf in named]


def _offered(named: list[_Leaf], collection: str | None = None) -> list[bool]:
    """Which leaves may be chosen at all."""
    inside = _in_collection(named, collection)
    return [ok and _trees.is_floating(leaf.value) for leaf, ok in zip(named, inside, strict=True)]


@functools.cache
def _warn_complex(what: str, left_out: tuple[str, ...]) -> None:
    warnings.warn(
        f"A selection offers real floating-point leaves; {what} also matches the complex "
        f"{', '.join(left_out)}, which stay frozen. Hold the real and the imaginary part as two "
        "leaves to adapt them.",
        stacklevel=5,
    )


def _check_complex(what: str, named: list[_Leaf], test: Callable[[_Leaf], bool]) -> None:
    """Warns once of complex leaves that match by name: none is ever dropped in silence."""
    inside = _in_collection(named)
    left_out = tuple(
        leaf.path
        for leaf, ok in zip(named, inside, strict=True)
        if ok and _trees.is_complex(leaf.value) and test(leaf)
    )
    if left_out:
        _warn_complex(what, left_out)


def _as_array(leaf: Any) -> Any:
    """A Python number as the array that it is in a compiled call."""
    return jnp.asarray(leaf, float) if isinstance(leaf, float) else leaf


def _from_chooser(choose: _Chooser) -> Selection:
    """Builds a selection from ``choose(named leaves) -> mask``, which raises on no match."""

    def split(params: Params) -> tuple[Any, Any]:
        named = _leaves(params)
        mask = choose(named)
        treedef = jax.tree.structure(params, is_leaf=_trees.is_hole)
        pairs = [(leaf.value, keep) for leaf, keep in zip(named, mask, strict=True)]
        fast = [_as_array(leaf) if keep else None for leaf, keep in pairs]
        frozen = [None if keep else leaf for leaf, keep in pairs]
        return jax.tree.unflatten(treedef, fast), jax.tree.unflatten(treedef, frozen)

    return Selection(split, _merge)


def _merge(fast: Any, frozen: Any) -> Params:
    return jax.tree.map(lambda a, b: b if a is None else a, fast, frozen, is_leaf=_trees.is_hole)


def _matching(
    description: str, test: Callable[[_Leaf], bool], *, collection: str | None = None
) -> Selection:
    """Selects the offered leaves whose path passes ``test``."""

    def choose(named: list[_Leaf]) -> list[bool]:
        offered = _offered(named, collection)
        mask = [ok and test(leaf) for leaf, ok in zip(named, offered, strict=True)]
        _check_complex(description, named, test)
        if not any(mask):
            _raise_empty(description, named, offered)
        return mask

    return _from_chooser(choose)


def _raise_empty(
    what: str, named: list[_Leaf], offered: list[bool], pattern: str | None = None
) -> None:
    pool = [leaf.path for leaf, ok in zip(named, offered, strict=True) if ok]
    if not pool:
        raise ValueError(
            f"A selection must match at least one parameter; {what} was given a tree without any "
            "floating-point leaf that it may choose. Pass the parameters of the model."
        )
    # Without its wildcards a pattern is closest in spelling to the path that was meant.
    plain = what if pattern is None else re.sub(r"\.\*|\.\+|[\\^$()?]", "", pattern)
    near = ", ".join(_trees.nearest(plain, pool))
    raise ValueError(
        f"A selection must match at least one parameter; {what} matches none of the "
        f"{len(pool)} on offer. Nearest paths: {near}. See ttt_jax.select.describe."
    )


@_arguments.checked()
def paths(*regex: str) -> Selection:
    r"""Leaves whose whole ``a/b/c`` path matches one of the regular expressions.

    Args:
      *regex: patterns for ``re.fullmatch``; in the Linen layout a path begins with ``params/``.

    Returns:
      A selection. Splitting raises ``ValueError`` if any one pattern matches nothing.

    Raises:
      ValueError: no pattern was given, or one is not a regular expression.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"encoder": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(2)}}
      >>> fast, frozen = paths(r"encoder/.*").split(params)
      >>> fast["head"]["kernel"] is None, frozen["encoder"]["kernel"] is None
      (True, True)
    """
    if not regex:
        raise ValueError("select.paths needs at least one pattern, got none. Try paths('.*').")
    compiled = []
    for pattern in regex:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"select.paths: regex takes regular expressions; {pattern!r} is not one ({error})."
            ) from error

    def choose(named: list[_Leaf]) -> list[bool]:
        offered = _offered(named)
        mask = [False] * len(named)
        for pattern in compiled:
            matches = functools.partial(_matches, pattern)
            hits = [ok and matches(leaf) for leaf, ok in zip(named, offered, strict=True)]
            _check_complex(f"regex pattern {pattern.pattern!r}", named, matches)
            if not any(hits):
                _raise_empty(f"regex pattern {pattern.pattern!r}", named, offered, pattern.pattern)
            mask = [a or b for a, b in zip(mask, hits, strict=True)]
        return mask

    return _from_chooser(choose)


def _matches(pattern: re.Pattern[str], leaf: _Leaf) -> bool:
    return pattern.fullmatch(leaf.path) is not None


def norm_affine() -> Selection:
    """The affine parameters of normalisation layers, whatever the layers are called.

    That is the ``scale`` leaf, and its sibling ``bias``, of any module that has a ``scale`` and
    neither a ``kernel`` nor an ``embedding`` (Tent, EATA and SAR adapt these). What a module holds
    is read from the tree: slashes within a name (``nn.WeightNorm``) make no module.
    """

    def choose(named: list[_Leaf]) -> list[bool]:
        offered = _offered(named)
        leaves: dict[tuple[str, ...], set[str]] = {}
        for leaf in named:
            # A quantized kernel is not on offer, yet its scale is no normalization.
            if leaf.value is not None:
                leaves.setdefault(leaf.parts[:-1], set()).add(_last(leaf))
        norms = {
            module
            for module, names in leaves.items()
            if "scale" in names and not names & {"kernel", "embedding"}
        }
        mask = [
            ok and leaf.parts[:-1] in norms and _last(leaf) in ("scale", "bias")
            for leaf, ok in zip(named, offered, strict=True)
        ]
        if not any(mask):
            _raise_empty("norm_affine() (a module with a scale)", named, offered)
        return mask

    return _from_chooser(choose)


def biases() -> Selection:
    """Every leaf called ``bias`` (BitFit), those of normalisation layers included."""
    return _matching("biases() (a leaf called bias)", lambda leaf: _last(leaf) == "bias")


def everything() -> Selection:
    """Every floating-point parameter."""
    return _matching("everything()", lambda leaf: True)


def lora() -> Selection:
    """Low-rank factors: leaves whose last path part contains ``lora_a`` or ``lora_b``.

    ``qwix.apply_lora_to_model`` names its leaves so.
    """
    return _matching(
        "lora() (a leaf whose name contains lora_a or lora_b)",
        lambda leaf: "lora_a" in _last(leaf) or "lora_b" in _last(leaf),
    )


def statistics() -> Selection:
    """Running normalisation statistics: the floating leaves of the ``batch_stats`` collection."""
    return _matching(
        "statistics() (the batch_stats collection)", lambda leaf: True, collection="batch_stats"
    )


def _mask(selection: Selection, params: Params) -> list[bool]:
    fast, _ = selection.split(params)
    return [leaf is not None for _, leaf in _trees.named_leaves(fast)]


def _combined(combine: Callable[[Params], list[bool]]) -> Selection:
    def split(params: Params) -> tuple[Any, Any]:
        mask = combine(params)
        return _from_chooser(lambda named: mask).split(params)

    return Selection(split, _merge)


@_arguments.checked()
def union(*selections: Selection) -> Selection:
    """Leaves chosen by at least one of the selections; each must match something."""
    if not selections:
        raise ValueError("select.union needs at least one selection, got none.")
    for selection in selections:
        _contract.require("select.union: a selection", selection, Selection)

    def combine(params: Params) -> list[bool]:
        masks = [_mask(selection, params) for selection in selections]
        return [any(flags) for flags in zip(*masks, strict=True)]

    return _combined(combine)


@_arguments.checked()
def exclude(base: Selection, *minus: Selection) -> Selection:
    """Leaves of ``base`` that none of ``minus`` chooses; each must match something.

    Raises:
      ValueError: when splitting, if nothing is left.
    """
    for selection in (base, *minus):
        _contract.require("select.exclude: a selection", selection, Selection)

    def combine(params: Params) -> list[bool]:
        keep = _mask(base, params)
        for selection in minus:
            keep = [a and not b for a, b in zip(keep, _mask(selection, params), strict=True)]
        if not any(keep):
            raise ValueError(
                "A selection must match at least one parameter; exclude(...) removed all of "
                f"the {sum(_mask(base, params))} that its base chose. Exclude fewer."
            )
        return keep

    return _combined(combine)


class Description(NamedTuple):
    """What a selection chooses; ``print`` it for a table.

    Attributes:
      paths: the chosen paths, in tree order.
      num_elements: scalars that each private copy holds.
      num_bytes: their size in bytes.
      total_elements: scalars in the whole tree.
      complex_paths: complex leaves, which no selection offers.
    """

    paths: tuple[str, ...]
    num_elements: int
    num_bytes: int
    total_elements: int
    complex_paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = (
            f"{len(self.paths)} arrays, {self.num_elements:,} of {self.total_elements:,} "
            f"elements, {self.num_bytes:,} bytes per copy"
        )
        left_out = [f"  not on offer, as it is complex: {path}" for path in self.complex_paths]
        return "\n".join([head, *(f"  {path}" for path in self.paths), *left_out])


@_arguments.checked()
def describe(selection: Selection, params: Params) -> Description:
    """The chosen paths, counts and bytes of a selection over ``params``.

    Works on arrays and on ``jax.ShapeDtypeStruct`` trees alike.
    """
    _contract.require("selection", selection, Selection)
    fast, _ = selection.split(params)
    chosen = [(path, leaf) for path, leaf in _trees.named_leaves(fast) if leaf is not None]
    return Description(
        paths=tuple(path for path, _ in chosen),
        num_elements=sum(leaf.size for _, leaf in chosen),
        num_bytes=sum(leaf.size * leaf.dtype.itemsize for _, leaf in chosen),
        total_elements=sum(
            1 if isinstance(leaf, int | float | complex) else getattr(leaf, "size", 0)
            for leaf in jax.tree.leaves(params)
        ),
        complex_paths=tuple(
            path for path, leaf in _trees.named_leaves(params) if _trees.is_complex(leaf)
        ),
    )
