"""Tokenizers of pretrained decoders, from their own files; needs ``tokenizers``."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import _arguments, _extras

__all__ = ["Tokenizer", "from_file", "from_gguf"]

# What a piece of a GGUF vocabulary is: a piece of text, a control token, text matched whole.
_NORMAL, _CONTROL, _WHOLE = 1, 3, 4
# Pieces that merges do not cross, of llama.cpp's pre-tokenizer of this name (src/llama-vocab.cpp).
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"


class Tokenizer(NamedTuple):
    """Text to token ids and back.

    Attributes:
      inner: a ``tokenizers.Tokenizer``.
      bos: the id that begins a text, None for a model without.
      eos: the id that ends one, None where the file names none.
      sizes: int32 ``[V]``, UTF-8 bytes of each token's text; 0 for control tokens. Over the ids of
        a text they add up to its bytes (and 1, with a tokenizer that puts a space before it).
    """

    inner: Any
    bos: int | None
    eos: int | None
    sizes: np.ndarray

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """The ids of a text, without ``bos``.

        Args:
          text: any text.
          control: whether the names of control tokens in it become those tokens, as a chat's
            template needs; text of others should not be able to.
        """
        self.inner.encode_special_tokens = not control
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=True)


@_arguments.checked(path=_arguments.path)
def from_file(path: str | pathlib.Path) -> Tokenizer:
    """Reads a ``tokenizer.json`` of Hugging Face, and the names in the file beside it.

    Args:
      path: of ``tokenizer.json``; ``tokenizer_config.json`` beside it names ``bos`` and ``eos``.
        Many name a ``bos`` that no text of the training began with: it is None unless
        ``add_bos_token`` is true there or, where that is left out, ``tokenizer.json`` puts it
        before a text.

    Raises:
      ImportError: ``tokenizers`` is missing.
      ValueError: no such file.
    """
    library = _extras.load("tokenizers", "language")
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(
            f"path must be a file tokenizer.json; got {str(path)!r}: name the file itself."
        )
    inner = library.Tokenizer.from_file(str(path))
    # A file may carry those of a training: a document is neither cut nor filled.
    inner.no_truncation()
    inner.no_padding()
    beside = path.with_name("tokenizer_config.json")
    names = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}

    def id_of(name: str) -> int | None:
        token = names.get(name)
        token = token["content"] if isinstance(token, Mapping) else token
        return None if token is None else inner.token_to_id(token)

    bos = id_of("bos_token")
    begins = names.get("add_bos_token")
    if begins is None:
        begins = inner.encode("", add_special_tokens=True).ids[:1] == [bos]
    added = inner.get_added_tokens_decoder()
    control = {index for index, token in added.items() if token.special}
    bytewise = "ByteLevel" in str(inner.decoder)
    size = inner.get_vocab_size(with_added_tokens=True)
    pieces = [inner.id_to_token(index) or "" for index in range(size)]
    whole = {index for index in added if index not in control}
    return Tokenizer(
        inner, bos if begins else None, id_of("eos_token"), _sizes(pieces, control, whole, bytewise)
    )


@_arguments.checked()
def from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      fields: the file's metadata; the names that begin with ``tokenizer.ggml.`` are read.

    Raises:
      ImportError: ``tokenizers`` is missing.
      ValueError: metadata without a vocabulary; another kind of vocabulary, or another
        pre-tokenizer, than is known.
    """
    library = _extras.load("tokenizers", "language")

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    ranks = "scores" if get("model") == "llama" else "merges"
    for name in ("model", "tokens", "token_type", ranks):
        if get(name) is None:
            raise ValueError(
                f"fields must have tokenizer.ggml.{name}; got a {type(fields).__name__} of "
                f"{sorted(fields)[:4]}: pass the metadata of a GGUF file."
            )
    pieces, kinds = get("tokens"), get("token_type")
    control = {index for index, kind in enumerate(kinds) if kind == _CONTROL}
    whole = {index for index, kind in enumerate(kinds) if kind == _WHOLE}
    by_score = get("model") == "llama"
    if by_score:
        inner = _by_score(library, pieces, kinds, get("scores"), get("add_space_prefix", True))
    elif get("model") == "gpt2":
        inner = _bytewise(library, pieces, get("merges"), get("pre"))
    else:
        raise ValueError(
            "The tokenizer of a GGUF file must be of the kind 'gpt2' or 'llama'; got "
            f"{get('model')!r}. Pass tokenizer.json of the same model to tokenizers.from_file."
        )
    add = library.AddedToken
    inner.add_tokens([add(pieces[index], normalized=False) for index in sorted(whole)])
    inner.add_special_tokens(
        [add(pieces[i], special=True, normalized=False) for i in sorted(control)]
    )
    bos = get("bos_token_id") if get("add_bos_token", by_score) else None
    return Tokenizer(inner, bos, get("eos_token_id"), _sizes(pieces, control, whole, not by_score))


def _bytewise(library: Any, pieces: Sequence[str], merges: Sequence[str], pre: str) -> Any:
    """Byte-level BPE, by the order of its merges."""
    model = library.models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge.split(" ")) for merge in merges],
    )
    inner = library.Tokenizer(model)
    before = library.pre_tokenizers
    if pre == "smollm":
        steps = [
            before.Digits(individual_digits=True),
            before.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    elif pre == "qwen2":
        steps = [
            before.Split(library.Regex(_QWEN2), "isolated"),
            before.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        raise ValueError(
            "The pre-tokenizer of a GGUF file must be one of ('smollm', 'qwen2'); got "
            f"{pre!r}. Pass tokenizer.json of the same model to tokenizers.from_file."
        )
    inner.pre_tokenizer = before.Sequence(steps)
    inner.decoder = library.decoders.ByteLevel()
    return inner


def _by_score(
    library: Any,
    pieces: Sequence[str],
    kinds: Sequence[int],
    scores: Sequence[float],
    prefix: bool,
) -> Any:
    """SentencePiece's BPE: of neighbors, those are joined whose union has the best score.

    A text is not split into words first: some pieces hold a space inside. With ``prefix`` it
    begins with a space, which decoding takes away.
    """
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    joined = [
        (-score, piece[:cut], piece[cut:])
        for piece, kind, score in zip(pieces, kinds, scores, strict=True)
        if kind == _NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    joined.sort(key=lambda merge: merge[0])
    model = library.models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for _, left, right in joined],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    inner = library.Tokenizer(model)
    normalizers = library.normalizers
    space = normalizers.Replace(" ", _SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(" "), space]) if prefix else space
    decoders = library.decoders
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return inner


def _sizes(pieces: Sequence[str], control: set[int], whole: set[int], bytewise: bool) -> np.ndarray:
    """UTF-8 bytes of each token; a character of a byte-level piece stands for one byte."""

    def size(index: int, piece: str) -> int:
        if index in control:
            return 0
        if index in whole:
            return len(piece.encode())
        if bytewise:
            return len(piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return 1
        return len(piece.replace(_SPACE, " ").encode())

    return np.array([size(index, piece) for index, piece in enumerate(pieces)], np.int32)
