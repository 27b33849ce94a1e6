"""Problems whose solutions are numbers and whose score is a number: step functions and rulers.

A solution of size A is A tokens, and so is what the decoder is asked for: ``head, solution`` to
``better solution``. A problem is a mapping of arrays: ``head`` ``[H]``, tokens that say what is
special about it, and ``free`` ``[A]``, the places that a solution may fill; the others hold
``CLOSED``. A smaller problem has fewer places to fill.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUMBERS = 32
"""The tokens 0 to 31 are numbers."""
CLOSED, BAR, ASK = range(NUMBERS, NUMBERS + 3)
VOCABULARY = NUMBERS + 3
ROLES = ("validation", "test")


class Family(NamedTuple):
    """Problems of one kind, of every size on as many places.

    Attributes:
      low: the smallest number of a solution.
      high: the largest one.
      places: A.
      easy: the smallest and the largest size to train on; what is searched has size A.
      draw: ``(rng, size) -> problem``.
      score: ``(problem, state[A]) -> scalar`` of a valid solution, larger is better.
    """

    low: int
    high: int
    places: int
    easy: tuple[int, int]
    draw: Callable[[np.random.Generator, int, int], dict[str, np.ndarray]]
    score: Callable[[Any, jax.Array], jax.Array]


def _draw_steps(rng: np.random.Generator, size: int, places: int) -> dict[str, np.ndarray]:
    """A function that is zero outside of ``size`` steps, and in some between the outer two."""
    inside = np.ones(size, bool)
    count = int(rng.integers(size // 8, size // 4 + 2))
    inside[1 + rng.choice(size - 2, count, replace=False)] = False
    # Reflected it is the same problem.
    inside = min(inside, inside[::-1], key=lambda mask: mask.tolist())
    free = np.zeros(places, bool)
    first = int(rng.integers(places - size + 1))
    free[first : first + size] = inside
    return {"head": np.zeros(0, np.int32), "free": free}


def _score_steps(problem: Any, state: jax.Array) -> jax.Array:
    """``(sum h)^2 / (2 A max (h * h))``: the largest ratio of the first autocorrelation inequality.

    For functions f >= 0 on an interval of length 1/2, ``max (f * f) >= C (integral of f)^2``; with
    A steps of heights h the largest C that they leave is the reciprocal of this number. Matolcsi
    and Vinuesa, `Improved bounds on the supremum of autoconvolutions
    <https://arxiv.org/abs/0907.1379>`_, 2010.
    """
    heights = jnp.where(problem["free"], state, 0)
    places = jnp.arange(state.size)
    other = places[:, None] - places[None]
    # [lag, place]: h[lag - place], of lags below A and, turned round, of those above.
    below = jnp.where(other >= 0, heights[other], 0) * heights[None]
    above = jnp.where(other < 0, heights[other], 0) * heights[None]
    largest = jnp.maximum(below.sum(1).max(), above.sum(1).max()).astype(jnp.float32)
    total = heights.sum().astype(jnp.float32)
    return jnp.where(largest > 0, total**2 / (2 * state.size * jnp.maximum(largest, 1.0)), 0.0)


def _draw_rulers(rng: np.random.Generator, size: int, places: int) -> dict[str, np.ndarray]:
    """A ruler of ``size`` gaps, and four distances that do not count."""
    longest = min(size * (size + 1) // 2, NUMBERS - 1)
    closed = np.sort(1 + rng.choice(longest, 4, replace=False))
    free = np.zeros(places, bool)
    free[rng.choice(places, size, replace=False)] = True
    return {"head": np.append(closed, BAR).astype(np.int32), "free": free}


def _score_rulers(problem: Any, state: jax.Array) -> jax.Array:
    """The share of the distances ``1 .. n (n + 1) / 2`` that a ruler measures; of equal, the short.

    A ruler of n gaps has as many pairs of marks as that, so that a perfect one would measure all;
    beyond three gaps there is none. A unit of length costs less than any distance is worth.
    """
    gaps = jnp.where(problem["free"], state, 0)
    marks = jnp.concatenate([jnp.zeros(1, gaps.dtype), jnp.cumsum(gaps)])
    size = problem["free"].sum()
    distances = jnp.arange(state.size * (state.size + 1) // 2 + 1)
    between = (marks[None] - marks[:, None]).reshape(1, -1)
    measured = (between == distances[:, None]).any(1)
    wanted = (distances > 0) & (distances <= size * (size + 1) // 2)
    wanted &= ~(distances[:, None] == problem["head"][None, :-1]).any(1)
    count = (measured & wanted).sum().astype(jnp.float32)
    price = marks[-1].astype(jnp.float32) / (NUMBERS * state.size)
    return (count - price) / wanted.sum().astype(jnp.float32)


FAMILIES = {
    "steps": Family(0, NUMBERS - 1, 16, (6, 12), _draw_steps, _score_steps),
    "rulers": Family(1, NUMBERS - 1, 10, (4, 7), _draw_rulers, _score_rulers),
}


def role_of(problem: dict[str, np.ndarray]) -> str:
    """Each problem is for validation or for the test, whatever the seed."""
    said = np.concatenate([problem["head"], problem["free"].astype(np.int32)]).astype(np.int32)
    return ROLES[zlib.crc32(said.tobytes()) % 2]


def distinct(
    family: Family, rng: np.random.Generator, count: int, role: str
) -> dict[str, np.ndarray]:
    """Problems of the largest size that differ, stacked."""
    found: dict[bytes, dict[str, np.ndarray]] = {}
    for _ in range(200 * count):
        if len(found) == count:
            break
        problem = family.draw(rng, family.places, family.places)
        if role_of(problem) == role:
            found.setdefault(problem["head"].tobytes() + problem["free"].tobytes(), problem)
    if len(found) < count:
        raise ValueError(
            f"there must be {count} distinct problems for {role}; found {len(found)}: ask for "
            "fewer."
        )
    return stacked(list(found.values()))


def stacked(problems: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Problems of one size as one mapping with a leading axis."""
    return {name: np.stack([each[name] for each in problems]) for name in problems[0]}


