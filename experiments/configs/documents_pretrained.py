"""A pretrained decoder, with low-rank leaves adapted to each whole book and each file of code.

Command: ``python -m experiments.train --workdir=W
--config=experiments/configs/documents_pretrained.py``, which trains nothing and keeps the model
with its fresh low-rank leaves, then the same with ``experiments.adapt`` and
``experiments.report``. ``--config.model.source=FOLDER`` names another model: a folder of Hugging
Face, or a GGUF file. Its parts are a tuple of paths.

Cost: hours on one GPU with whole books; ``--config.data.chunks=48`` reads the first 3,072 tokens
of each. Data: JSON-lines files with a ``text``; ``data.validation`` and ``data.reported``.

Expect: fewer bits per byte the longer a document is; little in its first thousand tokens.
"""

import ml_collections

from experiments.configs import documents

RATES = (1e-3, 3e-3)


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the decoder."""
    config = documents.get_config()
    config.data = ml_collections.ConfigDict(
        {
            "name": "books and code",
            "validation": ("data/text/books_val8_heldout_authors.jsonl.xz",),
            "reported": tuple(
                f"data/text/{name}.jsonl.xz"
                for name in ("books_test20_heldout_authors", "code_c", "code_python")
            ),
        }
        | {"chunk": 64, "chunks": 16384, "window": 1024, "sinks": 4, "least": 4096, "most": 64}
    )
    config.model = ml_collections.ConfigDict(
        {"name": "pretrained", "source": ("data/weights/smollm2-135m.gguf",), "dtype": "bfloat16"}
        | {"rank": 8, "alpha": 16.0, "paths": (".*/query", ".*/value", ".*/down")}
    )
    config.train.update({"num_steps": 0, "warmup_steps": 0, "steps_per_call": 1})
    config.adapt.batch_size = 32
    methods = documents.methods(config.data.window)
    del methods["low_rank"]
    for label in ("still", "document_ttt", "shared", "crossed"):
        methods[label].update({"optimizer": "adam", "b2": 0.95, "eps": 1e-10, "select": "lora"})
    methods.document_ttt.learning_rate = methods.shared.learning_rate = RATES
    methods.crossed.learning_rate = RATES[-1]
    config.methods = methods
    return config


def sweep(add) -> None:
    """A trial per chunk size and rank, whose factor ``alpha / rank`` stays 2."""
    for chunk in (32, 64, 256):
        for rank in (8, 32):
            add(**{"data.chunk": chunk, "model.rank": rank, "model.alpha": 2.0 * rank})
