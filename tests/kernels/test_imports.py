"""What the kernels import: jax alone, and Pallas nowhere but in their folder."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ttt_jax

PACKAGE = pathlib.Path(ttt_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {"jax", "numpy", "ttt_jax"}

# The package without its own first file, which imports optax, and without what kernels do not need.
SCRIPT = """
import importlib, pkgutil, sys, types

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "optax", "orbax"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Missing())
package = types.ModuleType("ttt_jax")
package.__path__ = [sys.argv[1]]
sys.modules["ttt_jax"] = package
kernels = importlib.import_module("ttt_jax.kernels")
assert not [name for name in sys.modules if "pallas" in name], "Pallas before a kernel is run"
names = [m.name for m in pkgutil.walk_packages(kernels.__path__, "ttt_jax.kernels.")]
assert len(names) > 10, names
for name in names:
    importlib.import_module(name)
print(*sorted(name for name in sys.modules if name.startswith("ttt_jax.")))
"""


def imports(path):
    """The modules that a file names in its imports, with the names that it takes from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relative to itself"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_kernels_need_jax_alone():
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(PACKAGE)]
    # jax 0.11 announces the end of this backend; without it the other forms serve.
    command[3:3] = ["-W", "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    modules = run.stdout.split()
    assert (
        "ttt_jax.kernels.conv.passes" in modules and "ttt_jax.kernels.attention.kernel" in modules
    )
    assert all(name.startswith("ttt_jax.kernels") for name in modules)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_pallas_is_imported_in_kernels_only(path):
    modules = list(imports(path))
    if path.is_relative_to(PACKAGE / "kernels"):
        outside = {name.partition(".")[0] for name in modules} - ALLOWED
        assert outside <= set(sys.stdlib_module_names)
        ours = [name for name in modules if name.startswith("ttt_jax")]
        assert all(name.startswith("ttt_jax.kernels") for name in ours)
    else:
        assert not [name for name in modules if "pallas" in name]


def test_without_the_triton_backend_the_other_forms_serve():
    """A jax that dropped the backend: nothing fails at import, and no kernel is promised."""
    script = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import jax, jax.numpy as jnp
from ttt_jax.kernels import attention, conv
jax.default_backend = lambda: "gpu"
assert conv.fits((16, 16, 3), 16, 8, jnp.float32)
assert not conv.supported((16, 16, 3), 16, 8, jnp.float32)
attention.forms.flash = lambda *arrays: "flash"
assert attention.attend(*jnp.zeros((3, 2, 4, 2, 16)), "fused") == "flash"
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
