"""What a :class:`ttt_jax.models.GridDecoder` refuses when it is built."""

from typing import Any

from ttt_jax import _checks
from ttt_jax.kernels.attention import FORMS

_HEAD_MULTIPLE = 16


def check(module: Any) -> None:
    """Raises ``ValueError`` for an attribute out of range."""
    for name in ("tasks", "width", "depth", "heads", "mlp_width", "unroll"):
        _checks.check_count(f"{name} of a GridDecoder", getattr(module, name))
    if module.width % module.heads or module.width // module.heads % _HEAD_MULTIPLE:
        raise ValueError(
            f"width of a GridDecoder must be heads times a multiple of {_HEAD_MULTIPLE}; got "
            f"{module.width} for {module.heads} heads."
        )
    if module.attention not in FORMS:
        raise ValueError(f"attention must be one of {FORMS}; got {module.attention!r}.")
