"""Documents in bits per byte, by a byte-level decoder trained here or by a pretrained one.

A document is an instance, ``x = {"tokens": [T, L], "mask": [T, L]}``: T chunks of L tokens, each
scored before anything is learned from it. Without ``data.folder`` the documents are the sources of
Python's standard library, and nothing is downloaded.
"""

import dataclasses
import functools
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

import ttt_jax as ttt
from experiments.config_keys import ABSENT, NEEDED, TEXT, Key, Rule, among, number, whole
from experiments.tasks import document_files, document_metrics
from experiments.tasks.document_files import Source, Vocabulary
from ttt_jax import models
from ttt_jax.readers import Reader
from ttt_jax.task import Examples, Task

_PATHS = Rule(
    "be a path, or a tuple of paths",
    lambda value: (
        isinstance(value, str)
        or (
            isinstance(value, tuple | list)
            and len(value) > 0
            and all(isinstance(path, str) for path in value)
        )
    ),
)
# The keys that this task reads, beside those of all.
KEYS = {
    "data.folder": Key(TEXT, "a folder of text files, '' for the standard library's", ABSENT),
    "data.files": Key(TEXT, "which files of a folder, a pattern", "*.py"),
    "data.train": Key(_PATHS, "folders or JSON-lines files, instead of data.folder", ABSENT),
    "data.validation": Key(_PATHS, "the same, of the documents that choose settings", ABSENT),
    "data.reported": Key(_PATHS, "the same, of the reported documents", ABSENT),
    "data.chunk": Key(whole(2), "tokens of a chunk", NEEDED),
    "data.chunks": Key(whole(1), "chunks of a document at most; left out: whole", ABSENT),
    "data.window": Key(whole(1), "tokens that a token sees, itself among them", NEEDED),
    "data.sinks": Key(whole(0), "first tokens that are seen beside the window", 4),
    "data.least": Key(whole(2), "documents of fewer tokens are left out", 2),
    "data.most": Key(whole(1), "documents of a stream, at most", ABSENT),
    "model.name": Key(
        among("byte_decoder", "pretrained"), "byte_decoder, trained here, or pretrained", NEEDED
    ),
    "model.width": Key(whole(1), "of the residual stream", ABSENT, ("model.name", "byte_decoder")),
    "model.depth": Key(whole(1), "number of layers", ABSENT, ("model.name", "byte_decoder")),
    "model.heads": Key(whole(1), "of attention", ABSENT, ("model.name", "byte_decoder")),
    "model.source": Key(
        _PATHS,
        "a GGUF file, its parts, or a Hugging Face folder",
        ABSENT,
        ("model.name", "pretrained"),
    ),
    "model.dtype": Key(
        among("float32", "bfloat16"), "in which a pretrained model computes", "float32"
    ),
    "model.rank": Key(whole(1), "of low-rank leaves beside model.paths; left out: none", ABSENT),
    "model.alpha": Key(number(0), "their factor is alpha / rank; left out: the rank", ABSENT),
    "model.paths": Key(
        _PATHS, "modules with low-rank leaves, regular expressions", (".*/query", ".*/value")
    ),
    "train.num_steps": Key(whole(0), "steps of a training; 0 for a pretrained model", NEEDED),
    "train.length": Key(whole(2), "tokens of a training sequence", 256),
}

# Settings of methods that say how the model reads.
HEAD_KEYS = {
    "window": Key(whole(1), "tokens that a token sees; left out: data.window", ABSENT),
    "cache": Key(
        among("kept", "recomputed", "isolated"),
        "keys of older weights are kept or made anew, or nothing is seen outside of a window",
        ABSENT,
    ),
}


def check_config(config: ml_collections.ConfigDict) -> None:
    """Refuses a byte-level decoder without training, and documents of no role.

    Raises:
      ValueError: naming the keys.
    """
    if config.model.name == "byte_decoder" and config.train.num_steps < 1:
        raise ValueError(
            "train.num_steps must be at least 1 for model.name='byte_decoder', which is trained "
            f"here; got {config.train.num_steps}."
        )
    named = [role for role in ("validation", "reported") if role in config.data]
    if named and len(named) < 2 and "folder" not in config.data:
        raise ValueError(
            f"data.validation and data.reported must both be there, or data.folder; got {named}."
        )


