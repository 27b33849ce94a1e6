"""Tokenizers of files against merges that are written out here, one join at a time."""

import collections
import itertools
import json
import re

import numpy as np
import pytest

from ttt_jax.data import tokenizers

pytest.importorskip("tokenizers", reason="tokenizers of files need tokenizers")

SPACE = "\u2581"
TRAINING = "the cat's hat and the other cats of the house, that 1234 hats cost them 12 34\n\n\tif"
TEXTS = (
    "",
    "the cat's hat",
    "  the  hats   12 3456, the\tother\n\n\nif  \n\n  x = 1\n",
    "日本語のテキスト, 漢字 and naïve café",
    "🙂🙃 the 👩‍👩‍👧 cats\r\nthat\u00a0house ",
    "<|im_start|>the<0x41> <|im_end|>",
)
CONTROL = ("<|im_start|>", "<|im_end|>")


def byte_letters():
    """The printable letter of each byte in a byte-level vocabulary (Radford et al., 2019)."""
    own = [b for b in range(256) if chr(b).isprintable() and b != 32 and not 127 <= b < 161]
    own = [b for b in own if b != 173]
    others = itertools.count(256)
    return {b: chr(b) if b in own else chr(next(others)) for b in range(256)}


LETTERS = byte_letters()
WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words_of(text, pre):
    parts = re.split(r"(\d)", text) if pre == "smollm" else [text]
    pattern = WORD if pre == "smollm" else QWEN2
    return [word for part in parts for word in re.findall(pattern, part)]


def joined(symbols, rank):
    """Joins the pair of lowest rank, the first of equals, until no pair has a rank."""
    symbols = list(symbols)
    while True:
        ranks = [rank(left, right) for left, right in itertools.pairwise(symbols)]
        known = [number for number in ranks if number is not None]
        if not known:
            return symbols
        place = ranks.index(min(known))
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]


def bytewise_fields(pre):
    """A byte-level vocabulary whose merges come from a text, the most frequent pair first."""
    words = [[LETTERS[b] for b in word.encode()] for word in words_of(TRAINING, pre)]
    merges = []
    for _ in range(25):
        pairs = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = [joined(word, lambda *pair: 0 if pair == merges[-1] else None) for word in words]
    pieces = [*CONTROL, *LETTERS.values(), *dict.fromkeys(map("".join, merges))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(pieces) - len(CONTROL)),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


WHOLE = ["  ", "   ", "\n\n", "\t"]


def scored_fields():
    """A vocabulary by score: bytes, letters, substrings of a text, one with a space inside."""
    rng = np.random.default_rng(0)
    text = (TRAINING + " 日本語の").replace(" ", SPACE)
    letters = sorted(set(text) - set("\n\t"))
    starts = rng.integers(0, len(text) - 5, 120)
    longer = {text[start : start + rng.integers(2, 6)] for start in starts}
    longer = sorted({piece for piece in longer if not set(piece) & set("\n\t")})
    control = ["<unk>", "<bos>", "<eos>", *CONTROL]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    pieces = control + bytes_ + WHOLE + letters + longer
    kinds = [3] * len(control) + [6] * 256 + [4] * len(WHOLE) + [1] * len(letters + longer)
    scores = np.zeros(len(pieces))
    scores[-len(longer) :] = -rng.permutation(len(longer)) - 1.0
    assert any(SPACE in piece[1:] for piece in longer)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores.tolist(),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }


FIELDS = {
    "smollm": bytewise_fields("smollm"),
    "qwen2": bytewise_fields("qwen2"),
    "by score": scored_fields(),
}
TOKENIZERS = {name: tokenizers.from_gguf(fields) for name, fields in FIELDS.items()}
KINDS = pytest.mark.parametrize("kind", FIELDS)


