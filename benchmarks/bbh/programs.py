"""Compiled programs that say how long their compilation took, and logits at a few places."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax import models


def timed(call: Callable[[], Any], programs: Sequence["Program"]) -> tuple[Any, dict[str, float]]:
    """What a call gives, its seconds without those of compilation, and these.

    Args:
      call: waits for what it computes.
      programs: all that it runs.
    """
    before, begin = sum(each.compile_seconds for each in programs), time.perf_counter()
    made = call()
    compilation = sum(each.compile_seconds for each in programs) - before
    spent = time.perf_counter() - begin - compilation
    return made, {"seconds": spent, "compile_seconds": compilation}


class Program:
    """A function that is compiled once for each shape of its arguments.

    Attributes:
      compile_seconds: of all its compilations.
    """

    def __init__(self, function: Callable[..., Any]):
        self._jitted = jax.jit(function)
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        """The function's value; it is returned before it is computed."""
        leaves, tree = jax.tree.flatten(arguments)
        key = tree, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if key not in self._compiled:
            begin = time.perf_counter()
            self._compiled[key] = self._jitted.lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - begin
        return self._compiled[key](*arguments)


def logits_at(module: models.Decoder, params: Any, tokens: Any, places: Any) -> jax.Array:
    """Logits ``[R, A, V]`` behind the tokens at ``places`` ``[R, A]`` of sequences ``[R, T]``.

    The head is applied to these places alone: those of every token would be the largest array of a
    training step. Of the decoder's own logits, which nothing uses, no operation is left.
    """
    hidden = []

    def keep(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        made = call(*arguments, **options)
        if context.module.path == ("norm",) and context.method_name == "__call__":
            hidden.append(made)
        return made

    with nn.intercept_methods(keep):
        models.decoder_function(module)(params, tokens)
    (last,) = hidden
    chosen = jnp.take_along_axis(last, places[..., None], axis=1)
    leaves = params["params"]
    head = leaves["embedding" if module.tied else "head"].astype(module.dtype)
    return jnp.einsum("raw,vw->rav", chosen, head, preferred_element_type=jnp.float32)
