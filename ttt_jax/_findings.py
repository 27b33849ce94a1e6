"""What an audit found, and the error that lists it."""

from typing import NamedTuple


class AuditError(AssertionError):
    """A promise of the library does not hold; the message lists each with its figure."""


class Finding(NamedTuple):
    """One promise and how far it was missed.

    Attributes:
      name: the promise.
      difference: the largest difference found, absolute where it must be 0 and relative to the
        scale of the results elsewhere; nan counts as infinite.
      limit: the largest difference allowed, 0 for bitwise.
    """

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return self.difference <= self.limit

    def __str__(self) -> str:
        word = "ok" if self.passed else "FAILED"
        return f"{word}: {self.name}: difference {self.difference:.3g}, allowed {self.limit:.3g}"
