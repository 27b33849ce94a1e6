"""Folders of sweeps that never ran, as the report reads them."""

import json

from experiments.sweeping import collect, progress, state as state_lib
from experiments.sweeping.unit import Unit


def row(method, domain, seed, error, **changes):
    """One row of a trial; ``rate`` and ``steps`` are settings."""
    rate, steps = changes.pop("rate", None), changes.pop("steps", 0)
    settings = {} if rate is None else {"learning_rate": rate, "num_steps": steps}
    made = {
        "method": method,
        "dataset": "digits",
        "domain": domain,
        "severity": 5,
        "seed": seed,
        "split_role": "reported",
        "checkpoint": f"model-{seed}",
        "sequence": "none",
        "status": "ok",
        "error": error,
        "num_examples": 100,
        "num_steps": steps,
        "scope": "per_sample",
        "seconds": 2.0,
        "forwards_per_sample": 1 + steps,
        "backwards_per_sample": steps,
        "settings": settings,
    }
    return {**made, **changes}


def put(folder, trials, *, states=None, table=True, plan=True):
    """Writes a sweep.

    Args:
      folder: its folder.
      trials: ``{label: rows}``; the trial of the n-th label has the id ``t`` and n.
      states: ``{label: State}``, where it is not done.
      table: whether the rows are collected.
      plan: whether the plan is written.

    Returns:
      The folder.
    """
    units = [Unit("trial", f"t{number}", "", None, label) for number, label in enumerate(trials)]
    for unit, rows in zip(units, trials.values(), strict=True):
        place = unit.folder(folder)
        state_lib.write(place, (states or {}).get(unit.label, state_lib.State("done")))
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (place / "results.jsonl").write_text(text)
    if plan:
        progress.save(folder, units)
    if table:
        collect.write(folder, collect.rows(folder, units))
    return folder


def failed(message):
    """The state of a trial that failed for good."""
    return state_lib.State("failed", failures=2, message=message)
