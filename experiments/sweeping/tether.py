"""Runs a command on some cores that dies with the process that started it.

Usage: ``python tether.py PARENT_PID CORE,CORE,... COMMAND ...``; no cores for all. A program
of its own: what it does must be done in the new process, and between fork and exec a parent with
threads may not run such code.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent, then becomes the command."""
    parent, cores, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before it could be watched
        sys.exit(1)
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
