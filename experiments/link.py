"""The link of one process of a run to the others, in a process of its own.

JAX aborts a process whose peer has died, and nothing can catch that. So what talks to the peers is
this small program, on the CPU, and not the one that adapts: :mod:`experiments.team` starts it,
tells it what to exchange through a pipe, and notices when it ends. ``jax.distributed`` finds the
peers, under Slurm by itself, and watches over them.
"""

import contextlib
import json
import os
import queue
import signal
import struct
import sys
import threading
import time
import traceback
from typing import BinaryIO, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

# What a frame is: to be collected by the first process, its word to all, an end in order, an end
# because of an error (whose text has the exit code before it).
COLLECT, BROADCAST, DONE, FAIL = b"CBDF"
_IDLE = 0
_HEAD = struct.Struct("<BQ")
# Peers tell each other that often how far they are; a dead one is noticed then, or, where its whole
# machine is gone, by the heartbeats of jax.distributed.
_ROUND_S = 0.1
_PIECE = 1 << 24


class Frame(NamedTuple):
    """What goes through the pipes, in both directions."""

    kind: int
    data: bytes = b""


def write(file: BinaryIO, frame: Frame) -> None:
    """Writes a frame."""
    file.write(_HEAD.pack(frame.kind, len(frame.data)))
    file.write(frame.data)
    file.flush()


def read(file: BinaryIO) -> Frame | None:
    """Reads a frame; None at the end of the file."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, size = _HEAD.unpack(head)
    data = file.read(size)
    return Frame(kind, data) if len(data) == size else None


def _gathered(data: bytes, sizes: np.ndarray, keep: bool) -> list[bytes]:
    """The data of all processes, which differ in size; nothing where they are not to be kept."""
    parts: list[list[bytes]] = [[] for _ in sizes]
    for first in range(0, int(sizes.max()), _PIECE):
        mine = np.frombuffer(data[first : first + _PIECE], np.uint8)
        most = min(int(sizes.max()) - first, _PIECE)
        # Powers of two, so that few programs are compiled.
        row = np.zeros(1 << (most - 1).bit_length(), np.uint8)
        row[: len(mine)] = mine
        rows = np.asarray(multihost_utils.process_allgather(row)).reshape(len(sizes), -1)
        if keep:
            for part, row, size in zip(parts, rows, sizes, strict=True):
                part.append(row[: max(int(size) - first, 0)].tobytes())
    return [b"".join(part) for part in parts]


def _exchange(frames: "queue.Queue[Frame]", failures: list[Frame], pipe: BinaryIO) -> None:
    """Exchanges frame after frame, each once all processes have given theirs."""
    index, frame = jax.process_index(), None
    while True:
        if frame is None:
            with contextlib.suppress(queue.Empty):
                frame = frames.get(timeout=_ROUND_S)
        else:
            time.sleep(_ROUND_S / 10)
        # An error waits for nothing.
        mine = failures[0] if failures else frame or Frame(_IDLE)
        stand = multihost_utils.process_allgather(np.asarray([mine.kind, len(mine.data)]))
        kinds, sizes = np.asarray(stand).reshape(-1, 2).T
        if (kinds == FAIL).any():
            reason = mine.data if mine.kind == FAIL else b""
            told = _gathered(reason, np.where(kinds == FAIL, sizes, 0), keep=True)
            first = int(np.argmax(kinds == FAIL))
            code, _, text = told[first].partition(b" ")
            write(pipe, Frame(FAIL, code + b" process %d: " % first + text))
            return
        if (kinds == _IDLE).any():
            continue
        if len(set(kinds.tolist())) > 1:
            raise RuntimeError(f"the processes do different things: {kinds.tolist()}")
        if mine.kind == DONE:
            return
        told = _gathered(mine.data, sizes, keep=mine.kind == BROADCAST or index == 0)
        if mine.kind == BROADCAST:
            write(pipe, Frame(BROADCAST, told[0]))
        elif index == 0:
            for data in told:
                write(pipe, Frame(COLLECT, data))
        frame = None


def main() -> None:
    """Joins the run, says which process this is, exchanges frames until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program that started it decides
    # The libraries below print to the standard output.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**json.loads(sys.argv[1]))
    multihost_utils.sync_global_devices("joined")
    where = {"index": jax.process_index(), "count": jax.process_count()}
    # JAX's rule under Slurm: which of the devices of a machine are this process's.
    where["visible"] = jax.config.values.get("jax_cuda_visible_devices")
    write(pipe, Frame(BROADCAST, json.dumps(where).encode()))
    frames: queue.Queue[Frame] = queue.Queue()
    failures: list[Frame] = []

    def listen() -> None:
        while (frame := read(sys.stdin.buffer)) is not None:
            if frame.kind == FAIL:
                failures.append(frame)
            frames.put(frame)
        os._exit(0)  # the program that started this one is gone

    threading.Thread(target=listen, daemon=True).start()
    try:
        _exchange(frames, failures, pipe)
        jax.distributed.shutdown()
        pipe.flush()
    except Exception:
        # An orderly end would wait for the dead peer.
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # the listening thread would make an orderly end of the interpreter abort


if __name__ == "__main__":
    main()