def slow_ids(kind, text):
    fields = FIELDS[kind]
    ids = {piece: index for index, piece in enumerate(fields["tokenizer.ggml.tokens"])}
    if kind != "by score":
        ranks = {merge: rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
        pieces = [
            piece
            for word in words_of(text, kind)
            for piece in joined(
                [LETTERS[b] for b in word.encode()], lambda *pair: ranks.get(" ".join(pair))
            )
        ]
        return [ids[piece] for piece in pieces]
    normal = {
        piece: -score
        for piece, score, kind in zip(
            fields["tokenizer.ggml.tokens"],
            fields["tokenizer.ggml.scores"],
            fields["tokenizer.ggml.token_type"],
            strict=True,
        )
        if kind == 1
    }
    out = []
    split = "|".join(map(re.escape, sorted(WHOLE, key=len, reverse=True)))
    for part in re.split(f"({split})", text):
        if part in WHOLE:
            out.append(ids[part])
            continue
        symbols = joined(part.replace(" ", SPACE), lambda *pair: normal.get("".join(pair)))
        for symbol in symbols:
            if symbol in normal:
                out.append(ids[symbol])
            else:
                out += [ids[f"<0x{b:02X}>"] for b in symbol.encode()]
    return out


@KINDS
@pytest.mark.parametrize("text", [*TEXTS, TRAINING])
def test_ids_are_those_of_a_slow_merge(kind, text):
    ids = TOKENIZERS[kind].encode(text)
    assert ids == slow_ids(kind, text)


@KINDS
def test_something_is_merged(kind):
    assert len(TOKENIZERS[kind].encode(TRAINING)) < 0.7 * len(TRAINING)


@KINDS
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_and_sizes_add_up_to_its_bytes(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.sizes[ids].sum() == len(text.encode())


@KINDS
def test_a_text_of_others_holds_no_control_tokens(kind):
    tokenizer = TOKENIZERS[kind]
    first = FIELDS[kind]["tokenizer.ggml.tokens"].index(CONTROL[0])
    text = f"{CONTROL[0]}the cat{CONTROL[1]}"
    assert not {first, first + 1} & set(tokenizer.encode(text))
    marked = tokenizer.encode(text, control=True)
    assert (marked[0], marked[-1]) == (first, first + 1)
    assert marked[1:-1] == tokenizer.encode("the cat")
    # Control tokens have no text of their own.
    assert tokenizer.decode(marked) == "the cat"
    assert tokenizer.sizes[marked].sum() == len("the cat")


def test_half_a_character_is_replaced():
    tokenizer = TOKENIZERS["smollm"]
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_bos_is_that_of_the_file():
    assert (TOKENIZERS["smollm"].bos, TOKENIZERS["smollm"].eos) == (None, 1)
    assert (TOKENIZERS["by score"].bos, TOKENIZERS["by score"].eos) == (1, 2)
    added = FIELDS["smollm"] | {"tokenizer.ggml.add_bos_token": True}
    assert tokenizers.from_gguf(added).bos == 0


def test_a_leading_space_where_the_file_asks_for_one():
    fields = dict(FIELDS["by score"])
    # Without the field there is one, as in Llama 2's files.
    del fields["tokenizer.ggml.add_space_prefix"]
    tokenizer = tokenizers.from_gguf(fields)
    ids = tokenizer.encode("the cat")
    assert ids == slow_ids("by score", " the cat")
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.sizes[ids].sum() == len("the cat") + 1


@KINDS
def test_a_tokenizer_json_reads_alike(kind, tmp_path):
    tokenizer, pieces = TOKENIZERS[kind], FIELDS[kind]["tokenizer.ggml.tokens"]
    tokenizer.inner.enable_truncation(4)
    tokenizer.inner.enable_padding(length=9)
    try:
        tokenizer.inner.save(str(tmp_path / "tokenizer.json"))
    finally:
        tokenizer.inner.no_truncation()
        tokenizer.inner.no_padding()
    alone = tokenizers.from_file(tmp_path / "tokenizer.json")
    assert (alone.bos, alone.eos) == (None, None)
    names = {"bos_token": {"content": pieces[1]}, "eos_token": pieces[2], "pad_token": None}
    # Named alone it begins no text; the file beside or the tokenizer itself may say that it does.
    for more, bos in (({}, None), ({"add_bos_token": False}, None), ({"add_bos_token": True}, 1)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | more))
        read = tokenizers.from_file(tmp_path / "tokenizer.json")
        assert (read.bos, read.eos) == (bos, 2)
    np.testing.assert_array_equal(read.sizes, tokenizer.sizes)
    for text in TEXTS:
        assert read.encode(text) == tokenizer.encode(text)
        assert read.decode(read.encode(text)) == text


def test_a_tokenizer_json_that_puts_bos_before_a_text_has_one(tmp_path):
    library = pytest.importorskip("tokenizers")
    tokenizer, pieces = TOKENIZERS["by score"], FIELDS["by score"]["tokenizer.ggml.tokens"]
    tokenizer.inner.post_processor = library.processors.TemplateProcessing(
        single=f"{pieces[1]} $A", special_tokens=[(pieces[1], 1)]
    )
    try:
        tokenizer.inner.save(str(tmp_path / "tokenizer.json"))
    finally:
        tokenizer.inner.post_processor = library.processors.Sequence([])
    names = {"bos_token": pieces[1]}
    for more, bos in (({}, 1), ({"add_bos_token": False}, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | more))
        read = tokenizers.from_file(tmp_path / "tokenizer.json")
        assert read.bos == bos and read.encode("ab") == tokenizer.encode("ab")


def refusal(fields):
    with pytest.raises(ValueError) as error:
        tokenizers.from_gguf(fields)
    return str(error.value)


def test_what_is_not_known_is_refused(tmp_path):
    smollm = FIELDS["smollm"]
    assert "got 'bert'" in refusal(smollm | {"tokenizer.ggml.model": "bert"})
    assert "got 'tekken'" in refusal(smollm | {"tokenizer.ggml.pre": "tekken"})
    assert "tokenizer.ggml.merges" in refusal(
        {name: value for name, value in smollm.items() if not name.endswith("merges")}
    )
    assert "tokenizer.ggml.model" in refusal({"general.name": "none"})
    with pytest.raises(ValueError, match=re.escape(repr(str(tmp_path)))):
        tokenizers.from_file(tmp_path)
