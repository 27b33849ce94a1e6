"""The variables of a :class:`ttt_jax.models.Decoder` from tensors by their names in files."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ttt_jax.models.decoder import Decoder

# Leaf of a layer: its tensor in GGUF, in Llama's and Qwen2's files, and in Gemma 3's.
_LAYER = {
    "attention/query/kernel": ("attn_q.weight", "self_attn.q_proj.weight"),
    "attention/key/kernel": ("attn_k.weight", "self_attn.k_proj.weight"),
    "attention/value/kernel": ("attn_v.weight", "self_attn.v_proj.weight"),
    "attention/query/bias": ("attn_q.bias", "self_attn.q_proj.bias"),
    "attention/key/bias": ("attn_k.bias", "self_attn.k_proj.bias"),
    "attention/value/bias": ("attn_v.bias", "self_attn.v_proj.bias"),
    "attention/out/kernel": ("attn_output.weight", "self_attn.o_proj.weight"),
    "attention/query_norm/scale": ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    "attention/key_norm/scale": ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    "attention_norm/scale": ("attn_norm.weight", "input_layernorm.weight"),
    "mlp_norm/scale": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "mlp/gate/kernel": ("ffn_gate.weight", "mlp.gate_proj.weight"),
    "mlp/up/kernel": ("ffn_up.weight", "mlp.up_proj.weight"),
    "mlp/down/kernel": ("ffn_down.weight", "mlp.down_proj.weight"),
}
_POST = {
    "post_attention_norm/scale": ("post_attention_norm.weight", "post_attention_layernorm.weight"),
    "mlp_norm/scale": ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
    "post_mlp_norm/scale": ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
}
_TOP = {
    "embedding": ("token_embd.weight", "model.embed_tokens.weight"),
    "norm/scale": ("output_norm.weight", "model.norm.weight"),
    "head": ("output.weight", "lm_head.weight"),
}


class Source(NamedTuple):
    """Where tensors come from.

    Attributes:
      names: of all tensors.
      read: ``read(name) -> float32`` array.
      column: which of a leaf's names are the source's.
      layer: what precedes the names of a layer's tensors: a format of its index.
      norm_shift: what is added to the scales of norms.
    """

    names: Iterable[str]
    read: Callable[[str], np.ndarray]
    column: int
    layer: str
    norm_shift: float = 0.0


def from_gguf(names: Iterable[str], read: Callable[[str], np.ndarray]) -> Source:
    """Tensors by the names of llama.cpp."""
    return Source(names, read, 0, "blk.{}.")


def from_hugging_face(
    names: Iterable[str], read: Callable[[str], np.ndarray], *, norm_shift: float
) -> Source:
    """Tensors by the names of transformers; Gemma's scales are stored less one."""
    return Source(names, read, 1, "model.layers.{}.", norm_shift)


def variables(module: Decoder, source: Source, dtype: Any) -> dict[str, Any]:
    """The variables of a module.

    Raises:
      ValueError: a tensor that is missing, that has another shape than the module's sizes make,
        or that the module has no place for.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    names = _names_of_leaves(module, source)
    known = set(source.names)
    unread = known.difference(*names.values())
    missing = sorted(set().union(*names.values()) - known)
    if missing:
        raise ValueError(
            f"The file has no tensor {missing[0]!r}, which a Decoder of these sizes needs "
            f"({len(missing)} are missing)."
        )
    if unread:
        raise ValueError(
            f"The file has tensors that a Decoder has no place for: {', '.join(sorted(unread)[:3])}"
            f" ({len(unread)} in all). It is another form; see ttt_jax.models.Decoder."
        )

    def leaf(path: str, shape: tuple[int, ...]) -> jax.Array:
        arrays = [_turned(path, source.read(name), source) for name in names[path]]
        whole = np.stack(arrays) if path.startswith("layers") else arrays[0]
        if whole.shape != shape:
            raise ValueError(
                f"The tensor {names[path][0]!r} makes a leaf {path!r} of shape {whole.shape}, and "
                f"a Decoder of these sizes needs {shape}: give the sizes of the file."
            )
        return jnp.asarray(whole, dtype)

    flat = traverse_util.flatten_dict(shapes, sep="/")
    made = {path: leaf(path, struct.shape) for path, struct in flat.items()}
    return {"params": traverse_util.unflatten_dict(made, sep="/")}


def _names_of_leaves(module: Decoder, source: Source) -> dict[str, list[str]]:
    """The tensors of each leaf: one, or one for each layer of its scan."""
    rows = _LAYER | _POST if module.post_norms else dict(_LAYER)
    if not module.biases:
        rows = {leaf: row for leaf, row in rows.items() if not leaf.endswith("bias")}
    if not module.query_key_norm:
        rows = {leaf: row for leaf, row in rows.items() if not leaf.startswith("attention/query_n")}
        rows = {leaf: row for leaf, row in rows.items() if not leaf.startswith("attention/key_n")}
    made = {
        leaf: [row[source.column]]
        for leaf, row in _TOP.items()
        if leaf != "head" or not module.tied
    }
    first = 0
    for stage, count in enumerate(module.stages or (module.depth,)):
        top = "layers" if module.stages is None else f"layers_{stage}"
        for leaf, row in rows.items():
            made[f"{top}/{leaf}"] = [
                source.layer.format(index) + row[source.column]
                for index in range(first, first + count)
            ]
        first += count
    return made


def _turned(path: str, array: np.ndarray, source: Source) -> np.ndarray:
    """Files have kernels ``[outputs, inputs]``."""
    if path.endswith("kernel"):
        return array.T
    return array + source.norm_shift if path.endswith("scale") else array
