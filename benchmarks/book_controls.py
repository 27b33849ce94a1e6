"""What does a document's own adapter save beside one that all share, and what does it forget?

``python -m benchmarks.book_controls --tokens=T --weights=W --out=FILE`` reads the first tokens of
the documents of :mod:`benchmarks.books`, whose file of token ids it takes, under the setting that
was chosen there: without adapting, with an adapter per document, with one adapter that learns from
all documents of a role side by side, and under the adapter of another document, learned to its end.
``--settings=NAMES`` tries settings on the validation books first, for the record alone.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

import ttt_jax as ttt
from benchmarks import books, options
from experiments import launch, provenance
from experiments.tasks import document_controls
from ttt_jax import methods, models

WAYS = ("sliding", "adapted", "shared", "crossed")


def documents_of(settings: Any, role: str) -> list[np.ndarray]:
    """The first tokens of the documents that have as many, at most ``--documents`` of them.

    Raises:
      UserError: fewer than two, so that no document has another one's adapter.
    """
    rows = books.read_tokens(settings.tokens, role)
    least, most = (2, 3) if settings.smoke else (settings.least, settings.documents)
    long = [row[: settings.first] for row in rows if len(row) >= least][:most]
    if len(long) < 2:
        raise launch.UserError(
            f"--least must leave two documents of {role}; got {least}, which leaves {len(long)} of "
            f"{len(rows)}."
        )
    return long


def stacked(documents: Sequence[np.ndarray], rows: int, chunk: int, chunks: int) -> Any:
    """Tokens and mask ``[rows, chunks, chunk]``; rows beyond the documents repeat the last one."""
    documents = [*documents, *[documents[-1]] * (rows - len(documents))]
    tokens = np.zeros((rows, chunks * chunk), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = document
        mask[row, : len(document)] = True
    shape = (rows, chunks, chunk)
    return {"tokens": tokens.reshape(shape), "mask": mask.reshape(shape)}


def ways_of(model: books.Model, setting: books.Setting, rate: float) -> dict[str, Callable]:
    """By name, ``(params, x, key) -> nats [N, T, L]`` of documents side by side."""
    read = models.reader(model.module)
    optimizer = books.optimizer_of(setting.optimizer, rate)
    each = ttt.batched(methods.document_ttt(read, optimizer=optimizer))
    still = ttt.batched(methods.document_ttt(read, num_steps=0))
    shared = document_controls.shared(read, optimizer=optimizer)
    crossed = document_controls.crossed(read, optimizer=optimizer)

    def apart(predict: Any) -> Callable:
        def run(params: Any, x: Any, key: Any) -> Any:
            keys = ttt.sample_keys(key, jax.numpy.arange(len(x["tokens"])))
            return predict(params, x, keys)[0]

        return run

    return {
        "sliding": apart(still),
        "adapted": apart(each),
        "shared": lambda params, x, key: shared.step(params, shared.init(params), x, key)[1][0],
        "crossed": lambda params, x, key: crossed(params, x, key)[0],
    }


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Reads all roles in all ways, and writes the record after each.

    Raises:
      UserError: an unknown way or setting, or a role without two documents.
    """
    launch.chosen("way", settings.ways, WAYS)
    launch.chosen("setting", (settings.setting, *settings.settings), books.SETTINGS)
    path = launch.new_file(out)
    with np.load(settings.tokens) as arrays:
        sizes = arrays["sizes"]
    model = books.load(settings)
    if settings.unroll:
        model = model._replace(module=model.module.clone(unroll=settings.unroll))
    record = provenance.of(settings) | {"sinks": books.SINKS, "rows": [], "seconds": {}}
    setting = books.SETTINGS[settings.setting]
    adapted = books.factors(model, setting)
    calls = {
        name: jax.jit(call)
        for name, call in ways_of(adapted, setting, settings.rate).items()
        if name in settings.ways
    }
    chosen = {role: documents_of(settings, role) for role in settings.roles}
    # One shape for all roles, so that each way is compiled once.
    count = max(map(len, chosen.values()))
    chunks = -(-settings.first // setting.chunk)
    for role, documents in chosen.items():
        x = stacked(documents, count, setting.chunk, chunks)
        scores = {}
        for name, call in calls.items():
            begin = time.perf_counter()
            nats = np.asarray(call(adapted.params, x, jax.random.key(2)))
            record["seconds"][f"{role} {name}"] = time.perf_counter() - begin
            scores[name] = nats.reshape(count, -1)
        for row, document in enumerate(documents):
            bits = {
                name: books.bits_per_byte(nats[row, : len(document)], document, sizes)
                for name, nats in scores.items()
            }
            record["rows"].append({"role": role, "tokens": len(document)} | bits)
        launch.write_json(path, record)
        print(line_of(record, role), flush=True)
    if settings.settings:
        record["choices"] = books.choose(model, settings, sizes)
        launch.write_json(path, record)
    return record


def line_of(record: dict[str, Any], role: str) -> str:
    """Means of a role, and what is saved over no adaptation."""
    rows = [row for row in record["rows"] if row["role"] == role]
    parts = [f"{role}, {len(rows)} documents:"]
    for name in WAYS:
        if name in rows[0]:
            bits = np.array([row[name] for row in rows])
            part = f"{name} {bits.mean():.4f}"
            if "sliding" in rows[0] and name != "sliding":
                saved = 100 * (1 - bits / np.array([row["sliding"] for row in rows]))
                part += f" ({saved.mean():+.2f} %, worse on {(saved < 0).sum()})"
            parts.append(part)
    return " ".join(parts)


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "tokens": flags.DEFINE_string("tokens", None, "The file of token ids."),
        "weights": flags.DEFINE_list("weights", [], "The GGUF file, or its parts."),
        "roles": flags.DEFINE_list("roles", ["books", "code_c", "code_python"], "What is read."),
        "ways": flags.DEFINE_list("ways", list(WAYS), "Which ways."),
        "setting": flags.DEFINE_string("setting", "linear_r32_c64", "What adapts and how."),
        "rate": flags.DEFINE_float("rate", 3e-4, "Step size.", 0.0),
        "first": flags.DEFINE_integer("first", 8192, "Tokens of a document at most.", 2),
        "least": flags.DEFINE_integer("least", 2048, "Tokens of a document at least.", 2),
        "documents": flags.DEFINE_integer("documents", 50, "Documents of a role at most.", 2),
        "window": flags.DEFINE_integer("window", 512, "Tokens that a token sees.", 2),
        "unroll": flags.DEFINE_integer("unroll", 0, "Layers of a program without a loop.", 0),
        "settings": flags.DEFINE_list("settings", [], "Tried on the validation books."),
        "validation": flags.DEFINE_integer("validation", 16384, "First tokens of a book.", 8),
        "choose_seconds": flags.DEFINE_float("choose_seconds", 160.0, "No setting is begun after."),
        "smoke": flags.DEFINE_bool("smoke", False, "A tiny random model, for a CPU."),
    }
    flags.mark_flags_as_required(["out", "tokens"])
    options.start(run, _FLAGS)