def task(config: ml_collections.ConfigDict) -> Task:
    """The task of a config; documents are read when a role is.

    Raises:
      ValueError: a file or folder without documents; of a model what ``ttt_jax.models`` refuses.
    """
    vocabulary, module, init = _model(config)
    documents = functools.cache(lambda role: _documents(config, role, vocabulary))
    sinks, chunk = config.data.get("sinks", KEYS["data.sinks"].default), config.data.chunk

    def heads(window: int | None = None, cache: str = "kept") -> dict[str, Any]:
        width = window or config.data.window
        seen = module.clone(window=width, sinks=sinks)
        if cache == "isolated":
            score = _isolated(seen, width, vocabulary.bos)
            return {"score": score, "bos": vocabulary.bos, "text": vocabulary.decode}
        read = models.reader(seen)
        if cache == "recomputed":
            # Without the module's window: all see what is read anew first, as they see sinks.
            apply = models.from_linen(module)
            read = ttt.readers.recomputed(apply, context=max(width - chunk, 1))
        still = ttt.methods.document_ttt(read, num_steps=0, bos=vocabulary.bos)

        def score(params: Any, documents: Any) -> jax.Array:
            """Nats of every token by the model as it is, ``[N, T, L]``."""
            key = jax.random.key(0)
            return jax.vmap(lambda document: still(params, document, key)[0])(documents)

        return {
            "score": score,
            "read": read,
            "bos": vocabulary.bos,
            "text": vocabulary.decode,
        }

    # A longer window than data.window, a control, must be no surprise to the model.
    trained = ttt.losses.next_token(models.from_linen(module), batch=True)

    def loss(params: Any, examples: Examples, key: jax.Array) -> jax.Array:
        count = examples.x["tokens"].shape[0]
        flat = {name: leaf.reshape(count, -1) for name, leaf in examples.x.items()}
        if vocabulary.bos is not None:
            first = {"tokens": vocabulary.bos, "mask": 1}
            flat = {
                name: jnp.pad(leaf, ((0, 0), (1, 0)), constant_values=first[name])
                for name, leaf in flat.items()
            }
        return trained(params, flat, key)

    def streams(role: str, seed: int) -> dict[str, list[Examples]]:
        role = "validation" if role == "choosing" else role
        made, first = {}, 0
        for name, held in documents(role).items():
            made[name] = document_files.batches(
                held, vocabulary, chunk=chunk, size=config.adapt.batch_size, first=first
            )
            first += len(held)
        return made

    return Task(
        name=config.data.name,
        init=init,
        heads=heads,
        augment=None,
        loss=loss,
        training=lambda seed: _Training(
            lambda: [document.ids for held in documents("train").values() for document in held],
            config.train.batch_size,
            config.train.get("length", KEYS["train.length"].default),
            seed,
        ),
        streams=streams,
        metrics=document_metrics.of(vocabulary),
        chooses="bits_per_byte",
    )


def fingerprint(config: ml_collections.ConfigDict) -> dict[str, int]:
    """The files of every role that has some; of which folder they are does not matter."""
    return {
        f"documents of {role}": sum(source.checksum() for source in _sources(config, role))
        for role in document_files.ROLES
        if role in config.data or _folder(config) is not None
    }


def _folder(config: ml_collections.ConfigDict) -> pathlib.Path | None:
    if "folder" not in config.data:
        return None
    return pathlib.Path(config.data.folder or sysconfig.get_paths()["stdlib"])


def _sources(config: ml_collections.ConfigDict, role: str) -> list[Source]:
    pattern = config.data.get("files", KEYS["data.files"].default)
    if role in config.data:
        return [Source(pathlib.Path(path), pattern) for path in _several(config.data[role])]
    folder = _folder(config)
    if folder is None:
        raise ValueError(
            f"There are no documents of the role {role!r}; set data.{role} or data.folder."
        )
    return [Source(folder, pattern, role)]


def _several(value: Any) -> Sequence[str]:
    return (value,) if isinstance(value, str) else tuple(value)


def _documents(
    config: ml_collections.ConfigDict, role: str, vocabulary: Vocabulary
) -> dict[str, list[document_files.Document]]:
    """By name of their source; training documents are whole."""
    longest = config.data.get("chunks", None)
    if longest is not None:
        longest *= config.data.chunk
    held = {}
    for source in _sources(config, role):
        name = str(source.path) if source.name in held else source.name
        held[name] = document_files.read(
            source,
            vocabulary,
            least=config.data.get("least", KEYS["data.least"].default),
            most=config.data.get("most", None),
            longest=None if role == "train" else longest,
        )
    return held


