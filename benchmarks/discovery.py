"""Does a decoder that learns while it searches find better solutions than as many samples of it?

``python -m benchmarks.discovery --out=FILE`` trains a small decoder on small problems of one family
(:mod:`benchmarks.discovery_problems`): given a problem and a solution, write a better one, as local
search found them. Then it searches larger problems by :func:`ttt_jax.methods.discover`, all with
private copies, and in four other ways with **equally many scored solutions**: the best of as many
samples of the pristine decoder; search without learning; learning without reuse of what was found;
and local search by a program, which needs no decoder. The file has the best score of every problem
and way, the best along the samples, and how often discovery wins, ties and loses. ``--role`` says
which problems: those of ``validation``, for choosing settings, are never those of ``test``.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags

import ttt_jax as ttt
from benchmarks import discovery_problems, options, reinforcement
from benchmarks.discovery_problems import ASK, FAMILIES, VOCABULARY, Family
from experiments import launch, provenance
from ttt_jax import methods, models

# Changes of a local search by which it is seen in the training: from one to a later one.
SEEN = (0, 4, 8, 16, 32, 64, 128, 256)
# Scores of different solutions differ by more; equal ones are computed in another order.
TIE = 1e-6


class Way(NamedTuple):
    """A way to search: the program that it needs, and whether it learns."""

    searcher: str
    learning: bool


WAYS = {
    "discover": Way("reuse", True),
    "samples": Way("no reuse", False),
    "search": Way("reuse", False),
    "learning": Way("no reuse", True),
    "program": Way("program", False),
}


def easy_searches(
    family: Family, rng: np.random.Generator, settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Heads ``[N, H]`` of easy problems, and solutions ``[N, len(SEEN), A]``, ever better."""
    sizes = rng.integers(family.easy[0], family.easy[1] + 1, settings.easy_problems)
    problems = discovery_problems.stacked(
        [family.draw(rng, int(size), family.places) for size in sizes]
    )
    starts = discovery_problems.random_states(family, rng, problems, 1)[:, 0]
    unit = SEEN[1]

    def climbed(problem: Any, start: Any, key: Any) -> Any:
        return discovery_problems.climb(family, problem, start, key, SEEN[-1] // unit, unit)[0]

    keys = ttt.sample_keys(jax.random.key(settings.seed), np.arange(len(starts)))
    states = np.asarray(jax.jit(jax.vmap(climbed))(problems, starts, keys))
    return problems["head"], states[:, [count // unit for count in SEEN]]


def training_batch(
    rng: np.random.Generator, heads: np.ndarray, states: np.ndarray, rows: int
) -> dict[str, np.ndarray]:
    """Tokens and mask ``[rows, T]``; the better solutions alone are learned from."""
    place = rng.integers(len(heads), size=rows)
    first = rng.integers(len(SEEN) - 1, size=rows)
    later = rng.integers(first + 1, len(SEEN))
    before, after = states[place, first], states[place, later]
    ask = np.full((rows, 1), ASK, np.int32)
    tokens = np.concatenate([heads[place], before, ask, after], 1)
    mask = np.zeros(tokens.shape, np.float32)
    # Where the search found nothing there is nothing to learn.
    mask[:, -after.shape[1] :] = (before != after).any(1, keepdims=True)
    return {"tokens": tokens, "mask": mask}


def train(family: Family, settings: Any) -> tuple[models.Decoder, Any, list[float]]:
    """A decoder of easy problems with low-rank leaves, and the nats per token on the way."""
    rng = np.random.default_rng((settings.seed, 1))
    heads, states = easy_searches(family, rng, settings)
    net, params, curve = reinforcement.fitted(
        VOCABULARY, lambda: training_batch(rng, heads, states, settings.rows), settings
    )
    net, params = models.low_rank(
        net,
        params,
        jax.random.key(settings.seed + 1),
        jnp.zeros((1, 2), jnp.int32),
        rank=settings.rank,
        alpha=float(settings.rank),
        paths=[".*attention/.*", ".*mlp/.*"],
    )
    return net, params, curve


def hard_problems(family: Family, settings: Any) -> dict[str, np.ndarray]:
    """Problems larger than any of the training, and solutions to begin with."""
    if family.places <= family.easy[1]:
        raise ValueError(f"problems to search must be larger than easy ones; got {family}.")
    rng = np.random.default_rng((settings.seed, 2))
    found = discovery_problems.distinct(family, rng, settings.problems, settings.role)
    starts = discovery_problems.random_states(family, rng, found, settings.starts)
    return found | {"starts": starts}


def prompt(problem: Any, state: jax.Array) -> jax.Array:
    """``head, solution, ASK``."""
    return jnp.concatenate([problem["head"], state, jnp.array([ASK], jnp.int32)])


def searcher(family: Family, net: models.Decoder, settings: Any, reuse: bool) -> Any:
    """``(params, problems, keys, rate) -> (solutions [N, A], first scores [N], curves)``."""

    @jax.jit
    def run(params: Any, problems: Any, keys: Any, rate: Any) -> Any:
        predict = methods.discover(
            models.reader(net),
            lambda problem: problem["starts"],
            prompt,
            lambda problem, generated: generated.tokens,
            lambda problem, states: discovery_problems.scores(family, problem, states),
            num_tokens=family.places,
            optimizer=optax.adam(rate),
            num_steps=settings.steps,
            num_starts=settings.starts,
            num_rollouts=settings.rollouts,
            pool_size=settings.pool,
            exploration=settings.exploration,
            reuse=reuse,
            temperature=settings.temperature,
            kl=settings.kl,
        )
        found, info = ttt.batched(predict, chunk_size=settings.chunk)(params, problems, keys)
        return found.solution, found.first, info.aux

    return run


def programmed(family: Family, settings: Any) -> Any:
    """As many chains of local search as the decoder has prompts, so equally many are scored."""

    def one(problem: Any, key: Any) -> Any:
        def chain(start: Any, key: Any) -> Any:
            steps = settings.steps, settings.rollouts
            return discovery_problems.climb(family, problem, start, key, *steps)

        states, values = jax.vmap(chain)(problem["starts"], jax.random.split(key, settings.starts))
        best = values[:, -1].argmax()
        curves = {"best": values[:, 1:].max(0), "mean": values[:, 1:].mean(0)}
        return states[best, -1], values[:, 0].max(), curves

    return jax.jit(lambda params, problems, keys, rate: jax.vmap(one)(problems, keys))


def searchers(family: Family, net: models.Decoder, settings: Any) -> dict[str, Any]:
    """Those that the ways need, each compiled once: without learning is at a rate of zero."""
    return {
        "reuse": searcher(family, net, settings, True),
        "no reuse": searcher(family, net, settings, False),
        "program": programmed(family, settings),
    }


def search(family: Family, run: Any, inputs: Any, way: str) -> dict[str, Any]:
    """Best scores and curves of one way; what it found is scored anew, by one program for all."""
    begin = time.perf_counter()
    found, first, curves = jax.device_get(run(*inputs))
    seconds = time.perf_counter() - begin
    scored = jax.vmap(lambda problem, state: discovery_problems.scores(family, problem, state))
    best = np.asarray(jax.jit(scored)(inputs[1], found[:, None]))[:, 0]
    return {
        "way": way,
        "mean": float(best.mean()),
        "interval": interval(best),
        "best": best.tolist(),
        "first": first.tolist(),
        "solutions": found.tolist(),
        "best_along": curves["best"].round(5).tolist(),
        "curve": {name: leaf.mean(0).round(5).tolist() for name, leaf in curves.items()},
        "seconds": seconds,
    }


def interval(values: np.ndarray) -> list[float]:
    """The 95 % interval of the mean over the problems, by a bootstrap."""
    places = np.random.default_rng(0).integers(len(values), size=(4000, len(values)))
    ends: list[float] = np.percentile(values[places].mean(1), [2.5, 97.5]).tolist()
    return ends


def against(best: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Wins, ties and losses over the problems, and the mean difference with its interval."""
    gains = np.array(best) - np.array(other)
    return {
        "wins": int((gains > TIE).sum()),
        "ties": int((abs(gains) <= TIE).sum()),
        "losses": int((gains < -TIE).sum()),
        "mean": float(gains.mean()),
        "interval": interval(gains),
    }


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Trains, searches in every way, and writes the record after each."""
    launch.chosen("family", (settings.family,), FAMILIES)
    launch.chosen("way", settings.ways, WAYS)
    launch.chosen("role", (settings.role,), discovery_problems.ROLES)
    if settings.starts > settings.pool:
        raise launch.UserError(
            f"starts must be at most pool, where they are kept; got {settings.starts} and "
            f"{settings.pool}."
        )
    family = FAMILIES[settings.family]
    problems = hard_problems(family, settings)
    path = launch.new_file(out)
    net, params, curve = train(family, settings)
    samples = settings.steps * settings.starts * settings.rollouts
    record = provenance.of(settings) | {"training_nats": curve, "samples": samples}
    record |= {"rows": [], "against": {}}
    print(f"trained: {curve[-1]:.4f} nats; {samples} samples of each problem", flush=True)
    runs, compiled = searchers(family, net, settings), {}
    keys = ttt.sample_keys(jax.random.key(settings.seed), np.arange(settings.problems))
    for way in settings.ways:
        name, learning = WAYS[way]
        inputs = params, problems, keys, jnp.float32(settings.rate * learning)
        if name not in compiled:
            compiled[name] = runs[name].lower(*inputs).compile()
        row = search(family, compiled[name], inputs, way)
        first = (record["rows"] or [row])[0]
        compared = against(first["best"], row["best"])
        record["rows"].append(row)
        if row is not first:
            record["against"][way] = compared
        launch.write_json(path, record)
        print(
            f"{way:9} best {row['mean']:.4f} in {row['seconds']:.1f} s; {first['way']} against it: "
            f"{compared['wins']} wins, {compared['ties']} ties, {compared['losses']} losses",
            flush=True,
        )
    return record


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "family": flags.DEFINE_enum("family", "rulers", list(FAMILIES), "Which problems."),
        "role": flags.DEFINE_enum("role", "test", discovery_problems.ROLES, "Which of them."),
        "ways": flags.DEFINE_list("ways", list(WAYS), "The first is compared with the others."),
        "seed": flags.DEFINE_integer("seed", 0, "Of weights, problems and rollouts.", 0),
        "width": flags.DEFINE_integer("width", 128, "Of the decoder; a multiple of 32.", 32),
        "depth": flags.DEFINE_integer("depth", 4, "Layers.", 1),
        "num_steps": flags.DEFINE_integer("num_steps", 6000, "Of the training.", 1),
        "rows": flags.DEFINE_integer("rows", 256, "Examples of a training step.", 1),
        "easy_problems": flags.DEFINE_integer("easy_problems", 20000, "To train on.", 1),
        "problems": flags.DEFINE_integer("problems", 32, "How many are searched.", 1),
        "rank": flags.DEFINE_integer("rank", 8, "Of a copy.", 1),
        "rate": flags.DEFINE_float("rate", 3e-3, "Step size.", 0.0),
        "kl": flags.DEFINE_float("kl", 0.0, "Weight of the divergence.", 0.0),
        "temperature": flags.DEFINE_float("temperature", 1.0, "Of the rollouts.", 0.0),
        "exploration": flags.DEFINE_float("exploration", 1.0, "See methods.discover.", 0.0),
        "steps": flags.DEFINE_integer("steps", 50, "Of every search.", 1),
        "starts": flags.DEFINE_integer("starts", 8, "Solutions that a step goes on from.", 1),
        "rollouts": flags.DEFINE_integer("rollouts", 64, "Continuations of each.", 2),
        "pool": flags.DEFINE_integer("pool", 64, "Solutions to go on from, at most.", 1),
        "chunk": flags.DEFINE_integer("chunk", 8, "Problems at once.", 1),
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)
