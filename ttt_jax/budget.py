"""How much memory private copies take, and how many fit on a device.

The figures are the compiler's own, of programs that the caller compiles: nothing is allocated, and
any program will do, one that is sharded over a mesh included.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ttt_jax import _arguments, _checks
from ttt_jax.base import Adapter, Params

__all__ = ["Chunk", "copy_bytes", "free_bytes", "largest_chunk", "used"]

_GIB = 2**30


class Chunk(NamedTuple):
    """A number of instances in flight that fits.

    Attributes:
      size: the number of instances.
      bytes: what the compiler says the program needs with them, per device.
      compiled: the program, ready to be called.
    """

    size: int
    bytes: int
    compiled: Any


@_arguments.checked(compiled=_arguments.having("a compiled program", "memory_analysis"))
def used(compiled: jax.stages.Compiled) -> int:
    """Bytes on each device that a compiled program needs: arguments, results, and what is between.

    Args:
      compiled: of ``jax.jit(f).lower(...).compile()``.

    Returns:
      The compiler's figure; memory that arguments and results share counts once.

    Raises:
      ValueError: a backend that does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise ValueError(
            f"{jax.default_backend()} does not say how much memory a program needs: choose the "
            "chunk size by trying."
        )
    total = found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
    return int(total - found.alias_size_in_bytes)


@_arguments.checked()
def copy_bytes(adapter: Adapter, params: Params) -> int:
    """Bytes of one private copy: fast parameters, optimizer state and memory of the loss.

    Activations of a step come on top; they depend on the model and the loss, and :func:`used`
    has them.

    Args:
      adapter: any adapter.
      params: the pristine parameters, or their shapes (``jax.ShapeDtypeStruct``).

    Returns:
      Bytes of ``adapter.init(params)``.
    """
    state = jax.eval_shape(adapter.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@_arguments.checked(limit=_arguments.count(-(2**63)))
def largest_chunk(
    compile_for: Callable[[int], jax.stages.Compiled],
    limit: int,
    *,
    most: int,
    sizes: tuple[int, int] = (4, 8),
) -> Chunk:
    """The most instances in flight that fit into memory.

    Memory is close to a straight line in the number of instances. Two small programs give the
    line, the line a number, and the program with that number is compiled: its memory is looked at
    again, so what is returned fits by the compiler's word and not by the line's.

    Args:
      compile_for: gives the compiled program with that many instances in flight, for instance
        ``lambda n: jax.jit(batched(predict, chunk_size=n)).lower(params, xs, keys).compile()``.
        Shapes (``jax.ShapeDtypeStruct``) do for the arguments.
      limit: bytes per device that the program may use.
      most: the largest number of interest, such as the number of instances there are.
      sizes: the two numbers that give the line.

    Returns:
      A :class:`Chunk`. It is within a tenth of the limit, or ``most``, unless memory grows in
      steps.

    Raises:
      ValueError: ``most`` < 1, sizes that do not grow, or a limit into which one instance does
        not fit.
    """
    _checks.check_count("most", most)
    if not 1 <= sizes[0] < sizes[1]:
        raise ValueError(f"sizes must be two growing numbers of at least 1, got {sizes}.")
    found: dict[int, Chunk] = {}

    def look(size: int) -> Chunk:
        if size not in found:
            compiled = compile_for(size)
            found[size] = Chunk(size, used(compiled), compiled)
        return found[size]

    for size in sizes:
        look(min(size, most))
    for _ in range(_MOST_TRIES):
        size = _guess(list(found.values()), limit, most)
        if size in found:
            break
        look(size)
        fits = found[size].bytes <= limit
        if fits and (size == most or found[size].bytes >= 0.9 * limit):
            break
    fitting = [chunk for chunk in found.values() if chunk.bytes <= limit]
    if not fitting and look(1).bytes <= limit:
        fitting = [look(1)]
    if not fitting:
        raise ValueError(
            f"One instance needs {look(1).bytes / _GIB:.2f} GiB and the limit is "
            f"{limit / _GIB:.2f} GiB: select fewer parameters, take fewer copies or views per "
            "step, or shard the model."
        )
    return max(fitting)


_MOST_TRIES = 4


def _guess(found: list[Chunk], limit: int, most: int) -> int:
    """The next number to look at: where the line through the two nearest known meets the limit.

    Between the largest known that fits and the smallest that does not, if both are known.
    """
    fits = sorted(chunk for chunk in found if chunk.bytes <= limit)
    exceeds = sorted(chunk for chunk in found if chunk.bytes > limit)
    low, high = (fits[-1].size if fits else 0), (exceeds[0].size if exceeds else most + 1)
    known = sorted(fits[-2:] + exceeds[:1])[-2:] if fits else exceeds[:2]
    if len(known) < 2 or high - low <= 1:
        return max(low, 1)
    (a, bytes_a, _), (b, bytes_b, _) = known
    each = max(1.0, (bytes_b - bytes_a) / (b - a))
    meets = int(a + (limit - bytes_a) / each)
    return min(max(meets, low + 1, 1), high - 1, most)


# The rest is for what is on the device beside the program, and for the holes between its arrays.
_SHARE = 0.9


def free_bytes() -> int:
    """Bytes that a program may use on each device of this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is None:  # a CPU: its devices share the memory of the machine
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(_SHARE * available / jax.local_device_count())
    return int(_SHARE * (statistics["bytes_limit"] - statistics["bytes_in_use"]))