def _model(config: ml_collections.ConfigDict) -> tuple[Vocabulary, models.Decoder, Any]:
    """Vocabulary, module and ``init(key)`` of a config, with low-rank leaves where it has some."""
    options = config.model
    if options.name == "pretrained":
        vocabulary, module, base = _pretrained(options)
    else:
        vocabulary = document_files.in_bytes()
        module = models.Decoder(
            vocabulary=len(vocabulary.sizes),
            width=options.width,
            depth=options.depth,
            heads=options.heads,
            tied=False,
            context=config.train.get("length", KEYS["train.length"].default),
        )
        example = jnp.zeros((1, 2), jnp.int32)

        def base(key: jax.Array) -> Any:
            return _unit_scale(module.init(key, example))

    rank = options.get("rank", None)
    if rank is None:
        return vocabulary, module, base

    def widened(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        return models.low_rank(
            module,
            base(first),
            second,
            jnp.zeros((1, 2), jnp.int32),
            rank=rank,
            alpha=options.get("alpha", float(rank)),
            paths=_several(options.get("paths", KEYS["model.paths"].default)),
        )

    made: list[models.Decoder] = []
    # The module alone: nothing is computed.
    jax.eval_shape(lambda key: made.append(widened(key)[0]), jax.random.key(0))
    return vocabulary, made[0], lambda key: widened(key)[1]


def _unit_scale(params: Any) -> Any:
    """Embedding and kernels at the scale of their inputs: half as many steps as from 0.02."""

    def scaled(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        if path[-1] == "embedding":
            return leaf * (0.5 / 0.02)
        return leaf * (leaf.shape[-2] ** -0.5 / 0.02) if path[-1] == "kernel" else leaf

    return traverse_util.path_aware_map(scaled, params)


def _pretrained(options: ml_collections.ConfigDict) -> Any:
    paths = _several(options.source)
    given = {"compute_dtype": jnp.dtype(options.get("dtype", "float32"))}
    if len(paths) == 1 and pathlib.Path(paths[0]).is_dir():
        held = models.load_hugging_face(paths[0], **given)
    else:
        held = models.load_gguf(paths, **given)
    if held.tokenizer is None:
        raise ValueError(
            f"model.source needs a tokenizer beside the weights; {paths[0]!r} has none. Put "
            "tokenizer.json into the folder."
        )
    tokenizer = held.tokenizer
    sizes = np.zeros(max(held.module.vocabulary, len(tokenizer.sizes)), np.int64)
    sizes[: len(tokenizer.sizes)] = tokenizer.sizes
    vocabulary = Vocabulary(tokenizer.encode, tokenizer.decode, sizes, tokenizer.bos)
    return vocabulary, held.module, lambda key: held.params


def _isolated(module: models.Decoder, width: int, bos: int | None) -> Any:
    """Scores windows of ``width`` tokens, each without those before it but for its first input."""

    def read(params: Any, memory: Any, inputs: Any) -> tuple[jax.Array, Any]:
        tokens, places = inputs["tokens"], jnp.arange(width, dtype=jnp.int32)[None]
        if bos is not None:
            tokens = tokens.at[:, 0].set(bos)
        places = jnp.where(inputs["positions"] < 0, -1, places)
        return module.apply(params, {"tokens": tokens, "positions": places}), memory

    still = ttt.methods.document_ttt(
        Reader(lambda batch, tokens, chunk: (), read), num_steps=0, bos=bos
    )

    def score(params: Any, documents: Any) -> jax.Array:
        shape = documents["tokens"].shape
        size = shape[1] * shape[2]

        def alone(document: Any) -> jax.Array:
            windows = jax.tree.map(
                lambda leaf: jnp.pad(leaf.reshape(-1), (0, -size % width)).reshape(-1, width),
                document,
            )
            nats = still(params, windows, jax.random.key(0))[0]
            return nats.reshape(-1)[:size].reshape(shape[1:])

        return jax.vmap(alone)(documents)

    return score


@dataclasses.dataclass
class _Training:
    """Sequences of training documents; see :class:`ttt_jax.task.TrainingData`."""

    read: Callable[[], Sequence[np.ndarray]]
    batch_size: int
    length: int
    seed: int

    @functools.cached_property
    def documents(self) -> Sequence[np.ndarray]:
        """Their ids, once they are needed: a pretrained model needs none."""
        return self.read()

    def __iter__(self) -> Iterator[Examples]:
        starts = [
            (index, start)
            for index, ids in enumerate(self.documents)
            for start in range(0, len(ids), self.length)
        ]
        for first in range(0, len(starts), self.batch_size):
            yield self._examples(starts[first : first + self.batch_size], first)

    def steps(self, start: int) -> Iterator[Examples]:
        """Random sequences, the same ones at step k wherever it began."""
        ends = np.cumsum([len(ids) for ids in self.documents])
        step = start
        while True:
            rng = np.random.default_rng((self.seed, step))
            places = rng.integers(ends[-1], size=self.batch_size)
            index = np.searchsorted(ends, places, side="right")
            starts = places - np.concatenate([[0], ends])[index]
            yield self._examples(list(zip(index, starts, strict=True)), 0)
            step += 1

    def _examples(self, places: Sequence[tuple[int, int]], first: int) -> Examples:
        tokens = np.zeros((len(places), 1, self.length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, (index, start) in enumerate(places):
            # The last whole sequence rather than a part of one, where the document has one.
            start = max(min(start, len(self.documents[index]) - self.length), 0)
            ids = self.documents[index][start : start + self.length]
            tokens[row, 0, : len(ids)], mask[row, 0, : len(ids)] = ids, True
        ids = np.arange(first, first + len(places))
        return Examples(ids, {"tokens": tokens, "mask": mask}, mask.sum((1, 2)), {})
