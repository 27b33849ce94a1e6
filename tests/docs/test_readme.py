"""The README's Python blocks run, in order, in one namespace, as a reader would run them."""

import os
import pathlib
import re
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks():
    return _FENCE.findall((_ROOT / "README.md").read_text(encoding="utf-8"))


def test_readme_blocks_run(tmp_path):
    # The first one runs from the wheel, in tests/test_wheel.py.
    blocks = _blocks()[1:]
    assert blocks, "the README has no python block to run"
    # A process of its own: the reader has no test settings, and TFDS reads its folder on import.
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "TFDS_DATA_DIR": str(tmp_path / "tfds"),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_TEST_CACHE", str(_ROOT / ".jax_cache")),
    }
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*\)\s+# (.*)$", "".join(blocks), re.MULTILINE)
    assert done.stdout.splitlines() == promised


def test_readme_links_exist():
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    assert targets
    assert [t for t in targets if not (_ROOT / t).exists()] == []
