"""Compiling many small programs quickly; their values stay those of ordinary compilation."""

from typing import Any

import jax
import numpy as np

_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
}
_known: dict[str, Any] | None = None


def _options() -> dict[str, Any]:
    """Those of the options that this jaxlib and backend know."""
    global _known
    if _known is None:
        _known = {}
        if jax.default_backend() == "cpu":
            trivial = jax.jit(lambda x: x).lower(0.0)
            for name, value in _QUICK.items():
                try:
                    trivial.compile(compiler_options={name: value})
                except jax.errors.JaxRuntimeError:
                    continue
                _known[name] = value
    return _known


def _on_host(leaf: Any) -> Any:
    return leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


def quickly(function: Any, *args: Any) -> Any:
    """``function(*args)``, compiled with as little optimization as possible.

    In NumPy but for keys: what a test does with the results compiles nothing more.
    """
    compiled = jax.jit(function).lower(*args).compile(compiler_options=dict(_options()))
    return jax.tree.map(_on_host, compiled(*args))


def recorded(build: Any, *args: Any) -> tuple[Any, list[Any]]:
    """The value of ``build(record)(*args)`` and all that it passed to ``record``."""

    def run(*args: Any) -> tuple[Any, list[Any]]:
        seen: list[Any] = []
        return build(seen.append)(*args), seen

    return quickly(run, *args)
