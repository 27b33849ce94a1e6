"""What the kernels of TTT-Linear share: the plan of a call, blocks of arrays, and loads of chunks.

Arrays are of one head of one sequence, ``[T, d]``; a ``vmap`` adds programs. Written in Pallas for
its Triton backend.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ttt_jax.kernels.ttt_linear.algebra import Chunk, Shared
from ttt_jax.kernels.ttt_linear.limits import Configuration, Tiles


class Plan(NamedTuple):
    """Of a call.

    Attributes:
      chunk: tokens of a chunk.
      size: chunks between two states that are kept for the backward pass.
      groups: how many states are kept; ``groups * size`` chunks are worked on.
      whole: how many of them change weights; the rest are a part of a chunk, and padding.
      configuration: how the kernels run; None for the choice by the number of programs and by
        whether a backward pass follows.
    """

    chunk: int
    size: int
    groups: int
    whole: int
    configuration: Configuration | None

    @property
    def chunks(self) -> int:
        """All of them."""
        return self.size * self.groups


def planned(
    tokens: Any, chunk: int, spacing: int, configuration: Configuration | None
) -> tuple[Plan, Any]:
    """The plan of a call, and its tokens, arrays ``[T, ...]`` of any T, padded to whole chunks.

    Args:
      tokens: a tree of arrays.
      chunk: tokens of a chunk.
      spacing: chunks between two states that are kept, at most; groups are made of equal size.
      configuration: of the plan.
    """
    length = len(jax.tree.leaves(tokens)[0])
    chunks = -(-length // chunk)
    groups = -(-chunks // spacing)
    plan = Plan(chunk, -(-chunks // groups), groups, length // chunk, configuration)
    padding = plan.chunks * chunk - length

    def padded(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, ((0, padding), *((0, 0),) * (leaf.ndim - 1))) if padding else leaf

    return plan, jax.tree.map(padded, tokens)


class Tokens(NamedTuple):
    """Arrays of all tokens: ``q, k, v [T, d]`` and ``gate [T]``; q is None where nothing is read.

    Attributes:
      q: in the operands' dtype, as k and v.
      k: ``[T, d]``.
      v: ``[T, d]``.
      gate: float32.
    """

    q: Any
    k: jax.Array
    v: jax.Array
    gate: jax.Array


Blocks = Mapping[str, tuple[Any, pl.BlockSpec]]


def rows(array: Any, count: int) -> tuple[Any, pl.BlockSpec]:
    """``count`` rows of an array ``[n, ...]`` for each program."""
    rest = array.shape[1:]
    return array, pl.BlockSpec((count, *rest), lambda i: (i, *[0] * len(rest)))


def entry(array: Any) -> tuple[Any, pl.BlockSpec]:
    """A row of an array ``[n, ...]`` for each program, without its axis."""
    rest = array.shape[1:]
    return array, pl.BlockSpec((None, *rest), lambda i: (i, *[0] * len(rest)))


def columns(array: Any, count: int) -> tuple[Any, pl.BlockSpec]:
    """``count`` columns of an array ``[m, n]`` for each program."""
    return array, pl.BlockSpec((array.shape[0], count), lambda i: (0, i))


def same(array: Any) -> tuple[Any, pl.BlockSpec]:
    """A vector that all programs read."""
    return array, pl.BlockSpec(array.shape, lambda i: (0,))


def of_tokens(tokens: Tokens, count: int) -> dict[str, tuple[Any, pl.BlockSpec]]:
    """Blocks of ``count`` tokens."""
    named = {n: leaf for n, leaf in tokens._asdict().items() if leaf is not None}
    return {name: rows(leaf, count) for name, leaf in named.items()}


def of_shared(shared: Shared) -> dict[str, tuple[Any, pl.BlockSpec]]:
    """Blocks of what all programs read; vectors."""
    return {name: same(getattr(shared, name)) for name in ("scale", "gamma", "beta")}


def call(
    kernel: Callable[..., None], name: str, tiles: Tiles, grid: int, blocks: tuple[Blocks, Blocks]
) -> dict[str, jax.Array]:
    """Runs ``kernel(refs)``, the refs by name; interpreted away from a GPU.

    Args:
      kernel: of one program.
      name: in profiles.
      tiles: warps, and how many programs have the same blocks.
      grid: how many programs have blocks of their own, next to those of ``vmap``.
      blocks: of inputs, and of outputs as ``jax.ShapeDtypeStruct``.
    """
    inputs, outputs = blocks
    names = (*inputs, *outputs)

    def body(*refs: Any) -> None:
        kernel(types.SimpleNamespace(**dict(zip(names, refs, strict=True))))

    def spec(given: pl.BlockSpec) -> pl.BlockSpec:
        index: Any = given.index_map
        return pl.BlockSpec(given.block_shape, lambda i: index(lax.div(i, np.int32(tiles.shares))))

    made = pl.pallas_call(
        body,
        grid=(grid * tiles.shares,),
        in_specs=[spec(given) for _, given in inputs.values()],
        out_specs=[spec(given) for _, given in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=jax.default_backend() != "gpu",
        name=name,
    )(*[array for array, _ in inputs.values()])
    return dict(zip(outputs, made, strict=True))


def shared_of(refs: Any) -> Shared:
    """On chip, in the operands' dtype of the keys."""
    scale, gamma, beta = refs.scale[...], refs.gamma[...][:, None], refs.beta[...][:, None]
    size = scale.shape[0]
    is_last = lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
    return Shared(scale, gamma, beta, jnp.sum(jnp.where(is_last, scale, 0.0)), refs.k.dtype)


def loaded(refs: Any, names: tuple[str, ...], index: Any, chunk: int) -> tuple[jax.Array, ...]:
    """Of each named ref, the rows of the chunk with this index, as they are stored."""
    place = pl.ds(index * chunk, chunk)
    values = []
    for name in names:
        ref = getattr(refs, name)
        values.append(ref[place] if len(ref.shape) == 1 else ref[place, :])
    return tuple(values)


def wholeness(plan: Plan, index: Any) -> Any:
    """1 where the chunk with this index is whole, else 0."""
    if plan.whole == plan.chunks:
        return 1.0
    return (index < plan.whole).astype(jnp.float32)


def chunk_of(stored: Sequence[Any], shared: Shared, whole: Any) -> Chunk:
    """A chunk in float32, from the stored rows of q (or None), k, v and the gates."""
    q, k, v, gate = stored
    q = None if q is None else q.astype(jnp.float32)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    return Chunk(q, k, v, gate, shared.last * gate * whole)


def loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``body(index, carry)`` so many times, in 32 bits; without a loop for once."""
    if count == 1:
        return body(np.int32(0), carry)
    return lax.fori_loop(np.int32(0), np.int32(count), body, carry)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """Of an output."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shared_by(tiles: Tiles) -> tuple[Any, Callable[[Any, Callable[[], None]], None]]:
    """The number of this program's blocks, and ``stored(index, store)``.

    Of the programs that have the same blocks, ``stored`` lets the one store that has the index in
    its share.
    """
    shares = np.int32(tiles.shares)
    program = pl.program_id(0)
    if tiles.shares == 1:
        return program, lambda index, store: store()
    share = lax.rem(program, shares)

    def stored(index: Any, store: Callable[[], None]) -> None:
        pl.when(lax.rem(index, shares) == share)(store)

    return lax.div(program, shares), stored
