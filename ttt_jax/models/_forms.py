"""The sizes of a :class:`ttt_jax.models.Decoder` from the metadata of GGUF and Hugging Face."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ttt_jax.models._checks import nearest
from ttt_jax.models.decoder import Decoder

# Of Gemma 3, and not in its GGUF files (github.com/ggml-org/llama.cpp, issue 14367).
_GEMMA_LOCAL_BASE = 1e4
_GEMMA_GLOBAL_EVERY = 6
# What a configuration of Gemma 3 that names none means.
_GEMMA_HEAD_SIZE = 256
_GATES = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}


def of_gguf(fields: Mapping[str, Any], tied: bool, options: Mapping[str, Any]) -> Decoder:
    """A decoder of the sizes that a GGUF file names.

    Args:
      fields: the file's metadata.
      tied: whether it has no head of its own.
      options: further attributes, as of :func:`ttt_jax.models.load_gguf`.
    """
    form = _required(fields, "general.architecture")
    _check_form(form, ("llama", "qwen2", "gemma3"))

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"{form}.{name}", default)

    def need(name: str) -> Any:
        return _required(fields, f"{form}.{name}")

    scaling = get("rope.scaling.type", "none")
    if scaling != "none":
        refuse_scaling(scaling)
    width, heads = need("embedding_length"), need("attention.head_count")
    head_size = get("attention.key_length", width // heads)
    _check_turned(get("rope.dimension_count", head_size) / head_size)
    sizes: dict[str, Any] = {
        "vocabulary": len(_required(fields, "tokenizer.ggml.tokens")),
        "width": width,
        "depth": need("block_count"),
        "heads": heads,
        "kv_heads": get("attention.head_count_kv", heads),
        "head_size": head_size,
        "mlp_width": need("feed_forward_length"),
        "epsilon": need("attention.layer_norm_rms_epsilon"),
        "rope_base": get("rope.freq_base", 1e4),
        "context": need("context_length"),
        "interleaved": form == "llama",
        "biases": form == "qwen2",
        "tied": tied,
    }
    if form == "gemma3":
        sizes |= _gemma(need("attention.sliding_window"), _GEMMA_LOCAL_BASE, _GEMMA_GLOBAL_EVERY)
    return _decoder(sizes, options)


def of_hugging_face(config: Mapping[str, Any], options: Mapping[str, Any]) -> Decoder:
    """A decoder of the sizes in a ``config.json``, of its text part where it has several."""
    form = _required(config, "model_type")
    _check_form(form, ("llama", "qwen2", "gemma3_text"))
    gemma = form == "gemma3_text"
    width, heads = _required(config, "hidden_size"), _required(config, "num_attention_heads")
    head_size = config.get("head_dim") or (_GEMMA_HEAD_SIZE if gemma else width // heads)
    base, local_base = _rope_bases(config, gemma)
    sizes: dict[str, Any] = {
        "vocabulary": _required(config, "vocab_size"),
        "width": width,
        "depth": _required(config, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": head_size,
        "mlp_width": _required(config, "intermediate_size"),
        "epsilon": config.get("rms_norm_eps", 1e-6),
        "rope_base": base,
        "context": _required(config, "max_position_embeddings"),
        "activation": _gate(config, gemma),
        "biases": form == "qwen2",
        "tied": bool(config.get("tie_word_embeddings", gemma)),
    }
    if gemma:
        _check_scale(config, head_size)
        every = _global_every(config, sizes["depth"])
        sizes |= _gemma(_required(config, "sliding_window"), local_base, every)
    elif config.get("use_sliding_window"):
        raise ValueError(
            "load_hugging_face reads Qwen2 without windows; got use_sliding_window=true: set it to "
            "false, and pass window= for one in every layer."
        )
    return _decoder(sizes, options)


def refuse_scaling(kind: str) -> None:
    """Raises ``ValueError``: rotary positions whose frequencies are scaled."""
    raise ValueError(
        f"A Decoder has no scaled rotary positions; got the scaling {kind!r}. Choose a model "
        "without, or its version of a shorter context."
    )


def _check_turned(share: float) -> None:
    if share != 1:
        raise ValueError(
            f"A Decoder turns all pairs of a head; got a model that turns {share:g} of them: "
            "choose another model."
        )


def _rope_bases(config: Mapping[str, Any], gemma: bool) -> tuple[float, float]:
    """The bases of global and of local layers."""
    # transformers 5 writes rope_parameters, which Gemma 3 has by kind of layer.
    rope = config.get("rope_parameters") or {}
    everywhere, nearby = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    _check_turned(config.get("partial_rotary_factor") or 1.0)
    for part in (config.get("rope_scaling") or {}, everywhere, nearby):
        _check_turned(part.get("partial_rotary_factor", 1.0))
        kind = part.get("rope_type", part.get("type", "default"))
        if kind != "default":
            refuse_scaling(kind)
    base = everywhere.get("rope_theta", config.get("rope_theta", 1e6 if gemma else 1e4))
    local = config.get("rope_local_base_freq", _GEMMA_LOCAL_BASE)
    return base, nearby.get("rope_theta", local)


def _gate(config: Mapping[str, Any], gemma: bool) -> str:
    default = "gelu_pytorch_tanh" if gemma else "silu"
    name = config.get("hidden_activation" if gemma else "hidden_act") or default
    if name not in _GATES:
        raise ValueError(f"The gate of a Decoder is one of {tuple(_GATES)}; got {name!r}.")
    return _GATES[name]


def _check_scale(config: Mapping[str, Any], head_size: int) -> None:
    """Gemma's settings of attention and head that a decoder has no place for."""
    scale = config.get("query_pre_attn_scalar", 256)
    if scale != head_size:
        raise ValueError(
            "A Decoder scales its scores by the head size alone; got query_pre_attn_scalar="
            f"{scale} and head_dim={head_size}: choose a model in which they are equal."
        )
    for name in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if config.get(name):
            raise ValueError(
                f"A Decoder has no {name}; got {config[name]!r}: choose another model."
            )


