"""How many private copies are in flight: as many as a config says, or as many as fit."""

from collections.abc import Callable
from typing import Any

import jax
import psutil

import ttt_jax as ttt

# The rest is for what is on the device beside the program, and for the holes between its arrays.
_SHARE = 0.9


def compiled(compile_for: Callable[[int], Any], chunk_size: int, most: int) -> Any:
    """A compiled program with so many instances in flight on each device.

    Args:
      compile_for: gives the program for a number of instances in flight.
      chunk_size: that number; 0 for the most that fit.
      most: instances that a device has in one call.

    Raises:
      ValueError: not even one fits.
    """
    if chunk_size:
        return compile_for(chunk_size)
    found = ttt.budget.largest_chunk(compile_for, free_bytes(), most=most)
    # Chunks of one size, of which the last would be padded to the others'.
    even = -(-most // -(-most // found.size))
    return found.compiled if even == found.size else compile_for(even)


def free_bytes() -> int:
    """Bytes that a program may use on each device of this process."""
    device = jax.local_devices()[0]
    found = device.memory_stats()
    if found is None:  # a CPU: its devices share the memory of the machine
        return int(_SHARE * psutil.virtual_memory().available / jax.local_device_count())
    return int(_SHARE * (found["bytes_limit"] - found["bytes_in_use"]))
