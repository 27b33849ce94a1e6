"""A decoder as a reader of documents: chunk by chunk, with a cache."""

from typing import Any

import jax

from ttt_jax import _arguments, readers
from ttt_jax.base import Params
from ttt_jax.models.decoder import Decoder
from ttt_jax.models.low_rank import narrow_factors


@_arguments.checked()
def reader(module: Decoder) -> readers.Reader:
    """A :class:`ttt_jax.readers.Reader` that keeps keys and values, of the parameters they had.

    Args:
      module: a decoder, or one with leaves of ``qwix``; ``window`` and ``sinks`` are its own.
    """

    def read(params: Params, memory: Any, inputs: Any) -> tuple[jax.Array, Any]:
        return module.apply(narrow_factors(params, module.dtype), inputs, memory)

    return readers.Reader(module.empty_cache, read)
