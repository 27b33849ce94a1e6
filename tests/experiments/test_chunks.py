"""Chunks chosen from memory: programs fit, and rows are those of any chunk."""

import json
import types

import pytest

from experiments import adapt, chunks, train
from tests.experiments import tiny_config


class Program:
    """Stands for a compiled program that needs so many bytes."""

    def __init__(self, size):
        self.size = size

    def memory_analysis(self):
        return self

    temp_size_in_bytes = property(lambda self: 1000 * self.size)
    argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 0


def test_zero_asks_for_what_fits(monkeypatch):
    monkeypatch.setattr(chunks, "free_bytes", lambda: 50_000)
    assert chunks.compiled(Program, 7, most=500).size == 7
    assert chunks.compiled(Program, 0, most=500).size == 50
    assert chunks.compiled(Program, 0, most=20).size == 20
    # Two chunks of 30 rather than 50 and 10 that are padded to 50.
    assert chunks.compiled(Program, 0, most=60).size == 30
    monkeypatch.setattr(chunks, "free_bytes", lambda: 500)
    with pytest.raises(ValueError, match="One instance needs"):
        chunks.compiled(Program, 0, most=20)


def test_a_cpu_shares_the_memory_of_the_machine(monkeypatch):
    monkeypatch.setattr(chunks.psutil, "virtual_memory", lambda: type("M", (), {"available": 8e9}))
    monkeypatch.setattr(chunks.jax, "local_device_count", lambda: 2)
    assert chunks.free_bytes() == pytest.approx(0.9 * 8e9 / 2)


def test_rows_are_those_of_any_chunk(tmp_path, monkeypatch):
    config = tiny_config.get_config()
    train.run(config, str(tmp_path / "model"))
    checkpoint = str(tmp_path / "model" / "checkpoints" / "seed_0")

    def rows(folder, chunk_size):
        config.adapt.chunk_size = chunk_size
        part = adapt.Part(methods=("rotation",), domains=("fog",))
        assert adapt.run(config, str(tmp_path / folder), checkpoint_path=checkpoint, part=part) == 0
        lines = (tmp_path / folder / "results.jsonl").read_text().splitlines()
        return [(r["domain"], r["error"], r["turned_right"]) for r in map(json.loads, lines)]

    seen = []

    def three(compile_for, limit, *, most):
        seen.append(most)
        return types.SimpleNamespace(size=3, compiled=compile_for(3))

    monkeypatch.setattr(chunks.ttt.budget, "largest_chunk", three)
    assert rows("fitting", 0) == rows("two", 2)
    assert seen and 3 < max(seen) <= config.adapt.batch_size
