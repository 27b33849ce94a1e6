"""Folders of Hugging Face: logits that torch computed, and what is refused."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ttt_jax import models

safetensors = pytest.importorskip("safetensors.numpy", reason="folders need safetensors")
# Written by write_decoders.py there: of transformers and torch.
FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
NAMES = ("llama", "qwen2", "gemma3")


@pytest.fixture(scope="module")
def loaded():
    return {name: models.load_hugging_face(FIXTURES / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_torch(loaded, name):
    module, params, tokenizer, called = loaded[name]
    with np.load(FIXTURES / name / "expected.npz") as expected:
        tokens, due = expected["tokens"].astype(np.int32), expected["logits"]
    assert tokenizer is None and called == name
    assert np.abs(due).max() > 1
    np.testing.assert_allclose(jax.jit(module.apply)(params, tokens), due, atol=1e-4)


def test_forms(loaded):
    """Tied and untied heads, shards and bfloat16 are all among the folders."""
    assert [loaded[name].module.tied for name in NAMES] == [False, True, True]
    assert "head" in loaded["llama"].params["params"]
    assert len(list((FIXTURES / "qwen2").glob("*.safetensors"))) == 3
    bias = loaded["qwen2"].params["params"]["layers"]["attention"]["query"]["bias"]
    np.testing.assert_array_equal(bias, bias.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.abs(bias).min() > 0
    gemma = loaded["gemma3"].module
    assert (gemma.local_window, gemma.global_every, gemma.local_rope_base) == (5, 3, 30.0)


@pytest.fixture
def copy(tmp_path):
    """``copy(name, tensors, **changes of config.json) -> folder``; a tensor None is left out."""

    def make(name, tensors=(), keep=lambda key: key, **changes):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config = json.loads((FIXTURES / name / "config.json").read_text())
        config = {key: value for key, value in {**config, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        stored = {}
        for file in (FIXTURES / name).glob("*.safetensors"):
            stored |= safetensors.load_file(file)
        stored = {key: array for key, array in {**stored, **dict(tensors)}.items()}
        stored = {keep(key): array for key, array in stored.items() if array is not None}
        safetensors.save_file(stored, folder / "model.safetensors")
        return folder

    return make


def same(left, right):
    left, right = (traverse_util.flatten_dict(tree, sep="/") for tree in (left, right))
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_the_text_part_of_a_larger_model(loaded, copy, prefix):
    config = json.loads((FIXTURES / "gemma3" / "config.json").read_text())

    def keep(key):
        if key.startswith("vision"):
            return key
        return prefix + (key.removeprefix("model.") if prefix.startswith("model") else key)

    vision = {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}
    folder = copy("gemma3", vision, keep, model_type="gemma3", text_config=config)
    read = models.load_hugging_face(folder)
    assert read.module == loaded["gemma3"].module
    assert same(read.params, loaded["gemma3"].params)


def test_older_configurations_read_alike(loaded, copy):
    """Before transformers 5 the rotary bases stood alone, and windows had a pattern."""
    folder = copy(
        "gemma3",
        rope_parameters=None,
        rope_theta=3000.0,
        rope_local_base_freq=30.0,
        layer_types=None,
        sliding_window_pattern=3,
    )
    assert models.load_hugging_face(folder).module == loaded["gemma3"].module
    # A tied head that is stored all the same is that of the embedding.
    embedding = np.zeros((48, 16), np.float32)
    folder = copy("qwen2", {"lm_head.weight": embedding}, rope_parameters=None, rope_theta=2000.0)
    read = models.load_hugging_face(folder, dtype=jnp.bfloat16, stages=(1, 1))
    last = read.params["params"]["layers_1"]["attention"]["query"]["bias"]
    assert last.dtype == jnp.bfloat16
    whole = loaded["qwen2"].params["params"]["layers"]["attention"]["query"]["bias"]
    np.testing.assert_array_equal(last.astype(jnp.float32), whole[1:])


def refusal(folder, **options):
    with pytest.raises(ValueError) as error:
        models.load_hugging_face(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_scaled_positions_are_refused(copy):
    for scaling in (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}},
    ):
        kind = {**next(iter(scaling.values()))}
        name = kind.get("rope_type", kind.get("type"))
        message = refusal(copy("llama", **scaling))
        assert f"scaling {name!r}" in message and "without" in message
    plain = {"rope_type": "default", "rope_theta": 30.0}
    scaled = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 8.0}
    for place in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
    ):
        assert "turns 0.5 of them" in refusal(copy("llama", **place))
    rope = {"full_attention": scaled, "sliding_attention": plain}
    assert "scaling 'linear'" in refusal(copy("gemma3", rope_parameters=rope))


def test_what_a_decoder_has_no_place_for_is_refused(copy):
    for name, changes, words in (
        ("llama", {"model_type": "mistral"}, "got 'mistral'"),
        ("llama", {"hidden_act": "relu"}, "got 'relu'"),
        ("llama", {"vocab_size": None}, "'vocab_size'"),
        ("llama", {"intermediate_size": 32}, "(2, 32, 16)"),
        ("llama", {"num_hidden_layers": 1}, "no place for: model.layers.1."),
        ("llama", {"num_hidden_layers": 3}, "no tensor 'model.layers.2."),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("gemma3", {"query_pre_attn_scalar": 6}, "query_pre_attn_scalar=6"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, "[0]"),
    ):
        assert words in refusal(copy(name, **changes)), (name, changes)
    bias = {"model.layers.0.self_attn.o_proj.bias": np.ones(16, np.float32)}
    assert "o_proj.bias" in refusal(copy("llama", bias, attention_bias=True))
    assert "did you mean 'sinks'" in refusal(FIXTURES / "llama", sink=4)


def test_missing_files_are_named(tmp_path):
    assert "config.json" in refusal(tmp_path)
    shutil.copytree(FIXTURES / "qwen2", tmp_path / "qwen2")
    (tmp_path / "qwen2" / "model-00002-of-00003.safetensors").unlink()
    assert "names 'model-00002-of-00003.safetensors'" in refusal(tmp_path / "qwen2")


def test_dtypes_that_are_none_of_parameters_are_refused():
    for dtype in (jnp.int32, "wide", 3):
        with pytest.raises(TypeError, match="dtype must be a floating dtype"):
            models.load_hugging_face(FIXTURES / "llama", dtype=dtype)
