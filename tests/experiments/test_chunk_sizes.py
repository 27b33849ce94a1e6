"""How many instances are in flight: chosen by trying, noted in ``run.json``, and used again."""

import json

import pytest

from experiments import adapt, config_check, provenance, seed_run, units
from tests.experiments import tiny_config
from ttt_jax import _chunks

pytestmark = pytest.mark.usefixtures("dense")
PART = adapt.Part(domains=("fog",))


def config_with(chunk_size):
    config = tiny_config.with_methods(
        tiny_config.get_config(), source={}, augmented={"num_views": 2}
    )
    config.model = {"name": "dense"}
    with config.ignore_type():
        config.adapt.chunk_size = chunk_size
    return config


@pytest.fixture
def asked(monkeypatch):
    """The measurements that were made, with what they say: chunks of 3 are fastest."""
    made = []

    def seconds_by_size(run_of, fixed, data, **options):
        made.append(options)
        return {3: 0.1, 10: 0.2}

    monkeypatch.setattr(_chunks, "seconds_by_size", seconds_by_size)
    return made


def noted_in(folder):
    return json.loads((folder / "run.json").read_text()).get("chunk_sizes")


def test_a_run_notes_its_sizes_and_a_resumed_one_measures_no_more(asked, tmp_path, monkeypatch):
    config = config_with("fastest")
    tiny_config.save_initial(config, tmp_path)
    seen = []
    add = adapt.journal.Journal.add

    def noting(self, *rows):
        seen.append(noted_in(tmp_path))
        add(self, *rows)

    monkeypatch.setattr(adapt.journal.Journal, "add", noting)
    adapt.run(config, str(tmp_path), devices=1, part=adapt.Part(domains=("contrast",)))
    count = len(asked)
    assert 1 <= count <= 2 and len(noted_in(tmp_path)) == count
    assert all("'augmented'" in name for name in seen[-1] if "source" not in name)
    assert set(next(iter(noted_in(tmp_path).values()))) == {"3", "10"}
    # The first rows were written once their size was there.
    assert seen[0]
    monkeypatch.setattr(units, "_PROGRAMS", {})
    adapt.run(config, str(tmp_path), devices=1, part=PART)
    assert len(asked) == count


@pytest.mark.parametrize("size", [7, 0])
def test_a_number_of_the_user_wins(asked, tmp_path, size):
    config = config_with(size)
    tiny_config.save_initial(config, tmp_path)
    adapt.run(config, str(tmp_path), devices=1, part=PART)
    assert not asked and noted_in(tmp_path) is None


def test_without_a_value_an_accelerator_tries_and_a_cpu_takes_the_batch(monkeypatch):
    config = config_with(None)
    config_check.check(config)
    del config.adapt.chunk_size
    config_check.check(config)
    for backend, expected in (("cpu", None), ("gpu", "fastest"), ("tpu", "fastest")):
        monkeypatch.setattr(seed_run.jax, "default_backend", lambda name=backend: name)
        assert seed_run._chunk_size(config) == expected


def test_another_word_is_refused():
    with pytest.raises(config_check.ConfigError, match="or 'fastest' or None; got 'fast'"):
        config_check.check(config_with("fast"))


def test_the_first_of_two_processes_decides(tmp_path):
    (tmp_path / "run.json").write_text('{"command": "x"}')
    first, second = provenance.ChunkSizes(tmp_path), provenance.ChunkSizes(tmp_path)
    assert "memo" not in first and "memo" not in second
    assert first.setdefault("memo", {4: 0.1}) == {4: 0.1}
    assert second.setdefault("memo", {8: 0.1}) == {4: 0.1}
    third = provenance.ChunkSizes(tmp_path)
    assert "memo" in third and third["memo"] == {4: 0.1}
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "x"
