"""What every program shares: seeds, choices, files that are there."""

import os
import subprocess
import sys

import pytest

from experiments import config_check, launch
from tests.experiments import called, tiny_config


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,), (0.5,)])
def test_impossible_seeds(seeds):
    config = tiny_config.get_config()
    config.seeds = seeds
    with pytest.raises(launch.UserError, match="at least one integer from 0 on, each once; got"):
        config_check.check(config)


def test_choices_are_some_and_each_once():
    assert launch.chosen("way", ["a", "b"], "abc") == ("a", "b")
    with pytest.raises(launch.UserError, match="way 'a' is there twice; name each once"):
        launch.chosen("way", ["a", "b", "a"], "abc")
    with pytest.raises(launch.UserError, match="unknown way ''; choose from a, b, c"):
        launch.chosen("way", [], "abc")


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    path = launch.new_file(tmp_path / "new" / "out.json")
    path.write_text("measured")
    with pytest.raises(launch.UserError, match=r"out\.json exists and is not replaced"):
        launch.new_file(path)


def ended(program, **options):
    """How a process of ``launch.run`` over the body of a ``main`` ends."""
    lines = ["import os, signal, sys", "from experiments import launch"]
    # As in a terminal: some runners have it ignored.
    lines += ["signal.signal(signal.SIGINT, signal.default_int_handler)", "def main(argv):"]
    code = "\n".join([*lines, *(f"    {line}" for line in program), "launch.run(main)"])
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **options
    )


def test_an_interrupt_is_one_line_and_no_traceback_of_a_thread():
    waiting = "import threading; threading.Thread(target=signal.pause).start()"
    process = ended([waiting, "os.kill(os.getpid(), signal.SIGINT)", "signal.pause()"])
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == (
        "error: interrupted; what is finished is kept. Run the same command again to go on.\n"
    )


@pytest.mark.parametrize("name", ["train", "sweep", "report"])
def test_an_interrupt_while_a_program_is_imported_is_one_line(tmp_path, name):
    for module in ("jax", "pandas"):
        text = "import os, signal; os.kill(os.getpid(), signal.SIGINT); signal.pause()"
        (tmp_path / f"{module}.py").write_text(text)
    command = [sys.executable, "-m", f"experiments.{name}", f"--workdir={tmp_path}"]
    # As in a terminal: some runners have it ignored. Without a fork beside jax's threads.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    ended = subprocess.run(
        [sys.executable, "-c", f"{heard}; os.execv(sys.argv[1], sys.argv[1:])", *command],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=called.ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 130
    assert ended.stderr.startswith("error: interrupted; ") and len(ended.stderr.splitlines()) == 1


def test_an_error_is_the_last_word_whatever_a_library_does_at_the_end():
    failing = "import atexit; atexit.register(lambda: 1 / 0)"
    process = ended([failing, "raise launch.UserError('no such thing.')"])
    _, err = process.communicate()
    assert (process.returncode, err) == (2, "error: no such thing.\n")


def test_an_output_that_nobody_reads_ends_the_program_quietly():
    with ended(["print('x' * 100)"], stdout=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 2
