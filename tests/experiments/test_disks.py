"""Disks that are full or read-only: one sentence, exit status 2, nothing lost or half-written.

What needs a file system of its own is in ``test_sweep_disk.py``.
"""

import builtins
import contextlib
import errno
import io
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from experiments import launch, writers
from tests.experiments import called
from ttt_jax.checkpoint import arrays

pytestmark = [
    pytest.mark.usefixtures("dense"),
    # Of ml_collections, which loads a config file so.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
CONFIG = f"--config={called.ROOT / 'tests' / 'experiments' / 'dense_config.py'}"
INTACT = (
    "What was written before is intact; free space or choose another --workdir, then run the same "
    "command again.\n"
)


@contextlib.contextmanager
def no_space():
    """No file grows: what a full disk is to a program, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@contextlib.contextmanager
def read_only():
    """No file is written or removed; a real one needs a file system of its own."""

    def refusing(real, writes):
        def call(path, *arguments, **named):
            if writes(*arguments, **named) and "pytest" in str(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real(path, *arguments, **named)

        return call

    def of_mode(mode="r", *_, **__):
        return not {*mode}.isdisjoint("wax+")

    with pytest.MonkeyPatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", refusing(io.open, of_mode))
        patch.setattr(os, "open", refusing(os.open, lambda flags, *_, **__: flags & os.O_WRONLY))
        for name in ("mkdir", "replace"):
            patch.setattr(os, name, refusing(getattr(os, name), lambda *_, **__: True))
        yield "Read-only file system"


def packed_set(path):
    arrays = {"header": np.zeros(3, np.uint8), "data": np.arange(9, dtype=np.uint8)}
    np.savez(path, **arrays, offsets=np.array([0, 3, 6, 9]), labels=np.arange(3))


def pacs_sets(folder):
    for domain in ("photo", "art_painting", "cartoon", "sketch"):
        arrays = {"images": np.zeros((4, 2, 2, 3), np.uint8), "labels": np.arange(4) % 2}
        np.savez(folder / f"{domain}_32.npz", **arrays, class_names=np.array(["a", "b"]))


def command(name, folder):
    """The arguments of a program, and the folder that it writes."""
    work = folder / "run"
    if name == "prepare.shuffle":
        packed_set(folder / "packed.npz")
        return [f"--source={folder / 'packed.npz'}", f"--target={work / 'set.npz'}"], work
    if name == "prepare.pacs":
        pacs_sets(folder)
        return [f"--source={folder}/{{domain}}_32.npz", f"--target={work}"], work
    more = {
        "report": [],
        "diagnose": [CONFIG, "--severities=1", "--corruptions=fog", "--num_images=3"],
        "feature_shift": [CONFIG, "--domains=fog"],
    }
    return [*more.get(name, [CONFIG]), f"--workdir={work}"], work


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("broken", [no_space, read_only])
@pytest.mark.parametrize(
    "name",
    "train adapt sweep report diagnose feature_shift prepare.shuffle prepare.pacs".split(),
)
def test_every_program_says_it_in_one_sentence(
    name, broken, dense_folder, tmp_path, monkeypatch, capsys
):
    arguments, work = command(name, tmp_path)
    if not name.startswith("prepare"):
        shutil.copytree(dense_folder, work)
        row = '{"method": "source", "dataset": "d", "domain": "fog", "severity": 5, "seed": 0, '
        row += '"split_role": "reported", "status": "ok", "error": 0.5, "num_examples": 3}\n'
        (work / "results.jsonl").write_text(row)
    before = contents(work)
    with broken() as said:
        status = called.program(monkeypatch, f"experiments.{name}", *arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: cannot write")
    assert said in err and err.endswith(INTACT)
    assert contents(work) == before
    if name in ("report", "prepare.shuffle", "prepare.pacs"):
        assert called.program(monkeypatch, f"experiments.{name}", *arguments) == 0
        assert contents(work).keys() > before.keys()


def test_a_training_whose_state_cannot_be_saved(tmp_path, monkeypatch, capsys):
    """What Orbax cannot write ends as what a program of ours cannot, and the training goes on."""
    arguments = [CONFIG, f"--workdir={tmp_path}", "--config.train.num_steps=6"]
    write = arrays.write

    def full(root, leaves):
        with no_space():
            write(root, leaves)

    monkeypatch.setattr(arrays, "write", full)
    assert called.program(monkeypatch, "experiments.train", *arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.endswith(INTACT)
    assert err.startswith(f"error: Cannot save {tmp_path}/training/seed_0/step_5, and nothing of ")
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
    monkeypatch.setattr(arrays, "write", write)
    assert called.program(monkeypatch, "experiments.train", *arguments) == 0


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path):
    with writers.open_writer(tmp_path) as writer:
        writer.scalars(1, {"loss": 0.5}, 0)
        before = contents(tmp_path)
        with no_space(), pytest.raises(launch.UserError, match=r"cannot write .*metrics\.jsonl"):
            writer.scalars(2, {"loss": 0.5}, 0)
        assert contents(tmp_path) == before


def test_an_output_that_cannot_be_written_is_one_sentence():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "experiments.prepare.shuffle", "--help"],
            cwd=called.ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: [Errno 28] No space left on device.")
    assert len(ended.stderr.splitlines()) == 1


def test_figures_are_whole_or_not_there(tmp_path):
    target = tmp_path / "chart.png"
    with pytest.raises(launch.WriteError), launch.replacing(target) as draft:
        pathlib.Path(draft).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
