"""What an audit asks, what it found, and the error that lists it."""

from typing import NamedTuple

from ttt_jax import _arguments

MEANING = {
    "loop": "parallel, in padded chunks, equals the loop over single instances",
    "order": "the order of the instances does not matter",
    "mates": "batch mates do not matter",
    "poison": "a NaN instance leaves its neighbors untouched",
    "poison_ok": "a NaN instance is reported as not ok, or was skipped",
    "pristine": "the pristine parameters are unchanged",
    "zero_steps": "zero steps are the source prediction",
    "trace": "entry 0 of a trace is the source prediction",
    "every_1": "parallel episodic equals the loop, a stream with every(1)",
    "stream_poison": "a NaN instance leaves the rest of a stream untouched",
    "updates": "at least one instance is updated: an adapter that does nothing proves nothing",
    "ahead": "no score depends on a token that comes later",
    "fresh": "a document gets the same scores after others were scored",
    "apart": "no document shares a run of tokens with the corpus that is learned from",
    "reacts": "a score depends on its tokens: a predictor that reads nothing proves nothing",
}
# Judged with a limit of 0: within one program nothing rounds differently.
BITWISE = (
    *("mates", "poison", "poison_ok", "pristine", "zero_steps", "stream_poison"),
    *("updates", "apart", "ahead", "fresh", "reacts"),
)


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


@_arguments.checked()
def require(found: list[Finding]) -> None:
    """Raises :class:`AuditError` listing every failed finding."""
    failed = [finding for finding in found if not finding.passed]
    if failed:
        raise AuditError("\n".join(map(str, failed)))
