"""Rows and pages for the tests of the report."""

import html.parser
import json
import pathlib
import random
import subprocess
import sys

from experiments import report
from experiments.reporting import tables

DOMAINS = [tables.CLEAN, *tables.CORRUPTIONS]
# method: (scope, steps, gain on corruptions, views)
METHODS = {
    "source": ("per_sample", 0, 0.0, 1),
    "augmented": ("per_sample", 0, 0.04, 32),
    "rotation": ("per_sample", 4, 0.08, 8),
    "memo": ("per_sample", 1, 0.07, 32),
    "rotation_memo": ("per_sample", 4, 0.12, 32),
    "rotation_online": ("stream", 1, 0.15, 8),
}


def make_row(method, domain, seed, error, **changes):
    scope, steps, _, views = METHODS.get(method, ("per_sample", 0, 0.0, 1))
    row = {
        "method": method,
        "dataset": "digits",
        "domain": domain,
        "severity": 0 if domain == tables.CLEAN else 5,
        "seed": seed,
        "error": error,
        "num_examples": 400,
        "num_steps": steps,
        "scope": scope,
        "split_role": "reported",
        "reset": "never" if scope == "stream" else "every(1)",
        "predict": "after",
        "seconds": 2.0 + steps,
        "samples_per_second": 400 / (0.1 + views * (1 + 2 * steps) / 50),
        "checkpoint": f"fingerprint-{seed}",
        "status": "ok",
    }
    return {**row, **changes}


def make_results(seeds=(0, 1, 2), domains=DOMAINS, methods=METHODS, optional=True):
    """Rows whose errors are whole images, with the optional fields consistent with them."""
    generator = random.Random(7)
    out = []
    for seed in seeds:
        for place, domain in enumerate(domains):
            base = 12 if domain == tables.CLEAN else 60 + 17 * (place * 5 % 11)
            base += generator.randrange(9)
            for method in methods:
                scope, steps, gain, views = METHODS[method]
                clean = domain == tables.CLEAN
                less = generator.randrange(2) - 1 if clean else round(400 * gain * base / 160)
                wrong = 0 if method == "source" else 1 + generator.randrange(4)
                less = 0 if method == "source" else less - (generator.randrange(8) if place else 0)
                right = max(less + wrong, 0)
                count = base - (right - wrong)
                row = make_row(method, domain, seed, count / 400)
                if optional:
                    row["forwards_per_sample"] = views * max(steps, 1) + (steps > 0)
                    row["backwards_per_sample"] = views * steps
                    if method != "source":
                        row["turned_right"], row["turned_wrong"] = right / 400, wrong / 400
                    if steps:
                        fall = [base - (base - count) * k / steps for k in range(steps + 1)]
                        row["error_by_step"] = [one / 400 for one in fall]
                        row["aux_loss_before"] = 0.5 + 0.02 * place
                        row["aux_loss_after"] = 0.3 + 0.02 * place
                        row["non_finite"] = 0
                    if scope == "stream":
                        row["resets"] = 0
                out.append(row)
        for domain in tables.VALIDATION:
            for method in methods:
                error = (90 - 100 * METHODS[method][2] + generator.randrange(6)) / 400
                out.append(make_row(method, domain, seed, error, split_role="validation"))
    return out


SELECTION = {
    "note": "Grid search at severity 5, seed 0.",
    "chosen": {"rotation": {"learning_rate": 0.003, "num_steps": 4}, "memo": {"num_views": 32}},
    "tried": [
        {"method": "rotation", "params": {"learning_rate": 0.01, "num_steps": 4}, "error": 0.24},
        {"method": "rotation", "params": {"learning_rate": 0.003, "num_steps": 4}, "error": 0.21},
        {"method": "memo", "params": {"num_views": 32}, "error": 0.22},
    ],
}
RUN = {
    "command": ["python", "-m", "experiments.adapt", "--workdir=runs/demo"],
    "device": "cpu",
    "device_count": 1,
    "versions": {"jax": "0.10.2", "python": "3.11.9"},
    "commit": "0123abcd",
    "started": "2024-05-01T10:00:00Z",
}


def put(folder: pathlib.Path, records, tail=""):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "results.jsonl").write_text(lines + tail)
    return folder


class Page(html.parser.HTMLParser):
    """Checks nesting, and collects the cells of every table and all text."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.words, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" in self.open or "script" in self.open:
            return
        self.words.append(data)
        if self.open and {"td", "th"} & set(self.open):
            # "12.3" and its "±0.4" stand in one cell, apart.
            self.tables[-1][-1][-1] += (" " if self.open[-1] == "small" else "") + data

    @property
    def text(self):
        return " ".join(self.words)

    def table(self, place):
        return {cells[0]: cells[1:] for cells in self.tables[place]}


def page_of(folder):
    return Page(report.write(folder).path.read_text())


def run_program(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.report", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(report.__file__).parent.parent,
    )
