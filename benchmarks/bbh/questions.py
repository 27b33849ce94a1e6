"""The tasks: which examples are shown, which are asked, and which answers are allowed.

Nothing here looks at the answers of queries: what is allowed follows from the question and from
the demonstrations.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from experiments import launch
from ttt_jax.data.few_shot import Example, FewShotTask

ROLES = ("validation", "reported")
# Answers that come in pairs: one of them in a demonstration allows the other.
_PAIRS = (("yes", "no"), ("true", "false"), ("valid", "invalid"))
_OPTION = re.compile(r"^(\([A-Z]\))|^- (.+)$", re.MULTILINE)


def draw(
    name: str, examples: Sequence[Example], *, shots: int, seed: int, role: str, most: int
) -> FewShotTask:
    """A task with its demonstrations and with the queries of a role.

    The seed and the name decide the order of the examples. The first ones are demonstrations, half
    of the others are queries of each role. A question that is asked twice, or shown and asked, is
    one example: it stands on one side alone.

    Args:
      name: of the task.
      examples: all of it.
      shots: how many demonstrations.
      seed: not negative.
      role: ``"validation"`` or ``"reported"``.
      most: queries at most.

    Raises:
      UserError: too few examples.
    """
    distinct = list({example.input: example for example in examples}.values())
    if len(distinct) < shots + 2:
        raise launch.UserError(
            f"--shots must leave two examples of {name!r} to be asked; got {shots} of "
            f"{len(distinct)}."
        )
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    shuffled = [distinct[place] for place in rng.permutation(len(distinct))]
    shown, rest = shuffled[:shots], shuffled[shots:]
    queries = rest[ROLES.index(role) :: len(ROLES)][:most]
    return FewShotTask(name, tuple(shown), tuple(queries))


def options(question: str) -> tuple[str, ...]:
    """The answers that a question lists: ``(A)``, ``(B)``, ... or the words behind dashes."""
    _, heading, listed = question.rpartition("Options:")
    if not heading:
        return ()
    return tuple(
        (letter or words).strip() for letter, words in _OPTION.findall(listed.lstrip(" \n"))
    )


def rule(task: FewShotTask) -> str:
    """How answers are found: ``"options"`` of the question, a ``"pair"``, or ``"greedy"``."""
    if all(options(shown.input) for shown in task.demonstrations):
        return "options"
    pairs = {_pair(shown.output) for shown in task.demonstrations}
    return "pair" if len(pairs) == 1 and None not in pairs else "greedy"


def choices(task: FewShotTask, question: str) -> tuple[str, ...]:
    """The answers that are scored; none where the answer is written freely."""
    kind = rule(task)
    if kind == "options":
        return options(question)
    return _pair(task.demonstrations[0].output) or () if kind == "pair" else ()


def _pair(answer: str) -> tuple[str, ...] | None:
    """Both answers of the pair that an answer is of, written as it is."""
    for pair in _PAIRS:
        if answer.lower() in pair and answer in (answer.lower(), answer.capitalize()):
            return pair if answer == answer.lower() else tuple(part.capitalize() for part in pair)
    return None


def chance(task: FewShotTask) -> float:
    """The share of queries that a draw from the allowed answers gets right; 0 without a choice."""
    return float(
        np.mean(
            [
                allowed.count(query.output) / len(allowed) if allowed else 0.0
                for query in task.queries
                for allowed in [choices(task, query.input)]
            ]
        )
    )


def constant(task: FewShotTask) -> float:
    """The share of queries whose answer is the most frequent one of the demonstrations."""
    ((answer, _),) = Counter(shown.output for shown in task.demonstrations).most_common(1)
    return float(np.mean([query.output == answer for query in task.queries]))


def halves(task: FewShotTask) -> list[tuple[FewShotTask, tuple[Example, ...]]]:
    """Two folds: the task with one half of its demonstrations, and the other half."""
    even, odd = task.demonstrations[::2], task.demonstrations[1::2]
    return [
        (task._replace(demonstrations=even), odd),
        (task._replace(demonstrations=odd), even),
    ]
