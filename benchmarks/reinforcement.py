"""Does a decoder answer better after reinforcement on its own votes, and better than the votes?

``python -m benchmarks.reinforcement --out=FILE`` trains a small decoder on chains of sums,
differences and products of digits modulo ten, with the results of the steps written out
(``3+4*2=7,4;``), on short chains. Then it is given sets of longer chains, each set with a private
copy: some are learned from by :func:`ttt_jax.methods.ttrl`, others are held out. The file has,
before and after: the share of right continuations, the share of right votes, and the controls: a
label by votes that are not learned from, a reward by chance, a reward for the form alone. All
chains are drawn from the seed; those that are asked are longer than any of the training.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags

import ttt_jax as ttt
from benchmarks import options
from experiments import launch, provenance
from ttt_jax import generation, losses, methods, models, rewards

SIGNS = ("+", "-", "*")
ALPHABET = (*"0123456789", *SIGNS, "=", ",", ";", " ")
EQUALS, COMMA, STOP, PAD = (ALPHABET.index(sign) for sign in "=,; ")


class Chain(NamedTuple):
    """A problem: its text up to the equals sign, and the results of its steps."""

    prompt: str
    results: tuple[int, ...]


def draw_chain(rng: np.random.Generator, terms: int) -> Chain:
    """A chain of so many digits, computed from left to right modulo ten."""
    value = int(rng.integers(10))
    prompt, results = str(value), []
    for _ in range(terms - 1):
        sign, digit = SIGNS[int(rng.integers(3))], int(rng.integers(10))
        value = {"+": value + digit, "-": value - digit, "*": value * digit}[sign] % 10
        prompt += f"{sign}{digit}"
        results.append(value)
    return Chain(prompt + "=", tuple(results))


def tokens_of(text: str) -> list[int]:
    """Places in the alphabet."""
    return [ALPHABET.index(sign) for sign in text]


def solution(chain: Chain) -> str:
    """What the decoder is taught to write after a prompt."""
    return ",".join(map(str, chain.results)) + ";"


def training_batch(
    rng: np.random.Generator, rows: int, terms: Sequence[int], length: int
) -> dict[str, np.ndarray]:
    """Tokens and mask ``[rows, length]``; the solutions alone are learned from."""
    tokens = np.full((rows, length), PAD, np.int32)
    mask = np.zeros((rows, length), np.float32)
    for row in range(rows):
        chain = draw_chain(rng, int(rng.choice(terms)))
        text = tokens_of(chain.prompt), tokens_of(solution(chain))
        size = sum(map(len, text))
        tokens[row, :size] = text[0] + text[1]
        mask[row, len(text[0]) : size] = 1.0
    return {"tokens": tokens, "mask": mask}


def problems(rng: np.random.Generator, count: int, terms: int) -> dict[str, np.ndarray]:
    """Distinct prompts ``[count, 2 terms]`` of one length, and the last result of each."""
    drawn: dict[str, Chain] = {}
    while len(drawn) < count:
        chain = draw_chain(rng, terms)
        drawn.setdefault(chain.prompt, chain)
    chains = list(drawn.values())
    return {
        "tokens": np.array([tokens_of(chain.prompt) for chain in chains], np.int32),
        "truth": np.array([chain.results[-1] for chain in chains], np.int32),
    }


def answer(x: Any, generated: generation.Generated) -> rewards.Answers:
    """The digit before the stop sign; without both there is no answer."""
    tokens = generated.tokens
    ended = (tokens == STOP) & generated.mask
    place = jnp.argmax(ended, axis=-1)
    before = jnp.take_along_axis(tokens, jnp.maximum(place - 1, 0)[..., None], -1)[..., 0]
    return rewards.Answers(before, ended.any(-1) & (place > 0) & (before < 10))


def train(settings: Any) -> tuple[models.Decoder, Any, list[float]]:
    """A decoder of short chains, and the nats per token along its training."""
    rng = np.random.default_rng((settings.seed, 1))
    terms = range(2, settings.easy_terms + 1)

    def batch() -> dict[str, np.ndarray]:
        return training_batch(rng, settings.rows, terms, 4 * settings.hard_terms)

    return fitted(len(ALPHABET), batch, settings)


def fitted(
    vocabulary: int, batch: Callable[[], dict[str, np.ndarray]], settings: Any
) -> tuple[models.Decoder, Any, list[float]]:
    """A decoder trained on batches of tokens and mask, and the nats per token on the way."""
    net = models.Decoder(
        vocabulary=vocabulary,
        width=settings.width,
        depth=settings.depth,
        heads=settings.width // 32,
        attention="xla",
    )
    params = jax.jit(net.init)(jax.random.key(settings.seed), batch()["tokens"][:1])
    loss = losses.next_token(net.apply, batch=True)
    warmup = min(50, settings.num_steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup, settings.num_steps)
    optimizer = optax.adamw(schedule, weight_decay=0.01)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch, jax.random.key(0))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, curve = optimizer.init(params), []
    for number in range(settings.num_steps):
        params, state, value = step(params, state, batch())
        if number % 100 == 0 or number == settings.num_steps - 1:
            curve.append(float(value))
    return net, params, curve


WAYS = {
    "ttrl": {},
    "held_out_votes": {"held_out_votes": True},
    "chance": {"reward": rewards.chance()},
    "form": {"reward": rewards.answered(answer)},
}


def shares(generated: Any, truth: np.ndarray) -> dict[str, float]:
    """Right continuations and right votes, means over the prompts of all sets."""
    tokens = jax.tree.map(lambda leaf: np.asarray(leaf), generated)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tokens)
    made = jax.vmap(lambda g: answer(None, g))(flat)
    values = np.where(np.asarray(made.valid), np.asarray(made.values), -1)
    right = values == truth.reshape(-1, 1)
    counts = (values[..., None] == np.arange(10)).sum(1)
    vote = np.where(counts.max(1) > 0, counts.argmax(1), -1)
    return {
        "right": float(right.mean()),
        "votes_right": float((vote == truth.reshape(-1)).mean()),
        "no_answer": float((values < 0).mean()),
    }


def reinforce(net: models.Decoder, params: Any, settings: Any, way: str) -> dict[str, Any]:
    """Shares before and after, on the prompts that are learned from and on others."""
    rng = np.random.default_rng((settings.seed, 2))
    sets = [
        problems(rng, settings.prompts + settings.held_out, settings.hard_terms)
        for _ in range(settings.sets)
    ]
    stacked = {name: np.stack([each[name] for each in sets]) for name in sets[0]}
    x: dict[str, Any] = {name: leaf[:, : settings.prompts] for name, leaf in stacked.items()}
    x["held_out"] = {name: leaf[:, settings.prompts :] for name, leaf in stacked.items()}
    example = jnp.zeros((1, 2), jnp.int32)
    wide, params = models.low_rank(
        net,
        params,
        jax.random.key(settings.seed + 1),
        example,
        rank=settings.rank,
        alpha=float(settings.rank),
        paths=[".*attention/.*", ".*mlp/.*"],
    )
    predict = methods.ttrl(
        models.reader(wide),
        answer,
        num_tokens=2 * settings.hard_terms,
        stop=(STOP,),
        optimizer=optax.adam(settings.rate),
        num_steps=settings.steps,
        num_rollouts=settings.rollouts,
        num_trained=settings.rollouts // 2,
        stop_ratio=settings.stop_ratio,
        truth=lambda x: x["truth"],
        num_evaluated=settings.rollouts,
        evaluation_sampler=generation.sample(),
        **WAYS[way],
    )
    keys = ttt.sample_keys(jax.random.key(settings.seed), np.arange(settings.sets))
    begin = time.perf_counter()
    made, info = jax.device_get(jax.jit(ttt.batched(predict, chunk_size=1))(params, x, keys))
    return {
        "way": way,
        "trained_before": shares(made.before, x["truth"]),
        "trained_after": shares(made.after, x["truth"]),
        "held_out_before": shares(made.held_out_before, x["held_out"]["truth"]),
        "held_out_after": shares(made.held_out_after, x["held_out"]["truth"]),
        "ok": bool(info.ok.all()),
        "curve": {name: leaf.mean(0).round(4).tolist() for name, leaf in info.aux.items()},
        "seconds": time.perf_counter() - begin,
    }


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Trains, reinforces in every way, and writes the record after each."""
    launch.chosen("way", settings.ways, WAYS)
    if settings.hard_terms <= settings.easy_terms:
        raise launch.UserError(
            "hard_terms must be larger than easy_terms, so that no chain that is asked was trained "
            f"on; got {settings.hard_terms} and {settings.easy_terms}."
        )
    path = launch.new_file(out)
    net, params, curve = train(settings)
    record = provenance.of(settings) | {"training_nats": curve, "rows": []}
    print(f"trained on up to {settings.easy_terms} terms: {curve[-1]:.4f} nats", flush=True)
    for way in settings.ways:
        row = reinforce(net, params, settings, way)
        record["rows"].append(row)
        launch.write_json(path, record)
        for part in ("trained", "held_out"):
            before, after = row[f"{part}_before"], row[f"{part}_after"]
            print(
                f"{way:15} {part:9} right {before['right']:.3f} to {after['right']:.3f}, "
                f"votes {before['votes_right']:.3f} to {after['votes_right']:.3f}",
                flush=True,
            )
    return record


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "ways": flags.DEFINE_list("ways", list(WAYS), "Which rewards."),
        "seed": flags.DEFINE_integer("seed", 0, "Of weights, chains and rollouts.", 0),
        "width": flags.DEFINE_integer("width", 128, "Of the decoder; a multiple of 32.", 32),
        "depth": flags.DEFINE_integer("depth", 4, "Layers.", 1),
        "num_steps": flags.DEFINE_integer("num_steps", 3000, "Of the training.", 1),
        "rows": flags.DEFINE_integer("rows", 128, "Chains of a training step.", 1),
        "easy_terms": flags.DEFINE_integer("easy_terms", 6, "Terms of a training chain.", 2),
        "hard_terms": flags.DEFINE_integer("hard_terms", 8, "Terms of a chain that is asked.", 2),
        "sets": flags.DEFINE_integer("sets", 8, "Sets of prompts, each with a copy.", 1),
        "prompts": flags.DEFINE_integer("prompts", 16, "Prompts of a set.", 1),
        "held_out": flags.DEFINE_integer("held_out", 16, "Further prompts of a set.", 1),
        "rank": flags.DEFINE_integer("rank", 8, "Of a copy.", 1),
        "rate": flags.DEFINE_float("rate", 1e-3, "Step size.", 0.0),
        "steps": flags.DEFINE_integer("steps", 30, "Steps of reinforcement.", 0),
        "rollouts": flags.DEFINE_integer("rollouts", 64, "Continuations of a prompt.", 2),
        "stop_ratio": flags.DEFINE_float("stop_ratio", 2.0, "See methods.ttrl.", 0.0),
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)
