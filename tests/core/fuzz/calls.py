"""A right call of a public function: what the slips start from."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.core.fuzz import kinds


class Call(NamedTuple):
    """One right call.

    Attributes:
      function: the public name.
      arguments: by name, defaults included; those of ``*args`` as a tuple.
      use: what is done with the result, traced; ``None`` where the result is the value.
      kinds: by parameter, where the signature does not say; ``None`` leaves a parameter out.
      ranges: values out of the range of a parameter.
      allowed: slips ``"parameter: slip"`` that are right in truth, or cannot be told from right.
      traced: whether the function itself is traced, as its single operations take long to compile.
      only_refusals: whether a right call takes too long for a test, so that none is made.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    use: Callable[[Any], Any] | None
    kinds: dict[str, str | None]
    ranges: dict[str, Any]
    allowed: frozenset[str]
    only_refusals: bool
    traced: bool

    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    def kind(self, name: str) -> str | None:
        found = self.kinds.get(name, "")
        return kinds.kind_of(self.parameters()[name]) if found == "" else found

    def result(self, **changes: Any) -> Any:
        """What the function returns with some arguments changed."""
        given = {**self.arguments, **changes}
        positional: list[Any] = []
        if any(p.kind is p.VAR_POSITIONAL for p in self.parameters().values()):
            # What stands before *args has to come by position too.
            for name, parameter in self.parameters().items():
                if parameter.kind is parameter.VAR_POSITIONAL:
                    positional += given.pop(name)
                    break
                positional.append(given.pop(name))
        if self.traced:
            return functools.partial(self.function, *positional, **given)
        return self.function(*positional, **given)


class Table(dict[str, Call]):
    """Calls by the public name of their function."""

    def add(
        self,
        name: str,
        function: Callable[..., Any],
        use: Callable[[Any], Any] | None = None,
        /,
        *,
        kinds: dict[str, str | None] | None = None,
        ranges: dict[str, Any] | None = None,
        allowed: str = "",
        only_refusals: bool = False,
        traced: bool = False,
        **arguments: Any,
    ) -> None:
        defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is not parameter.empty
        }
        self[name] = Call(
            function,
            defaults | arguments,
            (lambda run: run()) if traced and use is None else use,
            kinds or {},
            ranges or {},
            frozenset(part.strip() for part in allowed.split(",") if part.strip()),
            only_refusals,
            traced and use is None,
        )
