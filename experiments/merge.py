"""The rows of parts of a table as one table.

Usage::

    python -m experiments.merge --workdir=WHOLE --parts=PART0,PART1,...

A part is the work folder of an ``experiments.adapt`` with the same config, over some methods or
domains (``--methods``, ``--domains``), over some seeds, or over a range of the test images
(``--config.data.test='test[:5000]'``). Rows of one part alone are taken as they are; rows of
several ranges become one by adding their ``sums``, as if its images had been adapted in one run: an
image's corruption and keys depend on its place in the split, not on the range it came with. Its
values are those of the task's metrics, so the data of the config must be there. ``WHOLE`` can be
reported on, and resumed with the config whose ``data.test`` is the whole.

Only what takes one image at a time can be cut into ranges, and no gradual sequence, where the place
in the range says how severe an image's corruption is. A row per range is missing, ranges that
overlap, rows that differ where they should not: each is refused, and nothing is written.

Settings with candidates are chosen once: parts of other seeds begin with the ``selection.json`` of
the first part in their work folder, as one run over all seeds takes the choice of its first one.

With ``--program=diagnose`` a part is the work folder of an ``experiments.diagnose``, over some
corruptions, severities or seeds; the record of all and its page are made from the rows.
"""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from experiments import launch
from experiments.merging import diagnostics, parts as parts_lib, table

PROGRAMS = {"adapt": table, "diagnose": diagnostics}


def run(folder: str, parts: Sequence[str], program: str = "adapt") -> int:
    """Writes what some parts have together into a work folder; returns the exit status.

    Args:
      folder: the work folder to write, new or of an earlier merge.
      parts: the work folders to read.
      program: what made them, one of :data:`PROGRAMS`.

    Raises:
      UserError: parts that do not belong together, or the folder has rows that were not merged.
    """
    if len(set(parts)) < len(parts) or not parts:
        raise launch.UserError(
            f"--parts lists the work folders, each once; got {', '.join(parts) or 'none'}."
        )
    target = pathlib.Path(folder)
    if target.exists() and any(target.samefile(part) for part in parts if os.path.exists(part)):
        raise launch.UserError(
            f"{target} is one of --parts, which a merge reads only; choose another --workdir."
        )
    kind = PROGRAMS[program]
    read = [kind.read(pathlib.Path(part)) for part in parts]
    config, rows = kind.joined(read)
    workdir = launch.open_workdir(folder)
    with launch.locked(workdir):
        test = config["data"].get("test", "test")
        parts_lib.require_more(workdir, kind.RECORD, kind.BOOK, test, rows)
        origin = {
            "command": f"python -m experiments.merge {shlex.join(sys.argv[1:])}",
            "config": config,
            "parts": [origin for part in read for origin in parts_lib.origins(part)],
        }
        kind.write(workdir, read, rows, origin)
    return 0


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    return run(_WORKDIR.value, _PARTS.value, _PROGRAM.value)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The work folder to write.", required=True)
    _PARTS = flags.DEFINE_list("parts", None, "The work folders to read.", required=True)
    _PROGRAM = flags.DEFINE_enum("program", "adapt", list(PROGRAMS), "What made the parts.")
    launch.run(main)
