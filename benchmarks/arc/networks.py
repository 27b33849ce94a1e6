"""The decoder of ARC's programs."""

from typing import Any

import jax.numpy as jnp

from ttt_jax import models

SMALL = {"width": 64, "depth": 2, "heads": 4, "mlp_width": 96}


def network(settings: Any, tasks: int) -> models.GridDecoder:
    """The decoder: 57 million weights in matrices; a tiny one for a smoke run.

    Args:
      settings: ``smoke``, ``heads`` and ``unroll`` of a program.
      tasks: how many tasks its tables hold.
    """
    if settings.smoke:
        return models.GridDecoder(tasks=tasks, **SMALL)
    return models.GridDecoder(
        tasks=tasks, heads=settings.heads, dtype=jnp.bfloat16, unroll=settings.unroll
    )
