"""Does a decoder answer better after reinforcement on its own votes, and better than the votes?

``python -m benchmarks.reinforcement --out=FILE`` trains a small decoder on problems of one family
(:mod:`benchmarks.reinforcement_problems`) in which an operation is rare. Then it is given sets of
problems in which it is frequent, each set with a private copy: some are learned from by
:func:`ttt_jax.methods.ttrl`, others are held out. The file has, before and after: the share of
right continuations, the share of right votes, and the controls: a label by votes that are not
learned from, a reward by chance, a reward for the form alone, a vote of as many samples as the
steps draw. All problems are drawn from the seed, and none that is asked was trained on.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags

import ttt_jax as ttt
from benchmarks import options, reinforcement_problems
from benchmarks.reinforcement_problems import ALPHABET, FAMILIES, STOP, Family, answer
from experiments import launch, provenance
from ttt_jax import generation, losses, methods, models, rewards


def asked(family: Family, settings: Any) -> tuple[dict[str, Any], set[str]]:
    """Sets of prompts to learn from and, under ``held_out``, others; and the texts of all."""
    rng = np.random.default_rng((settings.seed, 2))
    count = settings.prompts + settings.held_out
    drawn, texts = reinforcement_problems.problems(
        family, rng, settings.sets * count, settings.hard_rare
    )
    stacked = {n: leaf.reshape(settings.sets, count, *leaf.shape[1:]) for n, leaf in drawn.items()}
    x: dict[str, Any] = {name: leaf[:, : settings.prompts] for name, leaf in stacked.items()}
    x["held_out"] = {name: leaf[:, settings.prompts :] for name, leaf in stacked.items()}
    return x, set(texts)


def train(
    family: Family, settings: Any, excluded: set[str]
) -> tuple[models.Decoder, Any, list[float]]:
    """A decoder of easy problems, and the nats per token along its training."""
    rng = np.random.default_rng((settings.seed, 1))

    def batch() -> dict[str, np.ndarray]:
        return reinforcement_problems.training_batch(
            family, rng, settings.rows, settings.easy_rare, excluded, settings.slips
        )

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
    # Beyond the step at which the majority ratio ends it.
    "unstopped": {"stop_ratio": 2.0},
    "held_out_votes": {"held_out_votes": True},
    "chance": {"reward": rewards.chance()},
    "form": {"reward": rewards.answered(answer)},
    # As many samples as the steps draw, and no step: what a larger vote has.
    "samples": {"num_steps": 0},
}


def _counted(generated: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers of all prompts, -1 for none; how often each is given; and the votes."""
    tokens = jax.tree.map(lambda leaf: np.asarray(leaf), generated)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tokens)
    made = jax.vmap(lambda g: answer(None, g))(flat)
    values = np.where(np.asarray(made.valid), np.asarray(made.values), -1)
    counts = (values[..., None] == np.arange(10)).sum(1)
    return values, counts, np.where(counts.max(1) > 0, counts.argmax(1), -1)


def turned(before: Any, after: Any, truth: np.ndarray) -> dict[str, float]:
    """Shares of the prompts whose vote was right before and is not after, and the reverse."""
    first, last = (_counted(part)[2] == truth.reshape(-1) for part in (before, after))
    return {"harmed": float((first & ~last).mean()), "mended": float((~first & last).mean())}


def shares(generated: Any, truth: np.ndarray) -> dict[str, float]:
    """Right continuations (pass@1), right votes and the most frequent answer, over all prompts."""
    values, counts, vote = _counted(generated)
    right = values == truth.reshape(-1, 1)
    return {
        "right": float(right.mean()),
        "votes_right": float((vote == truth.reshape(-1)).mean()),
        "no_answer": float((values < 0).mean()),
        # All answers alike are a collapse that agreement alone does not show.
        "most_frequent": float(counts.sum(0).max() / values.size),
    }


