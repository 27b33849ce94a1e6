"""Checks of the attributes of :class:`ttt_jax.models.Decoder`, where it is built."""

from typing import Any

from ttt_jax import _arguments
from ttt_jax.kernels.attention import FORMS
from ttt_jax.layers import _backbones, _inputs
from ttt_jax.models._decoder_layer import ACTIVATIONS
from ttt_jax.models._ttt_mixer import MIXERS

_COUNTS = (
    "vocabulary",
    "width",
    "depth",
    "heads",
    "global_every",
    "context",
    "unroll",
    "chunk_size",
)
_COUNTS_OR_NONE = ("kv_heads", "head_size", "mlp_width", "local_window", "window")
_BASES = ("rope_base", "local_rope_base")
# Of attention alone, with what they are where nothing is said.
_ATTENTION = {
    **dict.fromkeys(("kv_heads", "local_window", "window")),
    **dict.fromkeys(("interleaved", "biases", "query_key_norm"), False),
    "sinks": 0,
}
_FLAGS = ("interleaved", "biases", "query_key_norm", "post_norms", "scaled_embedding", "tied")


def check(module: Any) -> None:
    """Raises ``ValueError`` or ``TypeError`` for an attribute that no decoder can have."""
    _arguments.check_fields(
        module,
        **dict.fromkeys(_COUNTS, _arguments.count()),
        **dict.fromkeys(
            [name for name in _COUNTS_OR_NONE if getattr(module, name) is not None],
            _arguments.count(),
        ),
        **dict.fromkeys(_BASES, _arguments.number(0.0, above=True)),
        **dict.fromkeys([*_FLAGS, "remat", "cache_gradients", "pre_convolution"], _arguments.flag),
        epsilon=_arguments.number(0.0),
        sinks=_arguments.count(0),
    )
    choices = {
        "activation": tuple(ACTIVATIONS),
        "attention": FORMS,
        "mixer": tuple(MIXERS),
        "backbone": _backbones.BACKBONES,
        "form": _inputs.FORMS,
    }
    for name, known in choices.items():
        value = getattr(module, name)
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name} must be one of {known}; got {value!r}.")
    _check_heads(module)
    _check_mixer(module)
    if module.stages is not None:
        _arguments.check_fields(module, stages=_arguments.sequence(int))
        if min(module.stages, default=0) < 1 or sum(module.stages) != module.depth:
            raise ValueError(
                "stages must be counts of at least 1 that add up to depth; got "
                f"stages={module.stages} and depth={module.depth}."
            )


def _check_heads(module: Any) -> None:
    if module.head_size is None and module.width % module.heads:
        raise ValueError(
            "heads must divide width where head_size is None; got "
            f"heads={module.heads} and width={module.width}: give head_size."
        )
    kv_heads = module.heads if module.kv_heads is None else module.kv_heads
    if module.heads % kv_heads:
        raise ValueError(
            f"kv_heads must divide heads; got kv_heads={kv_heads} and heads={module.heads}."
        )
    size = module.width // module.heads if module.head_size is None else module.head_size
    if size % 2:
        raise ValueError(
            f"head_size must be even, as rotary pairs are; got head_size={module.head_size}, width="
            f"{module.width} and heads={module.heads}."
        )


def _check_mixer(module: Any) -> None:
    if module.mixer == "attention":
        if module.pre_convolution:
            raise ValueError(
                "pre_convolution is of TTT layers, and mixer='attention' has none; got "
                "pre_convolution=True: leave it out, or choose mixer='ttt_linear' or 'ttt_mlp'."
            )
        return
    for name, usual in _ATTENTION.items():
        if (value := getattr(module, name)) != usual:
            raise ValueError(
                f"{name} is of attention, and mixer={module.mixer!r} has none; got {name}={value!r}"
                ": leave it out."
            )
    # The layer checks its own attributes where it is built.
    module.learner.module(parent=None)
