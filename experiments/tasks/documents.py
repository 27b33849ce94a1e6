"""Documents in bits per byte: a byte-level decoder on the sources of Python's standard library.

A document is an instance, ``x = {"tokens": [T, L], "mask": [T, L]}``: T chunks of L bytes, each
scored before anything is learned from it. Nothing is downloaded.
"""

import dataclasses
import pathlib
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import ttt_jax as ttt
from experiments.config_keys import ABSENT, NEEDED, TEXT, Key, whole
from experiments.tasks.byte_decoder import ByteDecoder
from ttt_jax import metrics
from ttt_jax.task import Examples, Metric, Task

# Of the files, by a checksum of their names: eight tenths train.
_ROLES = {"train": range(8), "validation": range(8, 9), "reported": range(9, 10)}

# The keys that this task reads, beside those of all.
KEYS = {
    "data.folder": Key(TEXT, "a folder of *.py files, '' for the standard library", NEEDED),
    "data.chunk": Key(whole(2), "bytes of a chunk", NEEDED),
    "data.chunks": Key(whole(1), "chunks of a document", NEEDED),
    "data.most": Key(whole(1), "documents of a role, at most", ABSENT),
    "model.width": Key(whole(1), "of the residual stream", ABSENT),
    "model.depth": Key(whole(1), "number of blocks", ABSENT),
    "model.heads": Key(whole(1), "of attention", ABSENT),
}


def task(config: ml_collections.ConfigDict) -> Task:
    """The task of a config: ``data.chunk`` bytes L, ``data.chunks`` T, ``data.folder`` or "".

    Raises:
      ValueError: a folder with too few files.
    """
    chunk = config.data.chunk
    options = {name: value for name, value in config.model.items() if name != "name"}
    net = ByteDecoder(**options, length=chunk)

    def chunk_nats(params: Any, chunks: Any) -> jax.Array:
        """Nats of each chunk, ``{"tokens": [N, L], "mask": [N, L]} -> [N]``."""
        tokens, mask = chunks["tokens"], chunks["mask"]
        logits = net.apply(params, tokens).astype(jnp.float32)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return (nats * mask).sum(-1)

    def score(params: Any, documents: Any) -> jax.Array:
        """Nats of every chunk by the model as it is, ``[N, T]``."""
        return jax.vmap(lambda document: chunk_nats(params, document))(documents)

    def loss(params: Any, examples: Examples, key: jax.Array) -> jax.Array:
        return score(params, examples.x).sum() / jnp.maximum(examples.x["mask"].sum(), 1)

    documents = {role: _documents(config, role) for role in _ROLES}
    return Task(
        name="stdlib" if not config.data.folder else pathlib.Path(config.data.folder).name,
        init=lambda key: net.init(key, jnp.zeros((1, chunk), jnp.int32)),
        heads=lambda: {"score": score, "chunk_nats": chunk_nats},
        augment=None,
        loss=loss,
        training=lambda seed: _Training(documents["train"], config.train.batch_size, seed),
        streams=lambda role, seed: {"documents": _batches(documents[role], config)},
        metrics=_metrics(),
        chooses="bits_per_byte",
    )


def fingerprint(config: ml_collections.ConfigDict) -> dict[str, int]:
    """The bytes of the documents of every role; of which folder does not matter."""
    return {
        f"documents of {role}": zlib.crc32(_documents(config, role).x["tokens"].tobytes())
        for role in _ROLES
    }


def document_ttt(
    score: Callable[..., Any],
    chunk_nats: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation,
    select: ttt.Selection = ttt.select.everything(),  # noqa: B008 (immutable)
    num_steps: int = 1,
) -> ttt.Predictor:
    """Scores each chunk of a document, then learns from it; forgets at the document's end.

    Args:
      score: of documents, unused but for the source prediction.
      chunk_nats: ``(params, chunks) -> [N]``.
      optimizer: of the steps on the nats per byte of a chunk.
      select: what adapts.
      num_steps: steps per chunk.
    """
    del score

    def loss(params: Any, chunk: Any, key: jax.Array) -> jax.Array:
        nats = ttt.unbatched(chunk_nats)(params, chunk)
        return nats / jnp.maximum(chunk["mask"].sum(), 1)

    stream = ttt.online(
        ttt.gradient_adapter(loss, optimizer, select=select),
        ttt.unbatched(chunk_nats),
        num_steps=num_steps,
        reset=ttt.resets.never(),
        predict="before",
    )
    return ttt.unroll(stream)


def _metrics() -> dict[str, Metric]:
    def by_chunk(output: Any, source: Any, examples: Examples) -> tuple[Any, Any]:
        return np.asarray(output, np.float64) / np.log(2), examples.x["mask"].sum(-1)

    def late(output: Any, source: Any, examples: Examples) -> tuple[Any, Any]:
        bits, sizes = by_chunk(output, source, examples)
        half = bits.shape[-1] // 2
        return bits[:, half:].sum(-1), sizes[:, half:].sum(-1)

    def worse(output: Any, source: Any, examples: Examples) -> np.ndarray:
        return np.asarray(output).sum(-1) > np.asarray(source).sum(-1)

    return {
        "bits_per_byte": metrics.bits_per_byte(
            lambda nats: np.asarray(nats, np.float64).sum(-1), lambda examples: examples.y
        ),
        "bits_by_chunk": metrics.ratio(by_chunk),
        "late_bits_per_byte": metrics.ratio(late),
        "harmed": metrics.mean(worse),
    }


def _documents(config: ml_collections.ConfigDict, role: str) -> Examples:
    folder = pathlib.Path(config.data.folder or sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(folder.glob("*.py"))
        if path.is_file() and zlib.crc32(path.name.encode()) % 10 in _ROLES[role]
    ][: config.data.get("most", None)]
    if not files:
        raise ValueError(
            f"data.folder needs Python files of the role {role!r}; got {str(folder)!r} without "
            "any. Name a folder with at least a few dozen *.py files."
        )
    size = config.data.chunks * config.data.chunk
    shape = (len(files), config.data.chunks, config.data.chunk)
    tokens, mask = np.zeros((2, len(files), size), np.int32)
    for row, path in enumerate(files):
        content = np.frombuffer(path.read_bytes()[:size], np.uint8)
        tokens[row, : len(content)] = content
        mask[row, : len(content)] = 1
    tags = {"source": np.full(len(files), folder.name)}
    x = {"tokens": tokens.reshape(shape), "mask": mask.reshape(shape)}
    return Examples(np.arange(len(files)), x, mask.sum(-1), tags)


def _batches(documents: Examples, config: ml_collections.ConfigDict) -> list[Examples]:
    return list(ttt.task.in_batches([documents], config.adapt.batch_size))


@dataclasses.dataclass(frozen=True)
class _Training:
    """Training documents; see :class:`ttt_jax.task.TrainingData`."""

    documents: Examples
    batch_size: int
    seed: int

    def __iter__(self) -> Iterator[Examples]:
        return ttt.task.in_batches([self.documents], self.batch_size)

    def steps(self, start: int) -> Iterator[Examples]:
        """Random documents, the same ones at step k wherever it began."""
        step = start
        while True:
            rng = np.random.default_rng((self.seed, step))
            index = rng.integers(len(self.documents.id), size=self.batch_size)
            yield ttt.task.take(self.documents, index)
            step += 1