def reinforce(
    family: Family, net: models.Decoder, params: Any, x: Any, settings: Any, way: str
) -> dict[str, Any]:
    """Shares before and after, on the prompts that are learned from and on others."""
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
    given = {
        "num_tokens": family.solution,
        "stop": (STOP,),
        "optimizer": optax.adam(settings.rate),
        "num_steps": settings.steps,
        "num_rollouts": settings.rollouts,
        "num_trained": settings.rollouts // 2,
        "stop_ratio": settings.stop_ratio,
        "min_consensus": settings.min_consensus,
        "keep_votes": settings.keep_votes,
        "kl": settings.kl,
        "truth": lambda x: x["truth"],
        "num_evaluated": settings.evaluated
        + (way == "samples") * settings.steps * settings.rollouts,
        "evaluation_sampler": generation.sample(),
    }
    predict = methods.ttrl(models.reader(wide), answer, **given | WAYS[way])
    keys = ttt.sample_keys(jax.random.key(settings.seed), np.arange(settings.sets))
    begin = time.perf_counter()
    made, info = jax.device_get(jax.jit(ttt.batched(predict, chunk_size=1))(params, x, keys))
    return {
        "way": way,
        "trained_before": shares(made.before, x["truth"]),
        "trained_after": shares(made.after, x["truth"]),
        "held_out_before": shares(made.held_out_before, x["held_out"]["truth"]),
        "held_out_after": shares(made.held_out_after, x["held_out"]["truth"]),
        "trained_votes": turned(made.before, made.after, x["truth"]),
        "held_out_votes": turned(made.held_out_before, made.held_out_after, x["held_out"]["truth"]),
        "ok": bool(info.ok.all()),
        "curve": {name: leaf.mean(0).round(4).tolist() for name, leaf in info.aux.items()},
        "seconds": time.perf_counter() - begin,
    }


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Of both columns, what was gained over one answer and over the vote before."""
    made = {}
    for part in ("trained", "held_out"):
        before, after = row[f"{part}_before"], row[f"{part}_after"]
        made[part] = {
            "over_pass1": after["right"] - before["right"],
            "over_votes": after["right"] - before["votes_right"],
        }
    return made


def mean_share(
    record: Mapping[str, Any], when: str, name: str = "right", part: str = "trained"
) -> float:
    """A share of ``ttrl`` in percent, the mean over the seeds of a record."""
    rows = [row for row in record["rows"] if row["way"] == "ttrl"]
    return 100.0 * float(np.mean([row[f"{part}_{when}"][name] for row in rows]))


pass1_before = functools.partial(mean_share, when="before")
votes_before = functools.partial(mean_share, when="before", name="votes_right")
pass1_after = functools.partial(mean_share, when="after")


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Trains, reinforces in every way, and writes the record after each."""
    launch.chosen("way", settings.ways, WAYS)
    launch.chosen("family", (settings.family,), FAMILIES)
    if settings.hard_rare <= settings.easy_rare:
        raise launch.UserError(
            "hard_rare must be larger than easy_rare, so that the rare operation is what is asked; "
            f"got {settings.hard_rare} and {settings.easy_rare}."
        )
    path, family = launch.new_file(out), FAMILIES[settings.family]
    x, texts = asked(family, settings)
    begin = time.perf_counter()
    net, params, curve = train(family, settings, texts)
    record = provenance.of(settings) | {"training_nats": curve, "rows": []}
    record["training_seconds"] = time.perf_counter() - begin
    print(f"trained: {curve[-1]:.4f} nats, {record['training_seconds']:.0f} s", flush=True)
    for way in settings.ways:
        row = reinforce(family, net, params, x, settings, way)
        row["gain"] = summary(row)
        record["rows"].append(row)
        launch.write_json(path, record)
        for part in ("trained", "held_out"):
            before, after = row[f"{part}_before"], row[f"{part}_after"]
            votes = row[f"{part}_votes"]
            print(
                f"{way:15} {part:9} right {before['right']:.3f} to {after['right']:.3f}, "
                f"votes {before['votes_right']:.3f} to {after['votes_right']:.3f}, "
                f"harmed {votes['harmed']:.3f}, mended {votes['mended']:.3f}",
                flush=True,
            )
        curve = {name: leaf for name, leaf in row["curve"].items() if leaf and name in CURVE}
        if "label_right" in curve:
            ends = ", ".join(f"{n} {leaf[0]:.3f} to {leaf[-1]:.3f}" for n, leaf in curve.items())
            print(f"{way:15} {ends}, stopped after {stopped_after(row)} steps", flush=True)
    return record


CURVE = ("accuracy", "label_right", "right_to_wrong", "wrong_to_right", "agreement")


def stopped_after(row: Mapping[str, Any]) -> int:
    """How many steps were taken before the rule ended them."""
    return row["curve"].get("stopped", []).count(0.0)


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "family": flags.DEFINE_string("family", "chains", "Which problems."),
        "ways": flags.DEFINE_list("ways", list(WAYS), "Which rewards."),
        "seed": flags.DEFINE_integer("seed", 0, "Of weights, problems and rollouts.", 0),
        "width": flags.DEFINE_integer("width", 64, "Of the decoder; a multiple of 32.", 32),
        "depth": flags.DEFINE_integer("depth", 2, "Layers.", 1),
        "num_steps": flags.DEFINE_integer("num_steps", 10000, "Of the training.", 1),
        "rows": flags.DEFINE_integer("rows", 128, "Problems of a training step.", 1),
        "easy_rare": flags.DEFINE_float("easy_rare", 0.3, "Share in the training.", 0.0, 1.0),
        "hard_rare": flags.DEFINE_float("hard_rare", 0.7, "Share in what is asked.", 0.0, 1.0),
        "slips": flags.DEFINE_float("slips", 0.6, "Share of rare steps learned wrong.", 0.0, 1.0),
        "sets": flags.DEFINE_integer("sets", 1, "Sets of prompts, each with a copy.", 1),
        "prompts": flags.DEFINE_integer("prompts", 256, "Prompts of a set.", 1),
        "held_out": flags.DEFINE_integer("held_out", 256, "Further prompts of a set.", 1),
        "rank": flags.DEFINE_integer("rank", 8, "Of a copy.", 1),
        "rate": flags.DEFINE_float("rate", 1e-3, "Step size.", 0.0),
        "steps": flags.DEFINE_integer("steps", 40, "Steps of reinforcement.", 0),
        "rollouts": flags.DEFINE_integer("rollouts", 32, "Continuations of a prompt.", 2),
        "evaluated": flags.DEFINE_integer("evaluated", 64, "Continuations before and after.", 1),
        "min_consensus": flags.DEFINE_float(
            "min_consensus", 0.2, "Votes of a label at least.", 0.0, 1.0
        ),
        "keep_votes": flags.DEFINE_bool("keep_votes", True, "See methods.ttrl."),
        "kl": flags.DEFINE_float("kl", 0.0, "See methods.ttrl.", 0.0),
        "stop_ratio": flags.DEFINE_float("stop_ratio", 0.97, "See methods.ttrl.", 0.0),
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)
