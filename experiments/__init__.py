"""Programs that train, adapt and report; each runs as ``python -m experiments.NAME``."""

import os
import sys
from types import TracebackType

INTERRUPTED = "interrupted; what is finished is kept. Run the same command again to go on."


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of an error while a program is imported: Ctrl-C is one line, as :mod:`launch` has it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {INTERRUPTED}", file=sys.stderr, flush=True)
    os._exit(130)


# So ``python -m`` calls itself until it has found the program.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _end
