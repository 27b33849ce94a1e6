"""Problems on digits with a rare operation: how often it occurs is the difficulty.

A decoder that is trained where the operation is rare has half learned it, and errs where it is
frequent. With slips in what it learns from, the rare operation comes out wrong in many ways, each
less frequent than the right one: what a vote over its answers can mend.
"""

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ttt_jax import generation, rewards

COMMON_SIGNS, RARE_SIGN = ("+", "-"), "*"
COMMON_STEPS, RARE_STEPS = (1, 2, 3), (4, 5, 6, 7, 8, 9)
ALPHABET = (*"0123456789", *COMMON_SIGNS, RARE_SIGN, "=", ":", ",", ";", "?", " ")
STOP, PAD = (ALPHABET.index(sign) for sign in "; ")
_TERMS, _SHOWN, _ASKED = 4, 5, 4
# Draws per problem after which there are no further ones.
_DRAWS = 100
_DIGITS = np.random.default_rng(0).permuted(np.tile(np.arange(10), (3, 1)), axis=1).tolist()
_SQUARE = [[_DIGITS[2][(a + b) % 10] for b in _DIGITS[1]] for a in _DIGITS[0]]


class Problem(NamedTuple):
    """A prompt, and what the decoder is taught to write after it; the last digit is the answer."""

    prompt: str
    solution: str

    @property
    def answer(self) -> int:
        """The digit before the stop sign."""
        return int(self.solution[-2])


class Family(NamedTuple):
    """Problems of one kind, all of one length.

    Attributes:
      draw: ``(rng, rare, slips) -> problem``; ``rare`` is the share of the rare operation, and
        ``slips`` the share of its results that the solution has wrong.
      prompt: characters of a prompt.
      solution: characters of a solution.
    """

    draw: Callable[[np.random.Generator, float, float], Problem]
    prompt: int
    solution: int


def times(a: int, b: int) -> int:
    """The product modulo ten; zero, and five times an even digit, stay zero."""
    return a * b % 10


def square(a: int, b: int) -> int:
    """A Latin square that follows no rule: every digit is as frequent as another, none stays."""
    return _SQUARE[a][b]


def draw_chain(
    rng: np.random.Generator,
    rare: float,
    slips: float = 0.0,
    product: Callable[[int, int], int] = times,
) -> Problem:
    """Sums, differences and, rarely, products modulo ten, from left to right, step by step.

    ``3+4*2-5?`` goes on with ``3+4=7,7*2=4,4-5=9;``. After a slip the chain goes on from the wrong
    product. Another ``product`` of two digits may stand in its place.
    """
    value = int(rng.integers(10))
    prompt, steps = str(value), []
    for _ in range(_TERMS - 1):
        sign = RARE_SIGN if rng.random() < rare else COMMON_SIGNS[int(rng.integers(2))]
        digit = int(rng.integers(10))
        result = {"+": value + digit, "-": value - digit}.get(sign, product(value, digit)) % 10
        if slips and sign == RARE_SIGN and rng.random() < slips:
            result = (result + int(rng.integers(1, 10))) % 10
        prompt += f"{sign}{digit}"
        steps.append(f"{value}{sign}{digit}={result}")
        value = result
    return Problem(prompt + "?", ",".join(steps) + ";")


def draw_sequence(rng: np.random.Generator, rare: float, slips: float = 0.0) -> Problem:
    """Digits that grow by two steps in turn modulo ten: the steps, then what follows.

    ``2,5,6,9,0?`` goes on with ``31:3,4,7,8;``. A step is rarely above three. A slip names another
    step, and the solution goes on by it.
    """
    steps = []
    for _ in range(2):
        choices = RARE_STEPS if rng.random() < rare else COMMON_STEPS
        steps.append(choices[int(rng.integers(len(choices)))])
    terms = [int(rng.integers(10))]
    for place in range(_SHOWN - 1):
        terms.append((terms[-1] + steps[place % 2]) % 10)
    shown = ",".join(map(str, terms[:_SHOWN]))
    for place, step in enumerate(steps):
        if slips and step in RARE_STEPS and rng.random() < slips:
            steps[place] = (step + int(rng.integers(1, 10))) % 10
    terms = terms[:_SHOWN]
    for place in range(_SHOWN - 1, _SHOWN + _ASKED - 1):
        terms.append((terms[-1] + steps[place % 2]) % 10)
    asked = ",".join(map(str, terms[_SHOWN:]))
    return Problem(f"{shown}?", f"{steps[0]}{steps[1]}:{asked};")


FAMILIES = {
    "chains": Family(draw_chain, 2 * _TERMS, 6 * (_TERMS - 1)),
    # A wrong answer is right after all by another slip alone.
    "squares": Family(functools.partial(draw_chain, product=square), 2 * _TERMS, 6 * (_TERMS - 1)),
    "sequences": Family(draw_sequence, 2 * _SHOWN, 3 + 2 * _ASKED),
}


def tokens_of(text: str) -> list[int]:
    """Places in the alphabet."""
    return [ALPHABET.index(sign) for sign in text]


def training_batch(
    family: Family,
    rng: np.random.Generator,
    rows: int,
    rare: float,
    excluded: Collection[str] = (),
    slips: float = 0.0,
) -> dict[str, np.ndarray]:
    """Tokens and mask ``[rows, T]``; the solutions alone are learned from, no excluded prompt."""
    texts = []
    while len(texts) < rows:
        problem = family.draw(rng, rare, slips)
        if problem.prompt not in excluded:
            texts.append(tokens_of(problem.prompt + problem.solution))
    tokens = np.array(texts, np.int32)
    mask = np.zeros(tokens.shape, np.float32)
    mask[:, family.prompt :] = 1.0
    return {"tokens": tokens, "mask": mask}


def problems(
    family: Family, rng: np.random.Generator, count: int, rare: float
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Distinct prompts ``[count, P]`` with the answer of each, and their texts.

    Raises:
      ValueError: fewer than ``count`` were drawn.
    """
    drawn: dict[str, Problem] = {}
    for _ in range(_DRAWS * count):
        if len(drawn) < count:
            problem = family.draw(rng, rare, 0.0)
            drawn.setdefault(problem.prompt, problem)
    if len(drawn) < count:
        raise ValueError(
            f"problems must be at most as many as there are; got {count}, and {len(drawn)} were "
            "drawn: ask for fewer."
        )
    arrays = {
        "tokens": np.array([tokens_of(prompt) for prompt in drawn], np.int32),
        "truth": np.array([problem.answer for problem in drawn.values()], np.int32),
    }
    return arrays, list(drawn)


def answer(x: object, generated: generation.Generated) -> rewards.Answers:
    """The digit before the stop sign; without both there is no answer."""
    tokens = generated.tokens
    ended = (tokens == STOP) & generated.mask
    place = jnp.argmax(ended, axis=-1)
    before = jnp.take_along_axis(tokens, jnp.maximum(place - 1, 0)[..., None], -1)[..., 0]
    return rewards.Answers(before, ended.any(-1) & (place > 0) & (before < 10))
