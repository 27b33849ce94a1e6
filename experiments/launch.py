"""What every program shares: flags, configs, files and the work folder, one-line errors."""

import atexit
import contextlib
import difflib
import errno
import fcntl
import json
import os
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import ml_collections
import numpy as np
from absl import app, flags, logging

from experiments import INTERRUPTED, end_at_once
from experiments.config_keys import DEFAULTS

# What ml_collections raises for a missing config file and for --config.KEY=VALUE it cannot apply;
# it parses the overrides as soon as the flag is defined.
OVERRIDE_ERRORS = (KeyError, AttributeError, TypeError, ValueError, OSError)


class UserError(Exception):
    """Something the person at the terminal can mend; printed as one line, exit status 2."""


_HELP = {f"{d}{name}" for d in ("-", "--") for name in ("help", "helpshort", "helpfull", "h")}
_INTACT = (
    "What was written before is intact; free space or choose another --workdir, then run the same "
    "command again."
)
# What a person can mend.
MENDABLE = (UserError, ValueError, OSError)


def run(main: Callable[[Sequence[str]], Any], *, arguments: bool = False) -> None:
    """``absl.app.run`` in which errors a person can mend are one line and exit status 2.

    Ctrl-C is one line and status 130; an output that nobody reads, as behind ``head``, is no word.
    ``--help`` prints :func:`experiments.usage.text`, with status 0.

    Args:
      main: the program; takes the command line without flags, returns the exit status.
      arguments: whether it takes any beside its flags.
    """
    helps = not _HELP.isdisjoint(sys.argv[1:])

    def guarded(argv: Sequence[str]) -> Any:
        if signal.getsignal(signal.SIGINT) is end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return called(argv)

    def called(argv: Sequence[str]) -> Any:
        try:
            if helps:
                from experiments import usage  # which needs this module

                print(usage.text(sys.argv))
                status = 0
            elif len(argv) > 1 and not arguments:
                raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --.")
            else:
                status = main(argv)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            _drop(1)
            return 2
        except (KeyboardInterrupt, Exception) as error:
            if interrupted := isinstance(error, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            mendable = interrupted or isinstance(error, MENDABLE) or no_room(error)
            if not mendable or os.environ.get("TTT_JAX_TRACEBACK"):
                raise
            try:
                sys.stdout.flush()
            except OSError:
                _drop(1)
            print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
            if interrupted:
                # Threads of libraries would print tracebacks, or crash, in an orderly end.
                os._exit(130)
            # What they say at the end of what failed is no news, such as of a full disk.
            atexit.register(_drop, 2)
            return 2

    def parse(argv: Sequence[str]) -> list[str]:
        if helps:
            flags.FLAGS.mark_as_parsed()
            return list(argv[:1])
        try:
            return flags.FLAGS(list(argv))
        except (flags.Error, *OVERRIDE_ERRORS) as error:
            refuse(error)

    # Orbax and TFDS log each file they touch at INFO.
    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def _warn(message: Warning | str, *_: Any) -> None:
    """A warning as a person reads it: without the line of code that gave it."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _drop(descriptor: int) -> None:
    """What is still to be printed goes nowhere, rather than into an error at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def sentence(error: BaseException) -> str:
    """What an error that a person can mend says, on one line."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or INTERRUPTED
    said = " ".join(str(error).split("\n")) or type(error).__name__
    if not no_room(error) or isinstance(error, UserError):
        return said
    known = any(os.strerror(number) in said for number in _NO_ROOM)
    return f"{'' if known else 'a disk is full or read-only: '}{said.rstrip('.')}. {_INTACT}"


def refuse(error: Exception) -> NoReturn:
    """Ends a program whose command line is wrong."""
    from experiments import usage  # which needs this module

    print(f"error: {usage.wrong(error, sys.argv)}", file=sys.stderr)
    sys.exit(2)


def nearest(key: str, known: Iterable[str]) -> str:
    """``"; did you mean KEY?"``, or nothing where no known key is near."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def setting(config: ml_collections.ConfigDict, name: str) -> Any:
    """The value of a key of ``config_keys.DEFAULTS``, such as ``train.aux``."""
    section, key = name.split(".")
    return config[section].get(key, DEFAULTS[name])


def chosen(kind: str, names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The names, or a :class:`UserError` that lists the choices: at least one, each once."""
    names, known = tuple(names), tuple(known)
    for name in names or ("",):
        if name not in known:
            raise UserError(f"unknown {kind} {name!r}; choose from {', '.join(known)}.")
        if names.count(name) > 1:
            raise UserError(f"{kind} {name!r} is there twice; name each once.")
    return names


def require_known(name: str, settings: Iterable[str], known: Iterable[str]) -> None:
    """Refuses the settings of a method that nothing reads.

    Raises:
      ValueError: naming the first, what there is, and the nearest.
    """
    known = sorted(known)
    for key in settings:
        if key not in known:
            hint = nearest(key, known) or "."
            raise ValueError(f"{key!r} is no setting of {name}; choose from {known}{hint}")


def new_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a file to write that is not there yet, in a folder that can be written.

    Raises:
      UserError: there is such a file: what it holds was measured.
    """
    file = pathlib.Path(path)
    if file.exists():
        raise UserError(f"{file} exists and is not replaced; remove it or choose another --out.")
    open_workdir(str(file.parent))
    return file


def flat(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The values of a config by dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


class WriteError(UserError):
    """A file cannot be written, such as on a full disk."""


class BusyError(UserError):
    """Another program uses a folder."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def no_room(error: BaseException | None) -> bool:
    """Whether a full or read-only disk is behind an error, whoever raised it.

    Libraries that write by themselves give the system's words and not its number.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(os.strerror(number) in str(error) for number in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def writing(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turns a failed write into one sentence that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}. {_INTACT}") from error


def given(flag: str, names: list[str] | None) -> tuple[str, ...]:
    """The names of a list flag, none where it was not given.

    Raises:
      UserError: it was given without a name.
    """
    if names is not None and not names:
        raise UserError(f"--{flag} was given without a name; leave it out for all.")
    return tuple(names or ())


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file beside ``path`` that takes its place at the end."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            yield draft
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def append(path: pathlib.Path, text: str) -> None:
    """Adds text to a file as a whole, flushed to the disk: all of it, or nothing."""
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            end, data = os.fstat(descriptor).st_size, text.encode()
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces a file as a whole, so that a killed run never leaves half of one."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_npz(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False
) -> None:
    """Replaces an ``.npz`` file as a whole, and makes its folder."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft, draft.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


def read_npz(path: pathlib.Path, mend: str) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file.

    Args:
      path: of the file.
      mend: a sentence that says what helps where it is damaged.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return dict(held)
    except Exception as error:  # of zip files, of their compression, of arrays
        said = str(error).split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        raise UserError(f"{path} is damaged ({said}). {mend}") from error


def write_json(path: str | os.PathLike[str], record: Any) -> None:
    """Replaces a JSON file as a whole."""
    write_atomically(pathlib.Path(path), json.dumps(record, indent=1) + "\n")


def open_workdir(workdir: str) -> pathlib.Path:
    """Makes the work folder, and finds out now whether it can be written."""
    folder = pathlib.Path(workdir)
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise UserError(
                f"cannot write {folder}: {part} is a file and no folder; choose another --workdir."
            )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        try:
            probe.write_text("ok")
        finally:
            probe.unlink(missing_ok=True)
    return folder


@contextlib.contextmanager
def locked(
    folder: pathlib.Path, name: str = ".lock", *, shared: bool = False, wait: bool = False
) -> Iterator[None]:
    """Holds the lock of a folder, which dies with its process.

    Args:
      folder: an existing one.
      name: of the lock's file.
      shared: others that share it may hold it too.
      wait: for its holder, however long.

    Raises:
      BusyError: another program holds it.
      UserError: the file system has no locks.
    """
    with (folder / name).open("a") as file:
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(file, how)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BusyError(
                    f"{folder} is in use by another program; wait for it or choose another "
                    "--workdir."
                ) from error
            raise UserError(
                f"{folder} cannot be locked: {error.strerror}. Choose a --workdir on a "
                "file system with locks."
            ) from error
        yield
