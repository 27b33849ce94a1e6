"""Choosing settings on held-out training images, corrupted or not, and nothing else."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import (
    launch,
    methods as methods_lib,
    outcome as outcome_lib,
    runner as runner_lib,
    team as team_lib,
    trials as trials_lib,
)
from ttt_jax import data


def _note(trials: Sequence[trials_lib.Trial]) -> str:
    names = list(dict.fromkeys(domain for trial in trials for domain, _ in trial.cells))
    images = "held-out training images as they are"
    if names != ["clean"]:
        images = f"the validation corruptions ({', '.join(names)}) of held-out training images"
    return (
        "Every setting with more than one candidate was chosen by the lowest mean error, then "
        f"the lowest mean cross-entropy, over {images}, with the model of the first seed. In this "
        "run test images and the reported domains chose nothing; how the candidates were set is "
        "said in the config."
    )


def _cross_entropy(outcome: outcome_lib.Outcome) -> float:
    log_p = np.asarray(jax.nn.log_softmax(outcome.final, axis=-1))
    return float(-log_p[np.arange(len(outcome.label)), outcome.label].mean())


def _is(tried: dict[str, Any], name: str, settings: dict[str, Any]) -> bool:
    """Whether a candidate of the file is that of a method and settings."""
    return tried["method"] == name and tried["params"] == json.loads(json.dumps(settings))


def _score(tried: dict[str, Any]) -> tuple[float, float]:
    loss = tried["cross_entropy"]
    return tried["error"], loss if np.isfinite(loss) else np.inf


def read(path: pathlib.Path) -> dict[str, Any]:
    """``selection.json``.

    Raises:
      UserError: it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(record["chosen"], dict) or not isinstance(record["tried"], list):
            raise TypeError("chosen is no object, or tried no list")
    except (ValueError, KeyError, TypeError) as error:
        raise launch.UserError(f"{path} is damaged ({error!r}); remove it.") from error
    return record


def _require_model(
    path: pathlib.Path,
    record: dict[str, Any],
    runner: runner_lib.Runner,
    methods: dict[str, methods_lib.Method],
) -> None:
    """One model chooses for all methods and seeds of a folder.

    Raises:
      UserError: the seed of the file has another model now, or what is still to be chosen would be
        with the model of another seed.
    """
    seed, chosen_with = record.get("seed"), record.get("checkpoint")
    if seed == runner.seed and chosen_with != runner.fingerprint:
        raise launch.UserError(
            f"{path} was chosen with another checkpoint ({chosen_with}, now "
            f"{runner.fingerprint}). Use another --workdir, or remove the file and the rows."
        )
    several = [name for name, method in methods.items() if len(method.grid) > 1]
    open_choices = [name for name in several if name not in record["chosen"]]
    if seed != runner.seed and open_choices:
        raise launch.UserError(
            f"{path} was chosen with the model of seed {seed}, and {', '.join(open_choices)} has "
            f"several candidates and no choice yet; run --config.seeds='({seed},)' first, which "
            "chooses for all seeds."
        )


def choose(
    path: pathlib.Path,
    methods: dict[str, methods_lib.Method],
    runner: runner_lib.Runner,
    source: data.Source,
    trials: Sequence[trials_lib.Trial],
) -> dict[str, dict[str, Any]]:
    """The chosen settings per method; reads ``selection.json`` if the folder has one.

    The file is written after every candidate, and those that it has are not measured again.

    Args:
      path: ``selection.json``: ``{"note", "chosen": {method: settings}, "tried": [...]}``.
      methods: the methods and their grids.
      runner: evaluates a candidate.
      source: the validation split.
      trials: over the validation domains, in the order that the evaluation has too.

    Returns:
      ``{method: settings}``.

    Raises:
      UserError: a damaged file, or one that another model chose.
    """
    team = runner.team
    record: dict[str, Any] = {
        "note": _note(trials),
        "seed": runner.seed,
        "checkpoint": runner.fingerprint,
        "chosen": {},
        "tried": [],
    }
    if team.index == 0 and path.exists():
        record = read(path)
        _require_model(path, record, runner, methods)
    record = team_lib.agreed(team, record)

    def save() -> None:
        if team.index == 0:
            launch.write_json(path, record)

    for name, method in methods.items():
        if name in record["chosen"]:
            continue
        # What failed is tried again.
        record["tried"] = [
            one for one in record["tried"] if one["method"] != name or "message" not in one
        ]
        scores = []
        for settings in method.grid if len(method.grid) > 1 else ():
            known = [one for one in record["tried"] if _is(one, name, settings)]
            if known:
                scores.append(_score(known[0]))
                continue
            tried: dict[str, Any] = {"method": name, "params": settings}
            batches = [
                runner.batches(source, trial, method.scope, place)
                for place, trial in enumerate(trials)
            ]
            try:
                whole = runner.run_all(name, method, settings, batches)
            except runner_lib.TRIAL_ERRORS as failure:
                # The evaluation will meet the same failure and record it as rows.
                scores.append((np.inf, np.inf))
                record["tried"].append(tried | {"message": f"{failure}"[:500]})
                continue
            if team.index:
                continue  # the first process alone sees the outcomes, and chooses
            outcomes = [
                outcome.take(here) for outcome in whole for here in outcome.cells().values()
            ]
            error = float(np.mean([outcome.wrong().mean() for outcome in outcomes]))
            loss = float(np.mean([_cross_entropy(outcome) for outcome in outcomes]))
            record["tried"].append(tried | {"error": error, "cross_entropy": loss})
            scores.append(_score(record["tried"][-1]))
            # A candidate may take minutes: one that is measured is not measured again.
            save()
        best = min(range(len(scores)), key=lambda i: scores[i]) if scores else 0
        record["chosen"][name] = method.grid[team_lib.agreed(team, best)]
        save()
    return {name: dict(record["chosen"][name]) for name in methods}
