"""How long does the page of a large sweep take to build, to open and to filter?

``python -m experiments.report_bench --out=bench.json`` makes up a sweep of ``--trials`` trials,
builds its report, and opens it in a headless Chromium. Times of the browser are from the outside:
from the call until what it did is painted, the way to the browser and back included.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import pyarrow as pa
from absl import flags

from experiments import browser, launch, provenance, synthetic_sweep

REPEATS = 5


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall seconds of one call, to the millisecond."""
    start = time.perf_counter()
    call()
    return round(time.perf_counter() - start, 3)


def _processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def _build(folder: pathlib.Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "experiments.report", str(folder)]
    made = seconds_of(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    size = (folder / "report.html").stat().st_size
    return [
        {
            "what": "build the page, whole program",
            "seconds": made,
            "megabytes": round(size / 1e6, 2),
        }
    ]


def _typed(window: browser.Browser, text: str) -> None:
    window.evaluate("document.getElementById('q').focus()")
    window.type(text)
    window.settle()


def _set(window: browser.Browser, control: str, value: str) -> None:
    element = f"document.getElementById({json.dumps(control)})"
    window.evaluate(
        f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('change'))"
    )
    window.settle()


def _click(window: browser.Browser, selector: str) -> None:
    window.evaluate(f"document.querySelector({json.dumps(selector)}).click()")
    window.settle()


def _watch(window: browser.Browser, page: pathlib.Path) -> list[dict[str, Any]]:
    def opened(fragment: str) -> Callable[[], None]:
        def call() -> None:
            window.open(page, fragment)
            window.settle()

        return call

    def reset() -> None:
        _click(window, "#reset")

    acts: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "open": (lambda: None, opened("")),
        "open, filtered and sorted by the address": (
            lambda: None,
            opened("#q=fog&sort=error&method=rotation"),
        ),
        "type 'fog' into the search": (reset, lambda: _typed(window, "fog")),
        "choose a method": (reset, lambda: _set(window, "choice-method", "rotation")),
        "show validation rows": (reset, lambda: _set(window, "role", "validation")),
        "only settings chosen on validation": (reset, lambda: _click(window, "#chosen")),
        "sort by error": (reset, lambda: _click(window, "[data-sort=error]")),
    }
    rows = []
    for what, (before, act) in acts.items():
        times = []
        for _ in range(REPEATS):
            if before is reset:
                opened("")()
            times.append(seconds_of(act))
        field = "openMs" if what.startswith("open") else "showMs"
        inside = float(window.evaluate(f"document.documentElement.dataset.{field}"))
        rows.append({"what": what, "seconds": max(times), "in_page_ms": inside})
    if window.errors:
        raise browser.BrowserError(window.errors[0])
    return rows


def run(out: str, trials: int, seed: int) -> dict[str, Any]:
    """Times everything, and writes the record into a new file."""
    launch.new_file(out)
    settings = ml_collections.ConfigDict({"trials": trials, "seed": seed, "repeats": REPEATS})
    record = provenance.of(settings)
    record["device"] = f"{_processor()}, {os.cpu_count()} cores"
    record["versions"]["pyarrow"] = pa.__version__
    program = browser.find()
    if program is None:
        raise launch.UserError("no browser: install chromium to time the page.")
    shown = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split()
    record["versions"]["chromium"] = next((word for word in shown if word[0].isdigit()), None)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "sweep"
        made = synthetic_sweep.make(folder, trials, seed=seed)
        rows = _build(folder)
        with browser.Browser() as window:
            rows += _watch(window, folder / "report.html")
    record |= {"rows_of_sweep": len(made), "seconds_are": f"the longest of {REPEATS}"}
    record["rows"] = rows
    launch.write_json(out, record)
    return record


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    record = run(*(holder.value for holder in _FLAGS))
    for row in record["rows"]:
        print(f"{row['seconds']:7.3f} s  {row['what']}")


if __name__ == "__main__":
    _FLAGS = (
        flags.DEFINE_string("out", None, "The file to write.", required=True),
        flags.DEFINE_integer("trials", 10_000, "Of the sweep that is made up.", 10),
        flags.DEFINE_integer("seed", 0, "Of all that is random."),
    )
    launch.run(main)
