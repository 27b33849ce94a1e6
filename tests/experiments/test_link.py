"""The link between processes: what goes through it, in which order, and how it ends."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from experiments import link
from tests.experiments.test_distributed import free_port
from tests.experiments.test_programs import ROOT


@pytest.fixture
def pair():
    """Two links that have met."""
    port, made = free_port(), []
    for index in range(2):
        values = {
            "coordinator_address": f"localhost:{port}",
            "num_processes": 2,
            "process_id": index,
        }
        made.append(
            subprocess.Popen(
                [sys.executable, "-m", "experiments.link", json.dumps(values)],
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        )
    try:
        for index, process in enumerate(made):
            told = json.loads(link.read(process.stdout).data)
            assert (told["index"], told["count"]) == (index, 2)
        yield made
    finally:
        for process in made:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def tell(process, kind, data=b""):
    link.write(process.stdin, link.Frame(kind, data))


def test_the_first_is_told_everything_and_all_are_told_its_word(pair):
    first, second = pair
    # None at all, few bytes, and more than go in one piece; the second runs ahead.
    sent = [(b"", b""), (b"a", b"bcd"), (b"", os.urandom(link._PIECE + 3))]
    for _, data in sent:
        tell(second, link.COLLECT, data)
    tell(second, link.BROADCAST, b"its word does not count")
    for data, _ in sent:
        tell(first, link.COLLECT, data)
    tell(first, link.BROADCAST, b"this one does")
    for both in sent:
        assert [link.read(first.stdout) for _ in both] == [
            link.Frame(link.COLLECT, data) for data in both
        ]
    for process in pair:
        assert link.read(process.stdout) == link.Frame(link.BROADCAST, b"this one does")
    for process in pair:
        tell(process, link.DONE)
    assert [process.wait() for process in pair] == [0, 0]
    assert [process.stdout.read() for process in pair] == [b"", b""]


def test_an_error_overtakes_what_was_said_before(pair):
    first, second = pair
    tell(second, link.COLLECT, b"an outcome that nobody collects")
    tell(second, link.FAIL, b"2 the disk is full")
    assert link.read(first.stdout) == link.Frame(link.FAIL, b"2 process 1: the disk is full")
    assert [process.wait() for process in pair] == [0, 0]


def test_it_ends_with_what_started_it_and_so_does_its_peer(pair):
    first, second = pair
    first.stdin.close()
    assert first.wait() == 0
    assert second.wait() != 0
    assert link.read(second.stdout) is None
