"""A tiny Llama as a folder of Hugging Face, and documents as JSON lines, for configs."""

import json

import numpy as np
import safetensors.numpy
import tokenizers

WIDTH, LAYERS, VOCABULARY = 16, 2, 256


def write(folder, seed=0):
    """``config.json``, weights and ``tokenizer.json``; returns the folder as text."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)

    def weights(*shape):
        return draw.normal(0, 0.2, shape).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": weights(VOCABULARY, WIDTH),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    shapes = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (WIDTH, WIDTH)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (WIDTH // 2, WIDTH)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (2 * WIDTH, WIDTH)),
        "mlp.down_proj": (WIDTH, 2 * WIDTH),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = weights(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = {
        **{"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"intermediate_size": 2 * WIDTH, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
        **{"max_position_embeddings": 512, "tie_word_embeddings": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    pieces = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({piece: index for index, piece in enumerate(pieces)}, [])
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    return str(folder)


def write_texts(path, lengths, seed=0):
    """Documents of so many characters each; returns the path as text."""
    draw = np.random.default_rng(seed)
    letters = np.array([*"abcdefgh "])
    with open(path, "w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            text = "".join(draw.choice(letters, length))
            file.write(json.dumps({"title": f"title {number}", "text": text}) + "\n")
    return str(path)


def stand_in(config, folder):
    """The files that a config of documents names, tiny ones in a folder."""
    if config.model.name != "pretrained":
        return
    config.model.source = (write(folder / "model"),)
    config.model.dtype = "float32"
    for number, role in enumerate(("validation", "reported")):
        config.data[role] = (write_texts(folder / f"{role}.jsonl", (30, 41, 60), seed=number),)
    config.data.least = 2
    config.train.update({"num_steps": 0, "warmup_steps": 0})
