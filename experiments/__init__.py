"""Programs that train, adapt and report; each runs as ``python -m experiments.NAME``."""

import os
import signal
import sys

INTERRUPTED = "interrupted; what is finished is kept. Run the same command again to go on."


def end_at_once(*_: object) -> None:
    """Ends a program by Ctrl-C before it has begun: an import cannot be left in the middle."""
    os.write(2, f"error: {INTERRUPTED}\n".encode())
    os._exit(130)


# So ``python -m`` calls itself until it has found the program; :func:`launch.run` takes it back.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
