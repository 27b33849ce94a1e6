"""A checkpoint that a full disk stops: one error, no word of a thread, nothing left behind."""

import pathlib
import subprocess
import sys

SAVING = """
import os, resource, signal, sys
import numpy as np
from ttt_jax import checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
random = np.random.default_rng(0)
params = {f"leaf_{n}": random.normal(size=(40, 40)).astype(np.float32) for n in range(60)}
for attempt in range(3):
    try:
        checkpoint.save(f"{sys.argv[1]}/saved", params)
    except checkpoint.CheckpointError as error:
        print(error)
"""


def test_orbax_and_its_threads_are_quiet_and_leave_nothing(tmp_path):
    """In a process of its own, to its end: what is never asked for is said there."""
    ended = subprocess.run(
        [sys.executable, "-c", SAVING, str(tmp_path)],
        cwd=pathlib.Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    target = tmp_path / "saved"
    said = (
        f"Cannot save {target}, and nothing of it was kept: Orbax could not write {target}/params: "
        "File too large. Choose a folder that can be written and has room.\n"
    )
    assert ended.stdout == 3 * said
    assert list(tmp_path.iterdir()) == []
