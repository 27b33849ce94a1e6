"""Every Python block of the pages is run by Sphinx, and every public name is on a page."""

import importlib
import inspect
import pathlib
import re

import pytest

_DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
_PAGES = sorted(path for path in _DOCS.rglob("*.md") if "_build" not in path.parts)
_FENCE = re.compile(r"^\s*(?:`{3,}|:{3,}|~{3,})(.+)$", re.MULTILINE)
# What a fence may be: run by sphinx.ext.doctest, a directive without code, or a terminal.
_RUN = {"{testcode}", "{testoutput}", "{doctest}", "{testsetup}", "{testcleanup}"}
_NO_PYTHON = {"{toctree}", "{eval-rst}", "{alignment}", "console", "text", "json"}


@pytest.mark.parametrize("page", _PAGES, ids=lambda path: path.relative_to(_DOCS).as_posix())
def test_no_block_is_left_unrun(page):
    kinds = {kind.strip().split()[0] for kind in _FENCE.findall(page.read_text(encoding="utf-8"))}
    assert kinds - _RUN - _NO_PYTHON == set()


@pytest.mark.parametrize("page", _PAGES, ids=lambda path: path.relative_to(_DOCS).as_posix())
def test_every_block_shows_its_output(page):
    """A block without output would pass whatever it computed; blocks that only define are rare."""
    kinds = [kind.strip().split()[0] for kind in _FENCE.findall(page.read_text(encoding="utf-8"))]
    codes, outputs = kinds.count("{testcode}"), kinds.count("{testoutput}")
    assert outputs <= codes
    assert codes - outputs <= 1


def _public(module):
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    package = module.__name__
    names = []
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        origin = getattr(value, "__module__", "")
        # A package re-exports; a module's own names are those it defines.
        own = origin.startswith(package) if hasattr(module, "__path__") else origin == package
        if own:
            names.append(name)
    return names


@pytest.mark.parametrize(
    "name",
    [
        "ttt_jax",
        "ttt_jax.methods",
        "ttt_jax.views.image",
        "ttt_jax.views.augmix",
        "ttt_jax.views.grid",
        "ttt_jax.losses",
        "ttt_jax.generation",
        "ttt_jax.serving",
        "ttt_jax.optimizers",
        "ttt_jax.budget",
        "ttt_jax.task",
        "ttt_jax.metrics",
        "ttt_jax.evaluation",
        "ttt_jax.tuning",
        "ttt_jax.training",
        "ttt_jax.neighbors",
        "ttt_jax.passages",
        "ttt_jax.readers",
        "ttt_jax.votes",
        "ttt_jax.select",
        "ttt_jax.resets",
        "ttt_jax.audit",
        "ttt_jax.diagnostics",
        "ttt_jax.checkpoint",
        "ttt_jax.data",
        "ttt_jax.data.corruptions",
        "ttt_jax.data.streams",
        "ttt_jax.data.tokenizers",
        "ttt_jax.data.few_shot",
        "ttt_jax.data.isomorphism",
        "ttt_jax.models",
        "ttt_jax.layers",
        "ttt_jax.layers.inner_losses",
        "ttt_jax.layers.inner_optimizers",
        "ttt_jax.layers.memories",
        "ttt_jax.layers.nnx",
        "ttt_jax.layers.retentions",
        "ttt_jax.kernels.conv",
        "ttt_jax.kernels.attention",
    ],
)
def test_public_names_are_documented(name):
    text = "".join(path.read_text(encoding="utf-8") for path in (_DOCS / "api").glob("*.md"))
    public = _public(importlib.import_module(name))
    assert public
    missing = [n for n in public if not re.search(rf":: {re.escape(f'{name}.{n}')}$", text, re.M)]
    assert missing == []
