"""The file of :mod:`benchmarks.vision`, begun by one call and gone on with by others."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments import launch

KEY = "work way compute_dtype attention num_steps copies batch samples devices".split()
# The other settings choose which rows there are.
_SETTINGS = ("compiler_options", "repeats", "smoke", "trace")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a row of a file."""
    return tuple(row[name] for name in KEY)


@contextlib.contextmanager
def opened(path: pathlib.Path, new: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The record to add rows to: ``new``, or where there is a file the one that it holds.

    No other program opens it meanwhile. It says where the call comes from that began the rows, and
    the ``config`` of the last one; ``runs`` are the origins of all that measured. As in every
    program, all trees with changes to one commit are one commit, called ``-dirty``.

    Args:
      path: the file, in a folder that is there.
      new: a record without rows.

    Raises:
      launch.UserError: the folder is in use, or the file is no such record or was made otherwise.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(launch.locked(path.parent))
        except launch.BusyError as error:
            raise launch.BusyError(
                f"{path.parent} is in use by another program; wait for it or choose an --out in "
                "another folder."
            ) from error
        yield _continued(path, new) if path.exists() else new


def _continued(path: pathlib.Path, new: dict[str, Any]) -> dict[str, Any]:
    now = _made_with(new)
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        was = _made_with(old)
        for row in [*old["rows"], *old["failed"]]:
            key_of(row)
        [*old["runs"], *old["matmul"]["tflops"]]  # they are there
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise launch.UserError(
            f"{path} is no record that can be gone on with ({error!r}); choose another --out."
        ) from error
    # What only one of two calls needs, such as torch, is no difference.
    changed = [
        f"{name} was {was[name]!r}, now {now[name]!r}"
        for name in was
        if name in now and was[name] != now[name]
    ]
    if changed:
        # A file beside the code is a change too.
        hint = ", in runs/, which git ignores" if was["commit"] != now["commit"] else ""
        raise launch.UserError(
            f"{path} has rows made otherwise: {'; '.join(changed)}. Choose another --out{hint}."
        )
    return old | {"config": new["config"], "versions": old["versions"] | new["versions"]}


def _made_with(record: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a file share, by dotted key."""
    same = {name: record[name] for name in ("commit", "device", "device_count")}
    same["matmul.precision"] = record["matmul"]["precision"]
    same |= {f"config.{name}": record["config"][name] for name in _SETTINGS}
    return same | {f"versions.{name}": value for name, value in record["versions"].items()}