def random_states(
    family: Family, rng: np.random.Generator, problems: dict[str, np.ndarray], count: int
) -> np.ndarray:
    """Solutions ``[N, count, A]`` to begin with."""
    free = problems["free"][:, None]
    shape = (len(free), count, free.shape[-1])
    drawn = rng.integers(family.low, family.high + 1, shape, dtype=np.int32)
    return np.where(free, drawn, CLOSED).astype(np.int32)


def scores(family: Family, problem: Any, states: jax.Array) -> jax.Array:
    """float32 ``[G]`` of states ``[G, A]``; NaN where one is no solution of the problem."""
    number = (states >= family.low) & (states <= family.high)
    valid = jnp.where(problem["free"], number, states == CLOSED).all(-1)
    safe = jnp.where(valid[:, None], states, family.high)
    made = jax.vmap(lambda state: family.score(problem, state))(safe)
    return jnp.where(valid, made, jnp.nan)


def _changed(family: Family, problem: Any, state: jax.Array, key: jax.Array) -> jax.Array:
    """One or two numbers of a solution anew: any number, or half of the time a neighbor."""
    keys = jax.random.split(key, 5)
    logits = jnp.where(problem["free"], 0.0, -jnp.inf)
    places = jax.random.categorical(keys[0], logits, shape=(2,))
    anew = jax.random.randint(keys[1], (2,), family.low, family.high + 1)
    near = jnp.where(jax.random.bernoulli(keys[2], shape=(2,)), 1, -1) + state[places]
    near = jnp.clip(near, family.low, family.high)
    values = jnp.where(jax.random.bernoulli(keys[3], shape=(2,)), anew, near)
    state = state.at[places[0]].set(values[0])
    return jnp.where(jax.random.bernoulli(keys[4]), state.at[places[1]].set(values[1]), state)


def climb(
    family: Family, problem: Any, start: jax.Array, key: jax.Array, steps: int, tries: int
) -> tuple[jax.Array, jax.Array]:
    """Local search from one solution: a change that does not lower the score is kept.

    Returns:
      The solutions ``[steps + 1, A]`` at the start and after every ``tries`` changes, with scores.
    """

    def score(state: jax.Array) -> jax.Array:
        return scores(family, problem, state[None])[0]

    def attempt(number: Any, carry: Any) -> Any:
        state, value, key = carry
        other = _changed(family, problem, state, jax.random.fold_in(key, number))
        found = score(other)
        better = found >= value
        return jnp.where(better, other, state), jnp.where(better, found, value), key

    def step(carry: Any, number: Any) -> Any:
        state, value = carry
        keyed = state, value, jax.random.fold_in(key, number)
        state, value, _ = jax.lax.fori_loop(0, tries, attempt, keyed)
        return (state, value), (state, value)

    begun = start, score(start)
    _, (states, values) = jax.lax.scan(step, begun, jnp.arange(steps))
    return jnp.concatenate([start[None], states]), jnp.append(begun[1], values)
