"""Where few-shot tasks come from: ARC, a folder of one's own, or small rules that are drawn."""

import pathlib
import zlib
from typing import NamedTuple

import ml_collections
import numpy as np

from ttt_jax.data import few_shot, grid_rules, isomorphism
from ttt_jax.data.few_shot import FewShotTask

_SPLITS = {"train": "training", "reported": "evaluation"}
# Seeds of drawn tasks begin here.
_FIRST = {"train": 0, "reported": 10**6}


class Tasks(NamedTuple):
    """Tasks by role; those of training that hold a reported answer are left out.

    Attributes:
      train: to train on.
      validation: to choose settings with.
      reported: to report, by the name of their stream.
      left_out: names of what was left out.
    """

    train: tuple[FewShotTask, ...]
    validation: tuple[FewShotTask, ...]
    reported: dict[str, tuple[FewShotTask, ...]]
    left_out: tuple[str, ...]


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses sources that leave something open.

    Raises:
      ValueError: naming the keys.
    """
    data = config.data
    if "train" not in data and data.source.startswith("json:"):
        raise ValueError(
            f"data.train must name the tasks to train on beside data.source={data.source!r}, such "
            "as 'generated', 'arc' or 'json:FOLDER' of other tasks; got none."
        )
    if "arc" in (data.source, data.get("train")) and "version" not in data:
        raise ValueError(
            "data.version must name the version of ARC, 'arcagi1' or 'arcagi2', as they share "
            "tasks; got none."
        )


def read(data: ml_collections.ConfigDict) -> Tasks:
    """The tasks of ``config.data`` by role, validation ones held out of those to train on.

    Raises:
      ValueError: what a source refuses, a reported query without its output, or too few tasks.
    """
    reported = _of(data.source, "reported", data)
    for tasks in reported.values():
        del tasks[data.get("reported") or len(tasks) :]
    every = [task for tasks in reported.values() for task in tasks]
    for task in every:
        for place, query in enumerate(task.queries):
            if query.output is None:
                raise ValueError(
                    f"reported tasks must have the outputs of all queries, to be scored; query "
                    f"{place} of {task.name!r} has none: the page 'Bring your own tasks' answers "
                    "such ones."
                )
    pool = [t for part in _of(data.get("train", data.source), "train", data).values() for t in part]
    left_out = {leak.training for leak in isomorphism.leaks(pool, every)}
    pool = [task for task in pool if task.name not in left_out]
    order = np.random.default_rng(0).permutation(len(pool))
    if len(pool) <= data.validation:
        raise ValueError(
            f"data.validation must leave tasks to train on; got {data.validation} of {len(pool)}."
        )
    pool = [pool[place] for place in order]
    return Tasks(
        tuple(pool[data.validation :]),
        tuple(pool[: data.validation]),
        {name: tuple(tasks) for name, tasks in reported.items()},
        tuple(sorted(left_out)),
    )


def checksum(tasks: Tasks) -> dict[str, int]:
    """What tells the tasks of each role apart, and how many were left out."""
    of_roles = {
        "train": tasks.train,
        "validation": tasks.validation,
        "reported": [task for part in tasks.reported.values() for task in part],
    }
    found = {
        f"tasks of {role}": sum(zlib.crc32(repr(_plain(task)).encode()) for task in held)
        for role, held in of_roles.items()
    }
    return {**found, "tasks left out as they hold a reported answer": len(tasks.left_out)}


def _plain(task: FewShotTask) -> list:
    pairs = [*task.demonstrations, *task.queries]
    return [task.name, *(np.asarray(part).tolist() for pair in pairs for part in pair)]


def _of(source: str, role: str, data: ml_collections.ConfigDict) -> dict[str, list[FewShotTask]]:
    """The tasks of a source by the name of their group."""
    if source == "arc":
        try:
            return {data.version: few_shot.load_arc(data.version, _SPLITS[role])}
        except ImportError as error:
            raise ValueError(f"data.source and data.train: 'arc': {error}") from error
    if source == "generated":
        count = data.tasks if role == "train" else data.reported
        given = {"demonstrations": data.demonstrations, "side": data.side}
        families: dict[str, list[FewShotTask]] = {}
        for number in range(count):
            family = grid_rules.FAMILIES[number % len(grid_rules.FAMILIES)]
            drawn = grid_rules.draw_task(family, _FIRST[role] + number, **given)
            families.setdefault(family, []).append(drawn)
        return families
    folder = pathlib.Path(source.removeprefix("json:"))
    tasks = few_shot.load_folder(folder)
    return {folder.name: tasks}
