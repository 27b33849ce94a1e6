"""Runs a program as a person does, in this process."""

import pathlib
import runpy
import sys

import pytest

# Its import closes the handlers of all logs, among them one that holds what a test captures.
import submitit  # noqa: F401
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).resolve().parents[2]


def program(monkeypatch, module, *arguments):
    """The exit status of a program, which has flags of its own.

    Args:
      monkeypatch: of the test.
      module: its dotted name.
      *arguments: of its command line.
    """
    place = ROOT / module.replace(".", "/")
    file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    return ended.value.code or 0
