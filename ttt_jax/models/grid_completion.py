"""Greedy outputs of a :class:`ttt_jax.models.GridDecoder`, token by token with a cache."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks
from ttt_jax.base import Params
from ttt_jax.data.grid_sequences import BEGIN, END, MOST_CELLS, NEWLINE, OUTPUT
from ttt_jax.models.grid_decoder import GridCache, GridDecoder

_LAST_PLACE = MOST_CELLS + 1


class GridCompletion(NamedTuple):
    """Outputs.

    Attributes:
      tokens: int32 ``[N, T]``, of ``CLASSES``; ``END`` from the first end on. An output that was
        cut, as it had no more room or could spell no grid, has 0 from there on and no end.
      log_prob: float32 ``[N]``, of the tokens up to the end, or to the cut.
    """

    tokens: jax.Array
    log_prob: jax.Array


@_arguments.checked(
    module=_arguments.instance(GridDecoder),
    slots=_arguments.count(1),
    num_tokens=_arguments.count(1),
)
def complete_grids(
    module: GridDecoder,
    params: Params,
    inputs: Mapping[str, Any],
    *,
    slots: int,
    num_tokens: int,
    axis_name: str | None = None,
) -> GridCompletion:
    """The most probable token after each, until the end of every output.

    The loop ends when all outputs have: sort sequences by the length that is expected of them. An
    output that can no longer spell a grid, as a line is not as long as the first one, is cut.

    Args:
      module: the decoder.
      params: of the module.
      inputs: legends and inputs, ``token``, ``row``, ``column`` and ``part`` integers ``[N, P]``,
        padded at the end; ``length`` ``[N]``, how many tokens each has (0 for no sequence);
        ``task`` and ``view`` ``[N]``; where there is one, ``most`` ``[N]``, tokens of each output
        at most.
      slots: S, what the cache holds: input and output; at least P.
      num_tokens: T, of an output at most.
      axis_name: under ``jax.vmap(..., axis_name=axis_name)``, for instance over parameters, the
        name of that axis: all loops then end as one. Without it each ends for itself, for which XLA
        copies the whole cache at every token.

    Raises:
      ValueError: fewer slots than tokens of an input, leaves of another shape, or no axis of that
        name.
    """
    given = _given(inputs)
    count, width = given["token"].shape
    if slots < width:
        raise ValueError(f"slots must be at least the {width} tokens of an input; got {slots}.")
    if axis_name is not None:
        _check_axis(axis_name)
    length, state = given["length"], _begun(module, params, given, slots)
    most = given.get("most", jnp.full(count, num_tokens))

    def unfinished(state: Any) -> jax.Array:
        step, *_, done = state
        more = (step < num_tokens) & ~done.all()
        return more if axis_name is None else jax.lax.pmax(more, axis_name)

    def body(state: Any) -> Any:
        step, token, row, column, first, cache, made, log_prob, closed, done = state
        slot = jnp.minimum(length + step, slots - 1)
        inputs = {"token": token, "row": row, "column": column, "part": jnp.full(count, OUTPUT)}
        inputs = {name: leaf[:, None] for name, leaf in inputs.items()}
        zeros = jnp.zeros((count, 1), jnp.int32)
        # What is done sees nothing of its cache, which then is not read.
        last = jnp.where(done, -1, slot)[:, None]
        inputs |= {"segment": zeros, "first": zeros, "last": last, "slot": slot}
        inputs |= {name: given[name][:, None] for name in ("task", "view")}
        logits, cache = module.apply(params, inputs, cache)
        logs = jax.nn.log_softmax(logits[:, 0])
        token = logs.argmax(-1).astype(jnp.int32)
        log_prob = log_prob + jnp.where(done, 0.0, logs.max(-1))
        made = made.at[:, step].set(jnp.where(done, jnp.where(closed, END, 0), token))
        ended = token == NEWLINE
        ragged = ended & (row > 0) & (column != first)
        first = jnp.where(ended & (row == 0), column, first)
        row = jnp.where(ended, row + 1, row)
        column = jnp.where(ended, 0, column + 1)
        outside = (row > MOST_CELLS) | (column > MOST_CELLS) | (length + step >= slots - 1)
        outside = outside | ragged | (step + 1 >= most)
        closed = closed | (~done & (token == END))
        done = done | closed | outside
        row, column = (jnp.minimum(place, _LAST_PLACE) for place in (row, column))
        return step + 1, token, row, column, first, cache, made, log_prob, closed, done

    zeros = jnp.zeros(count, jnp.int32)
    made = jnp.zeros((count, num_tokens), jnp.int32)
    none = jnp.zeros(count, bool)
    start = (
        0,
        zeros + BEGIN,
        zeros,
        zeros,
        zeros,
        state,
        made,
        jnp.zeros(count, jnp.float32),
        none,
        length <= 0,
    )
    steps, *_, made, log_prob, closed, _ = jax.lax.while_loop(unfinished, body, start)
    # What the loop did not reach depends on what else was decoded, and must not.
    later = (jnp.arange(num_tokens)[None] >= steps) & closed[:, None]
    return GridCompletion(jnp.where(later, END, made), log_prob)


def _check_axis(axis_name: str) -> None:
    try:
        jax.lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            "axis_name must be the name of an axis that models.complete_grids is mapped over; got "
            f"{axis_name!r}: call it under jax.vmap(..., axis_name={axis_name!r}), or leave it out."
        ) from error


def _given(inputs: Any) -> dict[str, jax.Array]:
    """The leaves of what is to be completed, checked."""
    ranks = {name: 2 for name in ("token", "row", "column", "part")}
    ranks |= {name: 1 for name in ("length", "task", "view")}
    if not isinstance(inputs, Mapping) or set(inputs) - {"most"} != set(ranks):
        known = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(
            f"inputs of models.complete_grids must be a mapping with the leaves {sorted(ranks)}; "
            f"got {known}."
        )
    ranks["most"] = 1
    given = {name: jnp.asarray(leaf) for name, leaf in inputs.items()}
    _checks.leading_size("inputs of models.complete_grids", given)
    for name, leaf in given.items():
        if leaf.ndim != ranks[name] or not jnp.issubdtype(leaf.dtype, jnp.integer):
            raise ValueError(
                f"inputs of models.complete_grids must have integers of {ranks[name]} axes as "
                f"{name}; got shape {leaf.shape} and dtype {leaf.dtype}."
            )
    return given


def _begun(
    module: GridDecoder, params: Params, given: Mapping[str, jax.Array], slots: int
) -> GridCache:
    """The cache after legends and inputs."""
    place = jnp.arange(given["token"].shape[1], dtype=jnp.int32)[None]
    inside = place < given["length"][:, None]
    inputs = {name: given[name] for name in ("token", "row", "column", "part")}
    inputs |= {name: given[name][:, None] for name in ("task", "view")}
    inputs["segment"] = jnp.where(inside, 0, -1)
    inputs["first"] = jnp.zeros_like(inputs["segment"])
    inputs["last"] = jnp.where(inside, given["length"][:, None] - 1, -1)
    cache: GridCache = module.apply(params, inputs, keep=True)[1]  # type: ignore[assignment]
    room = [(0, 0), (0, 0), (0, slots - place.size), (0, 0), (0, 0)]
    return GridCache(jnp.pad(cache.keys, room), jnp.pad(cache.values, room))
