"""The folder of a sweep that never ran: made-up rows, to test and time what reads one."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.reporting.tables import CORRUPTIONS, VALIDATION
from experiments.sweeping import collect, progress, state as state_lib
from experiments.sweeping.unit import Unit

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
STEPS = (1, 2, 4, 8, 16)
SEEDS = 3
EXAMPLES = 1000
MESSAGES = (
    "RESOURCE_EXHAUSTED: out of memory while trying to allocate {number} bytes",
    "took longer than 60 minutes and was ended after {number} s",
    "1 rows failed; rotation on fog: step {number} is not finite",
)


class _Method(NamedTuple):
    """How a made-up method behaves: where its best step size is, and how much it gains there."""

    best_rate: float
    gain: float
    views: int
    scope: str


METHODS = {
    "rotation": _Method(0.01, 0.12, 32, "per_sample"),
    "memo": _Method(0.003, 0.08, 64, "per_sample"),
    "mae": _Method(0.03, 0.15, 8, "per_sample"),
    "rotation_online": _Method(0.003, 0.2, 32, "stream"),
    "tent": _Method(0.001, 0.06, 1, "batch"),
}
DOMAINS = (*CORRUPTIONS, *VALIDATION)


def _row(generator: np.random.Generator, method: str, domain: str, seed: int) -> dict[str, Any]:
    hard = 0.25 + 0.5 * ((DOMAINS.index(domain) * 7) % 19) / 19
    return {
        "method": method,
        "dataset": "synthetic",
        "domain": domain,
        "severity": 5,
        "seed": seed,
        "split_role": "validation" if domain in VALIDATION else "reported",
        "checkpoint": f"model-{seed}",
        "sequence": "none",
        "status": "ok",
        "error": round(EXAMPLES * (hard + 0.01 * seed)) / EXAMPLES,
        "num_examples": EXAMPLES,
        "num_steps": 0,
        "scope": "per_sample",
        "seconds": float(generator.uniform(1.0, 1.1)),
        "forwards_per_sample": 1,
        "backwards_per_sample": 0,
        "settings": {},
    }


def _adapted(
    generator: np.random.Generator, row: dict[str, Any], rate: float, steps: int
) -> dict[str, Any]:
    method = METHODS[row["method"]]
    # A parabola in the logarithm of rate times steps: too little does nothing, too much harms.
    off = np.log10(rate * np.sqrt(steps) / method.best_rate) - 0.3
    gain = method.gain * (1 - 0.8 * off**2) + generator.normal(0, 0.01)
    error = float(np.clip(row["error"] * (1 - gain), 0, 0.9))
    passes = method.views * steps
    return row | {
        "error": round(EXAMPLES * error) / EXAMPLES,
        "num_steps": steps,
        "scope": method.scope,
        "seconds": row["seconds"] * (1 + 3 * passes) / 20,
        "forwards_per_sample": passes + 1,
        "backwards_per_sample": passes,
        "settings": {"learning_rate": rate, "num_steps": steps, "select": "all"},
    }


def make(
    workdir: pathlib.Path, trials: int, *, seed: int = 0, most_rows: int = 5, failed: float = 0.01
) -> list[dict[str, Any]]:
    """Writes the plan, the states and ``results.parquet`` of a sweep.

    The first trials are those of ``source``, one per seed; the others have one method and up to
    ``most_rows`` domains each.

    Args:
      workdir: the folder, which is made.
      trials: how many.
      seed: of all that is random.
      most_rows: of one trial.
      failed: the share of trials that failed.

    Returns:
      The rows, as they are in the table.
    """
    generator = np.random.default_rng(seed)
    names = list(METHODS)
    rows, units = [], []
    for number in range(trials):
        of_seed, unit = number % SEEDS, f"{number:012x}"
        state, message = "done", ""
        if number < SEEDS:
            label = f"seeds={of_seed} methods=source"
            own = [_row(generator, "source", domain, of_seed) for domain in DOMAINS]
        else:
            name = names[int(generator.integers(len(names)))]
            rate, steps = float(generator.choice(RATES)), int(generator.choice(STEPS))
            some = generator.choice(DOMAINS, int(generator.integers(1, most_rows + 1)), False)
            label = (
                f"seeds={of_seed} methods.{name}.learning_rate={rate} "
                f"methods.{name}.num_steps={steps} methods={name} domains={','.join(some)}"
            )
            own = [
                _adapted(generator, _row(generator, name, str(domain), of_seed), rate, steps)
                for domain in some
            ]
            if generator.random() < failed:
                form = MESSAGES[int(generator.integers(len(MESSAGES)))]
                message = form.format(number=int(generator.integers(10**6)))
                state, own = "failed", [{"status": "failed", "message": message}]
        units.append(Unit("trial", unit, f"digest-{number}", None, label))
        folder = units[-1].folder(workdir)
        folder.mkdir(parents=True)
        text = json.dumps(state_lib.State(state, message=message)._asdict())
        (folder / "state.json").write_text(text + "\n")
        rows += [{"trial": unit, "label": label, **row} for row in own]
    progress.save(workdir, units)
    collect.write(workdir, rows)
    return rows
