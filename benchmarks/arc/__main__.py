"""How many tasks of ARC-AGI does a decoder solve that learns all their demonstrations at once?

``python -m benchmarks.arc --version=arcagi1 --generated=rearc.jsonl.xz --out=FILE`` trains one
decoder from scratch on the training tasks, generated examples of them and the **demonstrations** of
the evaluation tasks, decodes every test input under many views, and chooses two answers by votes
and by the product of experts. Test outputs are read for the score, and to leave pairs out that hold
them; nowhere else. With ``--isolated`` the demonstrations are left out of the training, too.
``--private_steps=S`` adapts a private copy per task to its demonstrations afterwards.
``--state=FOLDER`` keeps the training, on the way and at its end, ``--stop_at=STEP`` and
``--stop_after=SECONDS`` end it early; the command without them goes on from there.
``--member=FOLDER`` keeps weights and votes for ``python -m benchmarks.arc.pooled``.
"""

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from benchmarks import options
from benchmarks.arc import answers, joint, pooled, private, sources
from benchmarks.arc.networks import network
from experiments import launch, provenance
from ttt_jax import checkpoint, models

# What a kept training has to agree in with the command that goes on with it.
_SAME = (
    "version",
    "generated",
    "isolated",
    "seed",
    "num_steps",
    "warmup",
    "rows",
    "length",
    "most",
)
_SAME += ("heads", "tasks", "smoke")


def trained(
    net: models.GridDecoder,
    data: sources.Sources,
    rows: sources.Rows,
    settings: Any,
    start: float,
) -> tuple[joint.State, list[dict[str, float]]]:
    """Trains from the kept state, if there is one, and keeps the new one.

    Raises:
      UserError: a kept state of other settings.
    """
    shares = {"first_share": 0.0, "last_share": 0.0} if settings.isolated else {}
    training = joint.Training(num_steps=settings.num_steps, warmup=settings.warmup, **shares)
    folder = pathlib.Path(settings.state) if settings.state else None
    same = {name: settings[name] for name in _SAME}
    steps = sorted(folder.glob("step_*")) if folder else []
    begun = int(steps[-1].name.removeprefix("step_")) if steps else 0
    # First, so that batches are made while programs are compiled.
    batches = sources.batches(
        data, rows, settings.seed, joint.shares_of(training), begun, settings.workers
    )
    state, before = joint.begin(net, training, rows, settings.seed), []
    if steps:
        kept = checkpoint.load(steps[-1], like=_tree(state))
        for name, value in same.items():
            if kept.metadata["settings"][name] != value:
                raise launch.UserError(
                    f"{steps[-1]} was trained with {name}={kept.metadata['settings'][name]!r}; got "
                    f"{value!r}: choose another --state, or the same settings."
                )
        state = joint.State(**kept.params)._replace(step=int(kept.params["step"]))
        before = kept.metadata["curve"]
    curve: list[dict[str, float]] = []

    def keep(state: joint.State) -> None:
        """Of several states the newest alone stays."""
        place = folder / f"step_{state.step:07d}" if folder else None
        if place and not place.exists():
            about = {"settings": same, "curve": before + curve}
            checkpoint.save(place, _tree(state), metadata=about)
            for older in sorted(folder.glob("step_*"))[:-1]:
                shutil.rmtree(older)

    stops = joint.Stops(
        at=min(settings.stop_at or training.num_steps, training.num_steps),
        seconds=start + settings.stop_after if settings.stop_after else float("inf"),
        keep_every=settings.keep_every,
        keep=keep,
    )
    state = joint.train(net, training, state, batches, stops, print, curve, settings.log_every)
    keep(state)
    return state, before + curve


def _tree(state: joint.State) -> dict[str, Any]:
    return state._asdict() | {"step": np.asarray(state.step, np.int32)}


def _divisor(number: int, near: int) -> int:
    """The largest divisor that is at most ``near``, or 1."""
    return next((part for part in range(near, 0, -1) if number % part == 0), 1)