def _global_every(config: Mapping[str, Any], depth: int) -> int:
    """Every how many layers one is global; the pattern must be regular."""
    kinds = config.get("layer_types")
    if kinds is None:
        return config.get("sliding_window_pattern") or _GEMMA_GLOBAL_EVERY
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    every = full[0] + 1 if full else depth + 1
    if len(kinds) != depth or full != list(range(every - 1, depth, every)):
        raise ValueError(
            "A Decoder has a global layer after every so many local ones; got layer_types with "
            f"global layers {full} among {depth}."
        )
    return every


def _gemma(window: int, local_base: float, every: int) -> dict[str, Any]:
    return {
        "local_window": window,
        "local_rope_base": local_base,
        "global_every": every,
        "query_key_norm": True,
        "post_norms": True,
        "scaled_embedding": True,
        "activation": "gelu",
    }


def _decoder(sizes: Mapping[str, Any], options: Mapping[str, Any]) -> Decoder:
    options = dict(options)
    fields = {field.name for field in dataclasses.fields(Decoder)} - {"parent", "name", "dtype"}
    known = fields | {"compute_dtype"}
    for name in options.keys() - known:
        raise ValueError(f"A Decoder has no attribute {name!r}; {nearest(name, known)}")
    compute = options.pop("compute_dtype", jnp.float32)
    return Decoder(**{**sizes, **options}, dtype=compute)


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"A Decoder's sizes need {name!r}, which the metadata of the file lacks.")
    return fields[name]


def _check_form(form: str, known: Sequence[str]) -> None:
    if form not in known:
        raise ValueError(
            f"A Decoder is read from the architectures {tuple(known)}; got {form!r}. Build it from "
            "its sizes, or pass the model's own function to from_linen or from_nnx."
        )
