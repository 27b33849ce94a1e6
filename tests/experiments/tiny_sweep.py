"""Config files of sweeps over the cut-down demo, with one method."""

import textwrap

_HEAD = """
from tests.experiments import tiny_config


def get_config():
    config = tiny_config.get_config()
    config.methods = {"rotation": config.methods.rotation}
    config.methods.rotation.learning_rate = (0.01,)
    return config


def sweep(add):
"""


def write(path, body):
    """Writes a config file whose ``sweep(add)`` has that body; returns its path as text."""
    path.write_text(_HEAD + textwrap.indent(textwrap.dedent(body), "    "))
    return str(path)
