"""A decoder as a reader of documents: chunk by chunk, with a cache."""

from collections.abc import Callable
from typing import Any

import jax
from flax import traverse_util

from ttt_jax import _arguments, readers
from ttt_jax.base import Params
from ttt_jax.models.cache import no_rows, put
from ttt_jax.models.decoder import Decoder
from ttt_jax.models.low_rank import narrow_factors


@_arguments.checked()
def reader(module: Decoder) -> readers.Reader:
    """A :class:`ttt_jax.readers.Reader` that keeps keys and values, of the parameters they had.

    Of TTT layers it keeps the state, and a chunk that is read again is learned again; with its
    ``parts``, as documents are read, none is.

    Args:
      module: a decoder, or one with leaves of ``qwix``; ``window`` and ``sinks`` are its own.
    """

    def ahead(params: Params, memory: Any, inputs: Any) -> tuple[jax.Array, Any]:
        return module.apply(narrow_factors(params, module.dtype), inputs, memory, write=False)

    def read(params: Params, memory: Any, inputs: Any) -> tuple[jax.Array, Any]:
        logits, rows = ahead(params, memory, inputs)
        return logits, put(memory, rows)

    parts = readers.Parts(ahead, put, no_rows)
    return readers.Reader(module.empty_cache, read, parts, module.vocabulary)


@_arguments.checked()
def hidden_reader(module: Decoder) -> readers.HiddenReader:
    """The reader of :func:`reader` that also gives the inputs of every ``mlp/down/kernel``.

    Args:
      module: as for :func:`reader`.
    """

    def read(params: Params, memory: Any, inputs: Any) -> Any:
        (logits, memory), kept = module.apply(
            narrow_factors(params, module.dtype), inputs, memory, mutable=["intermediates"]
        )
        flat = traverse_util.flatten_dict(kept["intermediates"], sep="/")
        hidden = {
            "params/" + path.removesuffix("hidden") + "down/kernel": leaf
            for path, (leaf,) in flat.items()
        }
        return logits, memory, hidden

    return readers.HiddenReader(module.empty_cache, read, module.vocabulary)


@_arguments.checked()
def decoder_function(module: Decoder) -> Callable[[Params, Any], jax.Array]:
    """A decoder as a model function, with low-rank leaves in its compute dtype.

    Args:
      module: as for :func:`reader`.

    Returns:
      ``apply(params, inputs) -> logits[N, T, V]``; ``inputs`` as in
      :class:`ttt_jax.models.Decoder`.
    """

    def apply(params: Params, inputs: Any) -> jax.Array:
        logits: Any = module.apply(narrow_factors(params, module.dtype), inputs)
        return logits

    return apply
