"""What methods over batches share: who predicts, random views, refusal of single instances."""

from collections.abc import Callable
from typing import Any

import jax

from ttt_jax import _checks, _contract
from ttt_jax.base import Key, Params
from ttt_jax.batching import unbatched

Serve = Callable[[Params, Any], Any]


def prediction(classify: Callable[..., Any], serve: Serve | None, batch: bool) -> Serve:
    """The function ``(params, x) -> output`` that predicts with the adapted parameters.

    It is ``serve`` where one is given, else the model function: itself over a batch, at N = 1 for
    one instance.
    """
    if serve is not None:
        return serve
    return classify if batch else unbatched(classify)


def checked(name: str, model: Callable[..., Any], role: str = "logits") -> Callable[..., Any]:
    """A model function over a batch that is refused where it returns more than one array.

    Raises:
      TypeError: ``model`` is no model function; when called: it returned a dict or a tuple.
    """
    _contract.require_model_function(f"methods.{name}", model)

    def call(*args: Any) -> Any:
        output = model(*args)
        _contract.require_array(f"methods.{name}", output, role)
        return output

    return call


def require_batch(name: str, batch: bool) -> None:
    """Refuses ``batch=False`` for a method that compares the instances of a batch.

    Raises:
      ValueError: ``batch`` is False.
    """
    if not batch:
        raise ValueError(
            f"methods.{name} compares the instances of a batch and has no form for one instance; "
            "got batch=False. Give it batches."
        )


def with_batch_axis(x: Any, batch: bool) -> Any:
    """The inputs ``[N, ...]`` of a model function: ``x`` itself, or one instance as N = 1."""
    return x if batch else jax.tree.map(lambda leaf: leaf[None], x)


def batch_size(inputs: Any) -> int:
    """The length N of the leading axis of ``inputs``."""
    return _checks.leading_size("A method over batches", inputs)


def one_view_each(augment: Callable[[Any, Key], Any], inputs: Any, key: Key) -> Any:
    """One random view of each of N instances, ``[N, ...]``; instance n has the n-th split key."""
    keys = _checks.split_to_map("A method with random views", key, batch_size(inputs))
    return jax.vmap(augment)(inputs, keys)
