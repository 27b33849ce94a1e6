"""What do several decoders of ARC-AGI solve together?

``python -m benchmarks.arc --member=FOLDER ...`` keeps a trained decoder's weights and the votes of
its views; ``python -m benchmarks.arc.pooled --members=FOLDER,FOLDER,... --out=FILE`` counts the
votes of all as one, and lets every decoder score the candidates of all: experts are views under
members. The minutes of the record are those of all members and of this program.
"""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags

from benchmarks import options
from benchmarks.arc import answers, sources
from benchmarks.arc.networks import network
from experiments import launch, provenance
from ttt_jax import checkpoint, votes

# What members have to agree in.
SHARED = ("version", "isolated", "rows", "length", "most", "heads", "tasks", "smoke")
# What is of each.
OWN = ("seed", "num_steps")
_WEIGHTS, _VOTES = "weights", "votes.json"


class Member(NamedTuple):
    """A trained decoder.

    Attributes:
      params: of it.
      cast: by query, a vote per view.
      settings: of its run.
      seconds: from the start of its program to its votes.
    """

    params: Any
    cast: list[list[votes.Vote]]
    settings: dict[str, Any]
    seconds: float


def require_room(folder: str, source_answers: bool) -> None:
    """Refuses a member that could not be kept, before it is trained.

    Raises:
      UserError: a folder that holds something, or no answers to keep.
    """
    place = pathlib.Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise launch.UserError(
            f"--member must be a folder that is not there yet, or empty; got {folder}: remove it "
            "or choose another."
        )
    if not source_answers:
        raise launch.UserError(
            f"--member keeps the votes of the decoder without copies; got {folder} with "
            "--nosource_answers: leave one of them out."
        )


def save(folder: str, member: Member) -> None:
    """Keeps a member."""
    place = pathlib.Path(folder)
    checkpoint.save(place / _WEIGHTS, member.params)
    cast = [
        [None if vote.answer is None else np.asarray(vote.answer).tolist() for vote in each]
        for each in member.cast
    ]
    about = {"settings": member.settings, "seconds": member.seconds, "votes": cast}
    launch.write_json(place / _VOTES, about)


def load(folder: str) -> Member:
    """A kept member.

    Raises:
      UserError: a folder without one.
    """
    place = pathlib.Path(folder)
    if not (place / _VOTES).exists():
        raise launch.UserError(
            f"--members must be folders that python -m benchmarks.arc --member=FOLDER wrote; got "
            f"{folder}, which has no {_VOTES}."
        )
    kept = json.loads((place / _VOTES).read_text("utf-8"))
    cast = [
        [votes.Vote(None if answer is None else np.array(answer), None) for answer in each]
        for each in kept["votes"]
    ]
    params = checkpoint.load(place / _WEIGHTS).params
    return Member(params, cast, kept["settings"], kept["seconds"])


def agreed(members: Mapping[str, Member]) -> dict[str, Any]:
    """The settings that all members share, and of each its seed and its number of steps.

    Raises:
      UserError: members of other settings, or two with one seed.
    """
    (first, reference), *others = members.items()
    seeds = {reference.settings["seed"]: first}
    for folder, member in others:
        for name in SHARED:
            if (value := member.settings[name]) != reference.settings[name]:
                raise launch.UserError(
                    f"members must share --{name}; got {value!r} of {folder} and "
                    f"{reference.settings[name]!r} of {first}: pool decoders of the same settings."
                )
        sizes = [each.params["params"]["task"].shape[0] for each in (member, reference)]
        if sizes[0] != sizes[1]:
            raise launch.UserError(
                f"members must be trained on the same tasks; got tables of {sizes[0]} in {folder} "
                f"and of {sizes[1]} in {first}: give all the same --generated."
            )
        if (seed := member.settings["seed"]) in seeds:
            raise launch.UserError(
                f"members must have seeds of their own; got {seed} of {seeds[seed]} and {folder}: "
                "train one of them with another --seed."
            )
        seeds[seed] = folder
    shared = {name: reference.settings[name] for name in SHARED}
    return shared | {
        name: tuple(member.settings[name] for member in members.values()) for name in OWN
    }


def together(members: Sequence[Member]) -> list[answers.Answers]:
    """By query, the candidates of the votes of all members."""
    every = zip(*(member.cast for member in members), strict=True)
    return answers.candidates([[vote for cast in casts for vote in cast] for casts in every])


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Pools, scores, and writes the record.

    Raises:
      UserError: an ``out`` that is there, or members that cannot be pooled.
    """
    path, start = launch.new_file(out), time.perf_counter()
    if len(set(settings.members)) < max(len(settings.members), 2):
        raise launch.UserError(
            f"--members must be two or more different folders; got {tuple(settings.members)}: name "
            "every decoder once."
        )
    members = {folder: load(folder) for folder in settings.members}
    settings = ml_collections.ConfigDict(settings)
    settings.update(agreed(members))
    rows = sources.Rows(settings.rows, settings.length, settings.most)
    _, tasks = sources.load(settings.version, None, rows.length, most=settings.tasks or None)
    queries = answers.queries_of(tasks)
    given = together(list(members.values()))
    seconds = {
        "members": sum(member.seconds for member in members.values()),
        "data": time.perf_counter() - start,
    }
    begin = time.perf_counter()
    params = [jax.device_put(member.params) for member in members.values()]
    net = network(settings, params[0]["params"]["task"].shape[0])
    given = answers.score(
        net,
        params,
        queries,
        given,
        rows=rows,
        num_views=settings.score_views,
        keep=settings.keep,
        seed=0,
    )
    seconds["scoring"] = time.perf_counter() - begin
    table = answers.solved(queries, given)
    names = [task.name for task in tasks]
    record = provenance.of(settings) | {
        "solved": {rule: sum(each.values()) for rule, each in table.items()},
        "rows": [answers.row_of(*pair, names) for pair in zip(queries, given, strict=True)],
        "tasks": len(tasks),
        "seconds": seconds | {"all": time.perf_counter() - start},
    }
    launch.write_json(path, record)
    print(f"solved of {len(tasks)}: {json.dumps(record['solved'])}, seconds {seconds}", flush=True)
    return record


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "members": flags.DEFINE_list("members", None, "Folders of benchmarks.arc --member."),
        "score_views": flags.DEFINE_integer("score_views", 8, "Views that score.", 1),
        "keep": flags.DEFINE_integer("keep", 16, "Candidates that are scored.", 1),
        "unroll": flags.DEFINE_integer("unroll", 8, "Layers per step of their loop.", 1),
    }
    flags.mark_flags_as_required(["out", "members"])
    options.start(run, _FLAGS)
