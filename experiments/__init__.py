"""Programs that train, adapt and report; each runs as ``python -m experiments.NAME``."""

import sys

# Ctrl-C while a program still imports its libraries; launch.run says the same later on.
if sys.argv[:1] == ["-m"]:
    _hook = sys.excepthook

    def _quiet(kind: type, error: BaseException, trace: object) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("error: interrupted; nothing was begun.", file=sys.stderr)
        else:
            _hook(kind, error, trace)  # type: ignore[arg-type]

    sys.excepthook = _quiet
