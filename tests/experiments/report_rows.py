"""Rows, run folders and sweeps for the tests of the report."""

import base64
import gzip
import json
import re

import numpy as np

from experiments.report.table import CORRUPTIONS
from experiments.sweeping import collect, progress, state as state_lib
from experiments.sweeping.unit import Unit

METHODS = {  # name: (scope, steps, wrong images of 100 on corruption k, seed s)
    "source": ("per_sample", 0, lambda k, s: 40 + 2 * k + s),
    "augmented": ("per_sample", 0, lambda k, s: 36 + 2 * k + s),
    "rotation": ("per_sample", 4, lambda k, s: 38 + 2 * k - s),
    "rotation_online": ("stream", 1, lambda k, s: 30 + 2 * k + 3 * s),
}


def row(method, domain, seed, error, **changes):
    scope, steps, _ = METHODS.get(method, ("per_sample", 0, None))
    made = {
        "method": method,
        "dataset": "digits",
        "domain": domain,
        "severity": 0 if domain == "clean" else 5,
        "seed": seed,
        "split_role": "reported",
        "status": "ok",
        "error": error,
        "num_examples": 100,
        "num_steps": steps,
        "scope": scope,
        "checkpoint": f"model-{seed}",
        "seconds": 2.0,
        "forwards_per_sample": 1 + steps,
        "backwards_per_sample": steps,
        "settings": {"learning_rate": 0.01} if steps else {},
    }
    return made | changes


VALIDATION = {"source": 0.3, "augmented": 0.28, "rotation": 0.29, "rotation_online": 0.31}


def table(seeds=(0, 1, 2), domains=CORRUPTIONS):
    """Every method on clean and on corruptions; the means can be worked out by hand."""
    made = []
    for seed in seeds:
        for method, (_, steps, wrong) in METHODS.items():
            made.append(row(method, "clean", seed, 0.05))
            for k, domain in enumerate(domains):
                more = {"turned_right": 0.04, "turned_wrong": 0.01}
                if steps:
                    more |= {"error_by_step": [0.5, 0.4], "aux_loss_before": 0.8}
                    more |= {"aux_loss_after": 0.6}
                made.append(row(method, domain, seed, wrong(k, seed) / 100, **more))
    held = {"split_role": "validation", "severity": 3}
    made += [row(m, "spatter", s, e, **held) for s in seeds for m, e in VALIDATION.items()]
    return made


def put_run(folder, rows, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (folder / "results.jsonl").write_text(text + tail)
    return folder


def put_instances(folder, rows):
    """Sums per instance that agree with the errors of the rows, one file per method."""
    (folder / "instances").mkdir()
    parts = {}
    for one in rows:
        parts.setdefault((one["method"], one["seed"], one["split_role"]), []).append(one)
    for (method, seed, role), held in parts.items():
        count = held[0]["num_examples"]
        wrong = [np.arange(count) < round(one["error"] * count) for one in held]
        np.savez(
            folder / "instances" / f"{method}-{seed}-{role}.npz",
            id=np.tile(np.arange(count), len(held)),
            sums=np.concatenate(wrong)[:, None].astype(float),
            metrics=np.array(["error"]),
            method=method,
            stream="all",
            seed=seed,
            role=role,
            domain=np.repeat([one["domain"] for one in held], count),
            severity=np.repeat([one["severity"] for one in held], count),
        )


def put_sweep(folder, trials, *, states=None, collected=True):
    """Writes a sweep; ``trials`` is ``{label: rows}``, the n-th trial has the id ``t<n>``."""
    units = [Unit("trial", f"t{n}", "", None, label) for n, label in enumerate(trials)]
    for unit, rows in zip(units, trials.values(), strict=True):
        place = unit.folder(folder)
        state_lib.write(place, (states or {}).get(unit.label, state_lib.State("done")))
        put_run(place, rows)
        (place / "log.txt").write_text("log\n")
    progress.save(folder, units)
    if collected:
        collect.write(folder, collect.rows(folder, units))
    return folder


def failed(message):
    """The state of a trial that failed for good."""
    return state_lib.State("failed", failures=2, message=message)


def grid(trials=40):
    """Trials of a sweep over learning rates and steps, with validation rows."""
    made = {"seeds=0 methods=source": [row("source", "fog", 0, 0.5), row("source", "snow", 0, 0.4)]}
    for n in range(trials):
        rate, steps = 10.0 ** -(1 + n % 4), 1 + n % 3
        settings = {"learning_rate": rate, "num_steps": steps}
        error = 0.3 + 0.02 * (n % 4)
        made[f"seeds=0 rate={rate} number={n}"] = [
            row("rotation", name, 0, error, settings=settings, num_steps=steps)
            for name in ("fog", "snow")
        ]
        held = {"split_role": "validation", "settings": settings, "num_steps": steps}
        made[f"seeds=0 rate={rate} number={n}"].append(row("rotation", "spatter", 0, error, **held))
    return made


def payload(text):
    """The data of a page, as its script unpacks them."""
    (packed,) = re.findall(r'id="data">(.*?)</script>', text)
    return json.loads(gzip.decompress(base64.b64decode(packed)))
