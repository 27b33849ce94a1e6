"""What every program says of its command line: its ``--help``, and what is wrong with a flag."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from experiments import config_files, launch
from experiments.config_keys import ABSENT, COMMON, DEFAULTS, METHOD, NEEDED, Key

# Who defines flags: a program, and what programs share.
_OWNERS = ("experiments.", "benchmarks.")


def text(argv: Sequence[str]) -> str:
    """The help of the program at hand, for the config that its command line names."""
    program = sys.modules["__main__"]
    parts = [(program.__doc__ or "").strip(), "", "Flags:", *_flags(str(argv[0]))]
    if "config" in flags.FLAGS:
        name = next(iter(config_files.configs_named(argv)), config_files.DEFAULT_CONFIG)
        said = f"Keys of the config, for the task of {os.path.relpath(name)}:"
        parts += ["", said, *_keys(name)]
    return "\n".join(parts)


def _flags(program: str) -> list[str]:
    """A paragraph per flag, without those of libraries."""
    found: dict[str, flags.Flag] = {}
    for module, of_module in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith(_OWNERS) or module == program:
            found |= {flag.name: flag for flag in of_module}
    lines = []
    for name, flag in sorted(found.items()):
        switch = f"--[no]{name}" if flag.boolean else f"--{name}"
        default = str(flag.default_as_str).replace(f"{os.getcwd()}/", "")
        default = f" (default: {default})" if flag.default not in (None, []) else ""
        lines.append(_paragraph(f"{switch}: {flag.help}{default}"))
    return lines


def _keys(name: Any) -> list[str]:
    from experiments import tasks  # a flag is wrong without jax

    config = config_files.config_from(name)
    own = tasks.keys(config)
    heads = tasks.head_keys(config) or {}
    lines = _lines({**COMMON, **(own or {})}, "")
    if own is None:
        lines.append(_paragraph("and what its task reads, which does not say its keys"))
    lines += _lines({**METHOD, **heads}, "methods.LABEL.")
    return [*lines, _paragraph("methods.LABEL.*: the other arguments of the method")]


def _lines(keys: Mapping[str, Key], prefix: str) -> list[str]:
    return [
        _paragraph(f"{prefix}{name}: {key.meaning}; {_rule(key)}") for name, key in keys.items()
    ]


def _rule(key: Key) -> str:
    says = f"must {key.rule.says}"
    if key.needed_with:
        return f"{says}; needed with {key.needed_with[0]}={key.needed_with[1]!r}"
    if key.default is NEEDED:
        return f"{says}; needed"
    return says if key.default is ABSENT else f"{says}; left out: {key.default!r}"


def _paragraph(line: str) -> str:
    return flags.text_wrap(line, length=100, indent="      ", firstline_indent="  ")


def wrong(error: Exception, argv: Sequence[str]) -> str:
    """What is wrong with a command line, on one line, and what would mend it."""
    if isinstance(error, flags.Error):
        said = str(error)
        if lacks := re.match(r"flag --(\w+)=None: .* must have a value other than None", said):
            said = f"--{lacks[1]} is needed: {flags.FLAGS[lacks[1]].help} --help says more."
    else:
        said = str(error.args[0]) if error.args else str(error)
        said = f"bad --config: {_with_nearest(said, argv)}"
    return " ".join(said.split())


def _with_nearest(message: str, argv: Sequence[str]) -> str:
    """Says of the override that failed what would mend it, where ml_collections does not."""
    if "Did you mean" in message:
        return message
    keys = [
        found[1] for argument in argv if (found := re.match(r"--?config\.([\w.]+)=?", argument))
    ]
    # The message of a key that there is not is the key's last part in quotes.
    named = re.fullmatch(r"""['"]+(\w+)['"]+""", message.strip())
    failing = [key for key in keys if named and key.split(".")[-1] == named[1]]
    for key in failing:
        hint = "" if key in DEFAULTS else launch.nearest(key, launch.flat(_demo()))
        default = f", which is {DEFAULTS[key]!r} by default" if key in DEFAULTS else ""
        said = f"the config file has no {key}{default}{hint}"
        return f"{said if hint else said + '.'} Only keys of the file can be overridden; add it."
    return message


def _demo() -> ml_collections.ConfigDict:
    return config_files.config_from(config_files.DEFAULT_CONFIG)
