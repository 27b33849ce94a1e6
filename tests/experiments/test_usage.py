"""``--help`` of every program, and a program that is started without what it needs."""

import pytest

from experiments import config_keys
from tests.experiments import called as called_lib

ROOT = called_lib.ROOT
# With a config, and without one.
CONFIGURED = ("train", "adapt", "sweep", "diagnose", "feature_shift")
OTHERS = {
    "experiments.report": "--figures",
    "experiments.prepare.pacs": "--held_out",
    "experiments.prepare.shuffle": "--title",
    "experiments.prepare.demo": "",
    "experiments.trial": "--overrides",
    "benchmarks.kernels": "--out",
    "benchmarks.sweep": "--out",
    "benchmarks.vision": "--ways",
}
# Of ml_collections, which loads a config file so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def called(monkeypatch, capsys):
    """Runs a program here, with flags of its own; returns status, output and errors."""

    def run(module, *arguments):
        status = called_lib.program(monkeypatch, module, *arguments)
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", CONFIGURED)
def test_help_has_flags_and_every_key_with_its_meaning(called, name):
    status, out, err = called(f"experiments.{name}", "--help")
    assert (status, err) == (0, "")
    assert f"python -m experiments.{name}" in out and "--workdir: " in out and "--config: " in out
    said = " ".join(out.split())
    keys = {**config_keys.COMMON, **config_keys.IMAGES, **config_keys.MODEL}
    keys |= {f"methods.LABEL.{name}": key for name, key in config_keys.METHOD.items()}
    assert [name for name, key in keys.items() if f" {name}: {key.meaning};" not in said] == []
    assert max(map(len, out.splitlines())) <= 100 and str(ROOT) not in out


@pytest.mark.parametrize("module", OTHERS)
def test_help_of_programs_without_a_config(called, module):
    status, out, err = called(module, "--help")
    assert (status, err) == (0, "")
    assert OTHERS[module] in out
    assert ("Keys of the config" in out) == ("--config:" in out)


def test_help_follows_the_task_of_the_config(called):
    path = ROOT / "experiments" / "configs" / "series.py"
    status, out, _ = called("experiments.train", f"--config={path}", "--help")
    assert status == 0 and "data.periods" in out and "views.flip" not in out


@pytest.mark.parametrize("name", [*CONFIGURED, "report", "prepare.pacs", "prepare.shuffle"])
def test_a_program_without_arguments_is_one_sentence(called, name):
    status, out, err = called(f"experiments.{name}")
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert "needed" in err or "give exactly one results folder" in err


@pytest.mark.parametrize("name", ["train", "prepare.shuffle"])
def test_an_argument_that_is_no_flag_is_one_sentence(called, name):
    required = {"train": ["--workdir=w"], "prepare.shuffle": ["--source=s", "--target=t"]}[name]
    status, _, err = called(f"experiments.{name}", "here", *required)
    assert (status, err) == (2, "error: unexpected argument 'here'; flags begin with --.\n")
