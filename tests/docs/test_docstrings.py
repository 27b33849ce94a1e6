"""Every example in a docstring of the package runs."""

import doctest
import importlib
import pathlib

import pytest

import ttt_jax

_ROOT = pathlib.Path(ttt_jax.__file__).parent
_MODULES = sorted(
    "ttt_jax." + ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    for path in _ROOT.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def test_there_are_examples():
    assert len(_MODULES) >= 5


@pytest.mark.parametrize("name", _MODULES)
def test_examples(name):
    results = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert results.attempted > 0
    assert results.failed == 0
