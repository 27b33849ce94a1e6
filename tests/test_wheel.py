"""The built wheel, installed in a bare environment, does what the README promises of it."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_MOST_DISTRIBUTIONS = 32
_LARGEST_DEMO = 200_000
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def _run(*command, cwd):
    # The checkout must not be importable, and the reader has no test settings.
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, as setuptools leaves a build folder beside what it builds.
    tree = folder / "tree"
    tree.mkdir()
    for path in _ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, tree)
    shutil.copy(_ROOT / "LICENSE", tree)
    unused = shutil.ignore_patterns("__pycache__", "results")
    for name in ("ttt_jax", "experiments", "benchmarks", "tests"):
        shutil.copytree(_ROOT / name, tree / name, ignore=unused)
    _run(*_PIP, "wheel", "--no-deps", "--wheel-dir", folder, tree, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_library_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        entries = {entry.filename: entry.compress_size for entry in archive.infolist()}
    assert {name.partition("/")[0].partition("-")[0] for name in entries} == {"ttt_jax"}
    packed = {name for name in entries if name.startswith("ttt_jax/")}
    stored = {
        path.relative_to(_ROOT).as_posix()
        for path in (_ROOT / "ttt_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == stored
    demo = [size for name, size in entries.items() if name.endswith(".npz")]
    assert demo
    assert sum(demo) < _LARGEST_DEMO


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The Python of an environment that holds the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    # Of all that is installed little is imported: compiling the rest takes most of the time.
    _run(*_PIP, "--python", python, "install", "--no-compile", wheel, cwd=folder)
    return python


def test_few_distributions_are_installed(bare, tmp_path):
    names = _run(*_PIP, "--python", bare, "list", "--format=freeze", cwd=tmp_path).splitlines()
    assert any(re.match(r"ttt[-_]jax\b", name) for name in names)
    assert len(names) <= _MOST_DISTRIBUTIONS, names


def test_every_module_can_be_imported(bare, tmp_path):
    """The modules of an extra too: what they need is asked for when it is used."""
    modules = sorted(
        ".".join(path.relative_to(_ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (_ROOT / "ttt_jax").rglob("*.py")
    )
    # The builder of the digits is a class of TFDS.
    modules.remove("ttt_jax.data.digits")
    _run(bare, "-c", "\n".join(f"import {name}" for name in modules), cwd=tmp_path)


def test_the_readme_begins_with_an_example_that_runs_in_an_empty_folder(bare, tmp_path):
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL).group(1)
    assert len(block.splitlines()) <= 12
    printed = _run(bare, "-c", block, cwd=tmp_path)
    before, after = map(float, re.findall(r"(\d+\.\d) %", printed))
    assert after < before
    assert list(tmp_path.iterdir()) == []