def add_private(
    record: dict[str, Any],
    net: models.GridDecoder,
    params: Any,
    tasks: Sequence[Any],
    queries: Sequence[answers.Query],
    settings: Any,
    save: Callable[[], None],
) -> None:
    """What private copies on top solve by votes and experts of as many views; saved before scores.

    Of several step sizes the one is taken under which held-out demonstrations of the first tasks
    cost least. A decoder that was trained on the demonstrations knows those that the guard holds
    out, and the guard then favors no step: ``guard`` in the record says so.
    """
    begin = time.perf_counter()
    chosen = private.Settings(
        rate=settings.private_rates[0],
        num_steps=settings.private_steps,
        every=_divisor(settings.private_steps, settings.private_steps // 6),
        held_out=settings.private_held_out,
        length=settings.length,
        most=settings.most,
        tasks_at_once=settings.private_at_once,
    )
    learner = private.prepared(net, params, chosen, settings.seed)
    nats = {}
    if len(settings.private_rates) > 1:
        curves = private.held_out_nats(learner, tasks, settings.private_rates)
        nats = dict(zip(map(str, settings.private_rates), curves, strict=True))
        lowest = [min(curve) for curve in curves]
        chosen = chosen._replace(rate=settings.private_rates[int(np.argmin(lowest))])
        print(f"held-out nats by step size {nats}: {chosen.rate}", flush=True)
    copies = private.learn(learner, tasks, chosen.rate)
    seconds = {"learning": time.perf_counter() - begin}
    asked = [query for query in queries if query.task in copies.places]
    views = {"num_views": settings.views, "cache_tokens": settings.cache_tokens}
    cast = private.answer(copies, asked, **views, seed=settings.seed)
    seconds["answering"] = time.perf_counter() - begin - seconds["learning"]
    own = answers.candidates(cast)
    names = [task.name for task in tasks]
    guard = "unseen" if settings.isolated else "trained on by the source"
    about = {
        "settings": chosen._asdict(),
        "guard": guard if settings.private_held_out else "none",
        "steps": {names[number]: steps for number, steps in copies.steps.items()},
        "held_out_nats": nats,
    }

    def keep(own: Sequence[answers.Answers]) -> None:
        table = answers.solved(asked, own)
        record["private"] = about | {
            "solved": {rule: sum(each.values()) for rule, each in table.items()},
            "rows": [answers.row_of(*pair, names) for pair in zip(asked, own, strict=True)],
            "seconds": seconds | {"all": time.perf_counter() - begin},
        }
        save()

    keep(own)
    own = private.score(
        copies,
        asked,
        own,
        settings=chosen,
        num_views=settings.score_views,
        keep=settings.keep,
        seed=settings.seed,
    )
    keep(own)
    print(f"private copies: {record['private']['solved']} of {len(copies.steps)}", flush=True)


def add_source(
    record: dict[str, Any],
    net: models.GridDecoder,
    params: Any,
    tasks: Sequence[Any],
    queries: Sequence[answers.Query],
    rows: sources.Rows,
    settings: Any,
) -> None:
    """What the decoder solves without copies, by votes and experts, and how long it takes."""
    begin = time.perf_counter()
    # A loop over layers is compiled sooner, and hardly slower token by token.
    cast = answers.decode(
        net.clone(unroll=1),
        params,
        queries,
        num_views=settings.views,
        cache_tokens=settings.cache_tokens,
        seed=settings.seed,
        log=print,
    )
    record["seconds"]["decoding"] = time.perf_counter() - begin
    if settings.member:
        spent = sum(record["seconds"][part] for part in ("data", "training", "decoding"))
        about = {name: settings[name] for name in (*pooled.SHARED, *pooled.OWN)}
        pooled.save(settings.member, pooled.Member(params, cast, about, spent))
    begin = time.perf_counter()
    given = answers.score(
        net,
        [params],
        queries,
        answers.candidates(cast),
        rows=rows,
        num_views=settings.score_views,
        keep=settings.keep,
        seed=settings.seed,
    )
    record["seconds"]["scoring"] = time.perf_counter() - begin
    table = answers.solved(queries, given)
    record["solved"] = {rule: sum(each.values()) for rule, each in table.items()}
    names = [task.name for task in tasks]
    record["rows"] = [answers.row_of(*pair, names) for pair in zip(queries, given, strict=True)]
    print(f"solved of {len(tasks)}: {json.dumps(record['solved'])}", flush=True)


def rates_of(settings: Any) -> tuple[float, ...]:
    """The step sizes of the private copies.

    Raises:
      UserError: none, one that is no number, or several without a guard to choose by.
    """
    given = settings.private_rates
    try:
        rates = tuple(float(rate) for rate in given)
    except ValueError as error:
        raise launch.UserError(f"--private_rates must be numbers: {error}.") from error
    if not rates or min(rates) <= 0:
        raise launch.UserError(f"--private_rates must be larger than 0; got {given}.")
    if len(rates) > 1 and not settings.private_held_out:
        raise launch.UserError(
            f"--private_rates must be one without a guard; got {given}: set --private_held_out=1, "
            "by which one is chosen."
        )
    return rates


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Trains, answers, scores, and writes the record.

    Raises:
      UserError: an ``out`` that is there, or a member that could not be kept.
    """
    path, start = launch.new_file(out), time.perf_counter()
    settings.private_rates = rates_of(settings)
    if settings.member:
        pooled.require_room(settings.member, settings.source_answers)
    rows = sources.Rows(settings.rows, settings.length, settings.most)
    generated = pathlib.Path(settings.generated) if settings.generated else None
    data, tasks = sources.load(
        settings.version, generated, rows.length, most=settings.tasks or None
    )
    print(f"left out, as they hold an answer: {data.dropped}", flush=True)
    net = network(settings, len(data.names))
    seconds = {"data": time.perf_counter() - start}
    begin = time.perf_counter()
    state, curve = trained(net, data, rows, settings, start)
    seconds["training"] = time.perf_counter() - begin
    record = provenance.of(settings) | {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "pairs": [len(pool.pairs) for pool in data.pools],
        "dropped": [list(entry) for entry in data.dropped],
        "shown": list(data.shown),
        "curve": curve,
        "rows": [],
    }
    if state.step < settings.num_steps:
        launch.write_json(path, record | {"seconds": seconds})
        return record
    record |= {"tasks": len(tasks), "seconds": seconds}
    queries = answers.queries_of(tasks)

    def save() -> None:
        seconds["all"] = time.perf_counter() - start
        launch.write_json(path, record)

    save()
    if settings.source_answers:
        add_source(record, net, state.params, tasks, queries, rows, settings)
        save()
    if settings.private_steps:
        add_private(record, net, state.params, tasks, queries, settings, save)
    print(f"seconds {seconds}", flush=True)
    return record


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "version": flags.DEFINE_enum("version", None, ["arcagi1", "arcagi2"], "Which set."),
        "generated": flags.DEFINE_string("generated", "", "Generated examples (RE-ARC)."),
        "state": flags.DEFINE_string("state", "", "A folder that keeps the training."),
        "member": flags.DEFINE_string("member", "", "A folder for benchmarks.arc.pooled."),
        "stop_at": flags.DEFINE_integer("stop_at", 0, "End before this step; 0 for none.", 0),
        "stop_after": flags.DEFINE_float(
            "stop_after", 0.0, "Seconds after which no step begins; 0 for none.", 0.0
        ),
        "keep_every": flags.DEFINE_integer("keep_every", 2500, "Steps of a kept state.", 1),
        "seed": flags.DEFINE_integer("seed", 0, "Of weights, batches and views.", 0),
        "num_steps": flags.DEFINE_integer("num_steps", 9500, "Steps of the training.", 1),
        "warmup": flags.DEFINE_integer("warmup", 150, "Steps in which step sizes rise.", 1),
        "rows": flags.DEFINE_integer("rows", 16, "Rows of a batch.", 1),
        "length": flags.DEFINE_integer("length", 2048, "Tokens of a row.", 16),
        "most": flags.DEFINE_integer("most", 32, "Sequences of a row.", 1, 127),
        "heads": flags.DEFINE_integer("heads", 12, "Heads of the decoder.", 1),
        "unroll": flags.DEFINE_integer("unroll", 8, "Layers per step of their loop.", 1),
        "views": flags.DEFINE_integer("views", 32, "Views that are decoded.", 1),
        "score_views": flags.DEFINE_integer("score_views", 8, "Views that score.", 1),
        "keep": flags.DEFINE_integer("keep", 12, "Candidates that are scored.", 1),
        "cache_tokens": flags.DEFINE_integer("cache_tokens", 1 << 20, "Slots at once.", 1),
        "workers": flags.DEFINE_integer("workers", 8, "Processes that make batches.", 0),
        "log_every": flags.DEFINE_integer("log_every", 200, "Steps of a line.", 1),
        "isolated": flags.DEFINE_bool("isolated", False, "Leave out the tasks to be solved."),
        "source_answers": flags.DEFINE_bool(
            "source_answers", True, "Whether the decoder without copies answers, too."
        ),
        "private_steps": flags.DEFINE_integer("private_steps", 0, "Of private copies; 0: none.", 0),
        "private_rates": flags.DEFINE_list("private_rates", ["1e-3"], "Their step sizes, to try."),
        "private_held_out": flags.DEFINE_integer("private_held_out", 1, "Of the guard.", 0),
        "private_at_once": flags.DEFINE_integer("private_at_once", 32, "Copies at once.", 1),
        "tasks": flags.DEFINE_integer("tasks", 0, "So many tasks of a kind; 0 for all.", 0),
        "smoke": flags.DEFINE_bool("smoke", False, "A tiny decoder, for a CPU."),
    }
    flags.mark_flags_as_required(["out", "version"])
    options.start(run, _FLAGS)
