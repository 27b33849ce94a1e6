"""Config files of sweeps over the cut-down demo with a dense model, with one method."""

import textwrap

_HEAD = """
from tests.experiments import dense_config


def get_config():
    config = dense_config.get_config()
    config.methods = {"rotation": config.methods.rotation}
    return config


def sweep(add):
"""


def write(path, body):
    """Writes a config file whose ``sweep(add)`` has that body; returns its path as text."""
    path.write_text(_HEAD + textwrap.indent(textwrap.dedent(body), "    "))
    return str(path)
