"""Importing the methods costs jax and optax alone."""

import subprocess
import sys


def test_import_is_light():
    code = (
        "import sys, ttt_jax.methods; "
        "print([name for name in ('flax', 'orbax', 'scipy', 'tensorflow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
