"""Does a language model answer BIG-Bench Hard better after learning from the demonstrations?

``python -m benchmarks.bbh --weights=FILE --data=FOLDER --out=FILE`` draws ten demonstrations of
each task and asks the others in several ways, with one form of prompt and one scorer:

* ``zero_shot``: the source; ``in_context``: the source, the demonstrations in the prompt
* ``adapted``: an adapter per task that learned from leave-one-out sequences of its demonstrations,
  which stand in the prompt, too; ``adapted_bare``: the same without them in the prompt
* ``direct``: an adapter that learned from each demonstration by itself, asked without them
* ``shared``: one adapter that learned from the same sequences of all tasks
* ``guarded``: ``adapted``, with as many steps as two folds of the demonstrations choose, or none

The seed halves the queries of each task: ``--role=validation`` compares several ``--rates`` and
``--steps`` on one half, and ``--role=reported`` has the other half for one of each.

Protocol: Suzgun et al., 2022 (https://arxiv.org/abs/2210.09261), without a chain of thought;
adaptation: Akyürek et al., 2025 (https://arxiv.org/abs/2411.07279).
"""

import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
from absl import flags

from benchmarks import options
from benchmarks.bbh import learning, questions, smoke, table
from benchmarks.bbh.ways import WAYS, Bench
from experiments import launch, provenance
from ttt_jax import models
from ttt_jax.data import few_shot
from ttt_jax.data.few_shot import Example, FewShotTask

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def load_tasks(settings: Any) -> list[FewShotTask]:
    """The tasks with demonstrations and queries.

    Raises:
      UserError: no folder, an unknown task, or too few examples.
    """
    if settings.smoke:
        examples: dict[str, list[Example]] = smoke.tasks()
    else:
        folder = pathlib.Path(settings.data)
        known = sorted(path.stem for path in folder.glob("*.json")) if settings.data else []
        if not known:
            raise launch.UserError(
                f"--data must be a folder of {{task}}.json files; got {settings.data!r}."
            )
        names = launch.chosen("task", settings.tasks or known, known)
        examples = {name: few_shot.load_bbh(folder, name) for name in names}
    common = {"shots": settings.shots, "seed": settings.seed}
    common |= {"role": settings.role, "most": settings.queries}
    return [questions.draw(name, each, **common) for name, each in examples.items()]


def load_model(settings: Any) -> tuple[learning.Base, str]:
    """The decoder with factors, and its name.

    Raises:
      UserError: no weights, or none with a tokenizer.
    """
    about = {"rank": settings.rank, "alpha": float(settings.rank), "seed": settings.seed}
    if settings.smoke:
        return learning.factors(*smoke.model(), smoke.Bytes(), **about), "random"
    if not settings.weights:
        raise launch.UserError("--weights needs a GGUF file, its parts, or a folder; got none.")
    dtype = DTYPES[settings.dtype]
    given = {"dtype": dtype, "compute_dtype": dtype, "remat": settings.remat}
    given["unroll"] = settings.unroll
    if pathlib.Path(settings.weights[0]).is_dir():
        made = models.load_hugging_face(settings.weights[0], **given)
    else:
        made = models.load_gguf(tuple(settings.weights), **given)
    if made.tokenizer is None:
        raise launch.UserError(f"--weights needs a tokenizer; got {settings.weights[0]!r} without.")
    return learning.factors(made.module, made.params, made.tokenizer, **about), made.name


