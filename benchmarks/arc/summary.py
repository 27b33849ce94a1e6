"""What the records of ``python -m benchmarks.arc`` say: solved tasks, intervals, gaps, confidence.

``python -m benchmarks.arc.summary FILE ...`` prints, for each record, the tasks that each rule
solves with a bootstrap interval over tasks, and whether the share of the votes is a confidence; for
each record after the first, its difference from the first one, paired over tasks. Nothing is
computed anew but from the rows.
"""

import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.arc import answers
from experiments import launch
from experiments.report import committed

_DRAWS = 5000
_BINS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

Row = Mapping[str, Any]


class Interval(NamedTuple):
    """A sum over tasks and the 2.5 and 97.5 percentiles of sums over resampled tasks."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:g} [{self.low:.0f}, {self.high:.0f}]"


def interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Of numbers ``[tasks]``."""
    rng = np.random.default_rng(seed)
    sums = values[rng.integers(0, len(values), (_DRAWS, len(values)))].sum(1)
    return Interval(float(values.sum()), *(float(end) for end in np.percentile(sums, (2.5, 97.5))))


def order_of(row: Row, rule: str) -> list[int]:
    """Candidates of a query in the order of a rule."""
    right, scores = row["right"], np.asarray(row["log_probs"], np.float64)
    given = answers.Answers([], tuple(range(len(right))), tuple(row["votes"]), scores)
    return answers.ranked(given, rule, right)


def solved(rows: Sequence[Row], rule: str, attempts: int = 2) -> dict[str, bool]:
    """By task, whether every query has a right answer among the first attempts."""
    table: dict[str, bool] = {}
    for row in rows:
        hit = any(row["right"][place] for place in order_of(row, rule)[:attempts])
        table[row["task"]] = table.get(row["task"], True) and hit
    return table


class Bin(NamedTuple):
    """Queries whose first answer has a share of the votes in a range.

    Attributes:
      low: of the range, not in it but for 0.
      high: of the range.
      queries: how many.
      share: mean share of the votes.
      right: share of right first answers.
    """

    low: float
    high: float
    queries: int
    share: float
    right: float


def confidence(rows: Sequence[Row]) -> tuple[list[Bin], float]:
    """Bins of the vote share, and the expected calibration error of it (Naeini et al., 2015)."""
    made, total = [], len(rows)
    shares = np.array([(row["votes"] or [0])[0] / _views(row) for row in rows])
    right = np.array([bool(row["right"] and row["right"][0]) for row in rows])
    for low, high in itertools.pairwise(_BINS):
        inside = (shares > low) & (shares <= high) | ((low == 0.0) & (shares == 0.0))
        if inside.any():
            means = float(shares[inside].mean()), float(right[inside].mean())
            made.append(Bin(low, high, int(inside.sum()), *means))
    return made, sum(each.queries * abs(each.share - each.right) for each in made) / total


def _views(row: Row) -> int:
    return max(sum(row["votes"]) + row["missing"], 1)


def gap(rows: Sequence[Row], others: Sequence[Row], rule: str) -> Interval:
    """How many more tasks the first rows solve, paired over the tasks of both.

    Raises:
      UserError: no task in common.
    """
    first, second = solved(rows, rule), solved(others, rule)
    if not (common := sorted(set(first) & set(second))):
        raise launch.UserError("the records must have tasks in common to be compared; got none.")
    return interval(np.array([float(first[task]) - float(second[task]) for task in common]))


def total(record: Mapping[str, Any], rule: str = "experts", private: bool = False) -> float:
    """Tasks that a rule solves in two attempts, by the private copies where wanted."""
    rows = record["private"]["rows"] if private else record["rows"]
    return float(sum(solved(rows, rule).values()))


def private_total(record: Mapping[str, Any]) -> float:
    """:func:`total` of the private copies."""
    return total(record, private=True)


def minutes(record: Mapping[str, Any]) -> float:
    """From the start of the program to the scores, without private copies; members included."""
    parts = ("members", "data", "training", "decoding", "scoring")
    return sum(float(record["seconds"].get(part, 0.0)) for part in parts) / 60


def turned(rows: Sequence[Row], others: Sequence[Row], rule: str) -> tuple[int, int]:
    """How many tasks the first rows solve and the others do not, and the reverse: the harm."""
    first, second = solved(rows, rule), solved(others, rule)
    common = sorted(set(first) & set(second))
    won = sum(first[task] and not second[task] for task in common)
    return won, sum(second[task] and not first[task] for task in common)


JOINT = ("arc1_joint", "arc1_joint_seed1", "arc1_joint_seed2")
"""The committed records of the joint decoder, a seed each."""


def of_seeds(record: Mapping[str, Any], of: Callable[[Mapping[str, Any]], float] = total) -> float:
    """The mean over the committed seeds of which ``record`` is the first."""
    others = [committed.read(name) for name in JOINT[1:]]
    return sum(of(each) for each in (record, *others)) / len(JOINT)


minutes_of_seeds = functools.partial(of_seeds, of=minutes)


def lines(record: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> list[str]:
    """The text of a record, and of its difference from the first one."""
    config = record["config"]
    training = "isolated" if config["isolated"] else "joint"
    made = [
        f"{config['version']} {training}, seed {config['seed']}, {config['num_steps']} steps, "
        f"{minutes(record):.1f} minutes of one {record['device']}"
    ]
    parts = {"": record["rows"]} if record["rows"] else {}
    if "private" in record:
        parts[" of private copies"] = record["private"]["rows"]
    for name, rows in parts.items():
        rules = answers.RULES if rows and len(rows[0]["log_probs"]) else ("votes", "oracle")
        for rule in rules:
            table = solved(rows, rule)
            sums = interval(np.array(list(table.values()), np.float64))
            made.append(f"  {rule}{name}: {sums} of {len(table)}")
    if "private" in record and record["rows"]:
        taken = set(record["private"]["steps"])
        shared = [row for row in record["rows"] if row["task"] in taken]
        for rule in ("votes", "experts"):
            more = gap(record["private"]["rows"], shared, rule)
            won, lost = turned(record["private"]["rows"], shared, rule)
            made.append(f"  private copies less the source, {rule}: {more}, won {won}, lost {lost}")
    # Of the decoder without copies where it answered.
    bins, error = confidence(next(iter(parts.values())))
    made.append(f"  share of the votes as a confidence, calibration error {error:.3f}:")
    for each in bins:
        made.append(
            f"    {each.low:4.2f} to {each.high:4.2f}: {each.queries:4} queries, "
            f"share {each.share:.2f}, right {each.right:.2f}"
        )
    if first is not None and first["rows"] and record["rows"]:
        rule = "experts" if "experts" in record["solved"] else "votes"
        made.append(f"  less the first record, {rule}: {gap(record['rows'], first['rows'], rule)}")
    return made


def main(paths: Sequence[str]) -> None:
    """The program.

    Raises:
      UserError: no file, or one without answers.
    """
    if not paths:
        raise launch.UserError("python -m benchmarks.arc.summary needs the files of records.")
    records = [json.loads(pathlib.Path(path).read_text("utf-8")) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if not record["rows"] and "private" not in record:
            raise launch.UserError(
                f"{path} must have answers; its training ended early: go on with --state."
            )
        first = None if record is records[0] else records[0]
        print("\n".join(lines(record, first)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except launch.UserError as error:
        sys.exit(str(error))