def check(settings: Any) -> None:
    """Refuses what cannot be run.

    Raises:
      UserError: naming the flag, its value, and what helps.
    """
    launch.chosen("way", settings.ways, WAYS)
    if "in_context" not in settings.ways:
        raise launch.UserError("--ways must have in_context, which all others are compared with.")
    for flag in ("rates", "steps"):
        values = settings[flag]
        if not values or min(values) <= 0:
            raise launch.UserError(f"--{flag} must be larger than 0; got {values}.")
        if len(values) > 1 and settings.role != "validation":
            raise launch.UserError(
                f"--{flag} must be one value where it is reported; got {values}: choose with "
                "--role=validation."
            )
    if any(steps % settings.every for steps in settings.steps):
        raise launch.UserError(
            f"--every must divide --steps; got {settings.every} and {settings.steps}: "
            f"{math.gcd(*settings.steps)} does."
        )
    if "guarded" in settings.ways and settings.shots < 4:
        raise launch.UserError(
            f"--shots must be at least 4 for two folds; got {settings.shots}: leave guarded out."
        )


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Learns, asks, and writes the record after every row.

    Raises:
      UserError: settings that cannot be run, or an ``out`` that is there.
    """
    begin = time.perf_counter()
    check(settings)
    path = launch.new_file(out)
    tasks = load_tasks(settings)
    base, name = load_model(settings)
    bench = Bench(base, tasks, settings)
    record = provenance.of(settings) | {"model": name, "tasks": bench.about(), "rows": []}
    record["loading_seconds"] = time.perf_counter() - begin
    ways = [way for way in WAYS if way in settings.ways]
    grid = [(rate, steps) for rate in settings.rates for steps in settings.steps]
    for way in ways:
        for rate, steps in grid if WAYS[way].learned else [(None, None)]:
            if way == "guarded" and steps != max(settings.steps):
                continue  # the folds choose among all of them
            row = bench.row(way, rate, steps)
            record["rows"].append(row)
            shown = record["rows"][0]["bits"]
            if way == "in_context":
                for task, about in record["tasks"].items():
                    about["in_context_above_chance"] = row["accuracy"][task] - 100 * about["chance"]
            row["summary"] = table.summary(record["tasks"], row, shown)
            record["seconds"] = time.perf_counter() - begin
            launch.write_json(path, record)
            spent = [row[part] for part in ("learning", "scoring") if part in row]
            print(
                f"{table.label(row)}: {row['summary']['all']['accuracy'][0]:.1f} %, "
                f"{sum(each['seconds'] for each in spent):.1f} s and "
                f"{sum(each['compile_seconds'] for each in spent):.1f} s of compilation",
                flush=True,
            )
    print("\n".join(table.lines(record)))
    return record


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    out, settings = options.chosen(_FLAGS)
    try:
        settings.rates = tuple(float(each) for each in settings.rates)
        settings.steps = tuple(int(each) for each in settings.steps)
    except ValueError as error:
        raise launch.UserError(f"--rates and --steps must be numbers: {error}.") from error
    if settings.smoke:
        settings.update(smoke.SETTINGS)
    run(out, settings)


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "weights": flags.DEFINE_list("weights", [], "A GGUF file, its parts, or a folder."),
        "data": flags.DEFINE_string("data", "", "The folder of {task}.json."),
        "tasks": flags.DEFINE_list("tasks", [], "Which tasks; all by default."),
        "ways": flags.DEFINE_list("ways", [w for w in WAYS if w != "guarded"], "Which rows."),
        "role": flags.DEFINE_enum("role", "reported", questions.ROLES, "Which queries."),
        "seed": flags.DEFINE_integer("seed", 0, "Of demonstrations, halves and orders.", 0),
        "shots": flags.DEFINE_integer("shots", 10, "Demonstrations of a task.", 2),
        "queries": flags.DEFINE_integer("queries", 1000, "Queries of a task at most.", 1),
        "context": flags.DEFINE_integer("context", 2048, "Tokens of demonstrations.", 64),
        "rank": flags.DEFINE_integer("rank", 16, "Of an adapter.", 1),
        "rates": flags.DEFINE_list("rates", ["3e-4"], "Step sizes of Adam."),
        "shared_factor": flags.DEFINE_float("shared_factor", 0.5, "Of the shared one's.", 0.0),
        "steps": flags.DEFINE_list("steps", ["24"], "Steps of an adapter."),
        "every": flags.DEFINE_integer("every", 8, "Steps between two looks of the guard.", 1),
        "rows": flags.DEFINE_integer("rows", 5, "Sequences of a step.", 1),
        "tasks_at_once": flags.DEFINE_integer("tasks_at_once", 9, "Adapters side by side.", 1),
        "batch": flags.DEFINE_integer("batch", 64, "Queries side by side.", 1),
        "dtype": flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of weights and compute."),
        "remat": flags.DEFINE_bool("remat", True, "Compute activations again."),
        "unroll": flags.DEFINE_integer("unroll", 1, "Layers per step of their loop.", 1),
        "smoke": flags.DEFINE_bool("smoke", False, "A tiny random decoder, tiny tasks, few steps."),
    }
    flags.mark_flag_as_required("out")
    launch.run(main)
