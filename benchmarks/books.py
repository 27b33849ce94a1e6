"""How many bits does a language model save by learning from the document that it reads?

``python -m benchmarks.books --tokens=T --prepare --weights=W --texts=FOLDER`` turns texts into
token ids once. ``python -m benchmarks.books --tokens=T --weights=W --out=FILE`` then chooses
settings on the validation books by the bits of the later half of their first tokens, and runs the
chosen setting and its controls over whole unseen books and source files. Rows of the accelerator
read documents one after the other, each from pristine weights. bfloat16 compute and base, float32
factors.
"""

import json
import lzma
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags

import ttt_jax as ttt
from experiments import launch, provenance
from ttt_jax import methods, models

LINEAR = (".*attention/.*", ".*mlp/.*")
QUERY_VALUE = (".*/query", ".*/value")
DOWN = (".*/down",)
# Attention sinks; Xiao et al., 2023.
SINKS = 4
# Published for documents in a batch (github.com/openai/parameter-golf, pull request 77).
BETAS = {"b1": 0.9, "b2": 0.95, "eps": 1e-10}


class Setting(NamedTuple):
    """What adapts and how: modules, rank, tokens of a chunk, step sizes that are tried."""

    paths: tuple[str, ...]
    rank: int
    chunk: int
    rates: tuple[float, ...]
    optimizer: str = "adam"


SETTINGS = {
    "query_value_r8_c256": Setting(QUERY_VALUE, 8, 256, (1e-3, 3e-3, 1e-2)),
    "linear_r8_c64": Setting(LINEAR, 8, 64, (3e-4, 1e-3, 3e-3)),
    "linear_r32_c64": Setting(LINEAR, 32, 64, (1e-4, 3e-4, 1e-3)),
    "down_r32_c64": Setting(DOWN, 32, 64, (3e-4, 1e-3, 3e-3)),
    "linear_r8_c32": Setting(LINEAR, 8, 32, (1e-4, 3e-4, 1e-3)),
    "linear_r8_c128": Setting(LINEAR, 8, 128, (1e-3, 3e-3, 6e-3)),
    "linear_r8_c64_sgd": Setting(LINEAR, 8, 64, (0.1, 0.3, 1.0), "sgd"),
}


def optimizer_of(name: str, rate: Any) -> optax.GradientTransformation:
    """The optimizer of a setting; ``rate`` may be traced."""
    return optax.adam(rate, **BETAS) if name == "adam" else optax.sgd(rate)


class Packed(NamedTuple):
    """Documents one after the other in rows.

    Attributes:
      x: of :func:`ttt_jax.methods.document_ttt`, leaves ``[R, T, ...]``.
      owner: ``[R, T]``, the document of each chunk, -1 for padding.
    """

    x: dict[str, np.ndarray]
    owner: np.ndarray


def pack(documents: Sequence[np.ndarray], rows: int, chunk: int) -> Packed:
    """Puts every document into the row that is shortest so far, longest first."""
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    held: list[list[int]] = [[] for _ in range(rows)]
    lengths = [0] * rows
    for index in order:
        row = int(np.argmin(lengths))
        held[row].append(index)
        lengths[row] += -(-len(documents[index]) // chunk)
    count = max(lengths)
    tokens = np.zeros((rows, count, chunk), np.int32)
    mask = np.zeros((rows, count, chunk), bool)
    start = np.zeros((rows, count), bool)
    owner = np.full((rows, count), -1)
    for row, indices in enumerate(held):
        at = 0
        for index in indices:
            size = len(documents[index])
            used = -(-size // chunk)
            tokens[row, at : at + used].reshape(-1)[:size] = documents[index]
            mask[row, at : at + used].reshape(-1)[:size] = True
            start[row, at] = True
            owner[row, at : at + used] = index
            at += used
    return Packed({"tokens": tokens, "mask": mask, "start": start}, owner)


def unpacked(packed: Packed, nats: np.ndarray, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Nats of every token of every document; 0 for the first, which has no score."""
    parts: list[list[np.ndarray]] = [[] for _ in documents]
    for row, chunk in zip(*np.nonzero(packed.owner >= 0), strict=True):
        parts[packed.owner[row, chunk]].append(nats[row, chunk])
    return [
        np.concatenate(part)[: len(tokens)] for part, tokens in zip(parts, documents, strict=True)
    ]


def prepare(settings: Any) -> None:
    """Writes token ids of the chosen documents, and the bytes of every token."""
    tokenizer = models.load_gguf(settings.weights).tokenizer
    folder = pathlib.Path(settings.texts)
    arrays: dict[str, Any] = {"sizes": tokenizer.sizes}
    for role, name in {
        "validation": "books_val8_heldout_authors",
        "books": "books_test20_heldout_authors",
        "code_c": "code_c",
        "code_python": "code_python",
    }.items():
        titles, ids = [], []
        for title, text in _texts(folder / f"{name}.jsonl.xz", settings.files, "books" not in name):
            titles.append(title)
            ids.append(np.array(tokenizer.encode(text), np.uint16))
        arrays[f"{role}_titles"] = np.array(titles)
        arrays[f"{role}_lengths"] = np.array([len(row) for row in ids])
        arrays[f"{role}_tokens"] = np.concatenate(ids)
        print(f"{role}: {len(ids)} documents, {sum(map(len, ids))} tokens", flush=True)
    np.savez_compressed(settings.tokens, **arrays)


def _texts(path: pathlib.Path, most: int, sample: bool) -> Iterator[tuple[str, str]]:
    """Title and text; of source files, those of the smallest checksums of their paths."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if sample:
        # A file of a few lines has no passage to learn from.
        rows = [row for row in rows if len(row["text"]) >= 2000]
        rows.sort(key=lambda row: zlib.crc32((row["source"] + row["path"]).encode()))
        rows = rows[:most]
    for row in rows:
        yield row.get("title") or f"{row['source']}/{row['path']}", row["text"]


def read_tokens(path: str, role: str) -> list[np.ndarray]:
    """The documents of a role."""
    with np.load(path) as arrays:
        ends = np.cumsum(arrays[f"{role}_lengths"])
        return np.split(arrays[f"{role}_tokens"], ends[:-1])


class Way(NamedTuple):
    """A way to read documents: step size -> predictor, its parameters, tokens of a chunk."""

    predict: Callable[[Any], Any]
    params: Any
    chunk: int


class Model(NamedTuple):
    """A pretrained decoder, and how it reads."""

    module: models.Decoder
    params: Any


def load(settings: Any) -> Model:
    """The decoder with bfloat16 weights; a random one of two layers in a smoke run."""
    if settings.smoke:
        module = models.Decoder(vocabulary=49152, width=32, depth=2, heads=2, sinks=SINKS)
        params = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        return Model(module.clone(window=settings.window), params)
    made = models.load_gguf(
        settings.weights,
        dtype=jnp.bfloat16,
        compute_dtype=jnp.bfloat16,
        window=settings.window,
        sinks=SINKS,
    )
    return Model(made.module, made.params)


def factors(model: Model, setting: Setting) -> Model:
    """The decoder with low-rank leaves."""
    made = models.low_rank(
        model.module,
        model.params,
        jax.random.key(1),
        jnp.zeros((1, 2), jnp.int32),
        rank=setting.rank,
        alpha=float(setting.rank),
        paths=setting.paths,
    )
    return Model(*made)


def run(
    predict: Callable[..., Any], params: Any, packed: Packed, rates: Sequence[float] = (0.0,)
) -> tuple[np.ndarray, float, float]:
    """Nats ``[rates, R, T, L]``, seconds of the call, seconds of its compilation.

    ``predict(rate)`` makes the predictor; the rate is traced, so that all share a program.
    """
    xs = jax.tree.map(jnp.asarray, packed.x)
    keys = ttt.sample_keys(jax.random.key(2), jnp.arange(len(packed.owner)))

    def mapped(rates: Any, params: Any, xs: Any, keys: Any) -> Any:
        return jax.vmap(lambda rate: ttt.batched(predict(rate))(params, xs, keys)[0])(rates)

    start = time.perf_counter()
    arguments = (jnp.asarray(rates, jnp.float32), params, xs, keys)
    compiled = jax.jit(mapped).lower(*arguments).compile()
    compilation = time.perf_counter() - start
    start = time.perf_counter()
    nats = np.asarray(compiled(*arguments))
    return nats, time.perf_counter() - start, compilation


def adapting(model: Model, setting: Setting) -> Callable[[Any], Any]:
    """The predictor of a setting by its step size."""
    read = models.reader(model.module)
    return lambda rate: methods.document_ttt(read, optimizer=optimizer_of(setting.optimizer, rate))


def control(module: models.Decoder) -> Callable[[Any], Any]:
    """The score without adaptation, under the module's window."""
    return lambda rate: methods.document_ttt(models.reader(module), num_steps=0)


def bits_per_byte(nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> float:
    """Of the scored tokens of a document, the first left out."""
    return float(nats[1:].sum() / np.log(2) / sizes[tokens[1:]].sum())


def choose(model: Model, settings: Any, sizes: np.ndarray) -> list[dict[str, Any]]:
    """A row per setting and step size on the first tokens of the validation books."""
    documents = [row[: settings.validation] for row in read_tokens(settings.tokens, "validation")]
    half = settings.validation // 2
    rows: list[dict[str, Any]] = []

    def late(nats: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(
            [
                bits_per_byte(each[half:], tokens[half:], sizes)
                for each, tokens in zip(nats, documents, strict=True)
            ]
        )

    whole = pack(documents, len(documents), 256)
    nats, _, _ = run(control(model.module), model.params, whole)
    base = late(unpacked(whole, nats[0], documents))
    begun = time.perf_counter()
    for name in settings.settings:
        setting = SETTINGS[name]
        if time.perf_counter() - begun > settings.choose_seconds:
            print(f"{name}: no time left", flush=True)
            continue
        adapted = factors(model, setting)
        packed = pack(documents, len(documents), setting.chunk)
        nats, seconds, compilation = run(
            adapting(adapted, setting), adapted.params, packed, setting.rates
        )
        for rate, each in zip(setting.rates, nats, strict=True):
            bits = late(unpacked(packed, each, documents))
            saved = 100 * (1 - bits / base)
            rows.append(
                {
                    "setting": name,
                    "rate": rate,
                    "late_bits_per_byte": float(bits.mean()),
                    "late_saved_percent": float(saved.mean()),
                    "worse": int((saved < 0).sum()),
                    "seconds": seconds,
                    "compile_seconds": compilation,
                }
            )
            print(f"{name} {rate}: late {saved.mean():.2f} % ({seconds:.0f} s)", flush=True)
    return rows


def ways_of(model: Model, chosen: dict[str, Any], window: int) -> dict[str, Way]:
    """The ways to read a document: three controls, and learning from it as chosen."""
    setting = SETTINGS[chosen["setting"]]
    adapted = factors(model, setting)
    isolated = ttt.readers.isolated(models.from_linen(model.module))
    longer = control(model.module.clone(window=3 * window))
    return {
        "isolated": Way(
            lambda rate: methods.document_ttt(isolated, num_steps=0), model.params, window
        ),
        "sliding": Way(control(model.module), model.params, 256),
        "longer": Way(longer, model.params, 256),
        "adapted": Way(adapting(adapted, setting), adapted.params, setting.chunk),
    }


def report(
    ways: dict[str, Way], role: str, rate: float, settings: Any, sizes: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A row per document of a role: bits per byte of each way, and along its positions.

    And tokens per second by way.
    """
    documents = read_tokens(settings.tokens, role)
    if settings.smoke:
        documents = [row[:300] for row in documents[:3]]
    count = min(settings.rows if role == "books" else 2 * settings.rows, len(documents))
    scores, speeds = {}, {}
    for name, way in ways.items():
        packed = pack(documents, count, way.chunk)
        nats, seconds, compilation = run(way.predict, way.params, packed, (rate,))
        scores[name] = unpacked(packed, nats[0], documents)
        speeds[name] = round(sum(len(row) for row in documents) / seconds)
        bits = np.mean(
            [bits_per_byte(a, b, sizes) for a, b in zip(scores[name], documents, strict=True)]
        )
        print(
            f"{role} {name}: {bits:.4f} bits per byte, {speeds[name]} tokens/s, "
            f"{seconds:.0f} s, compilation {compilation:.0f} s",
            flush=True,
        )
    with np.load(settings.tokens) as arrays:
        titles = arrays[f"{role}_titles"]
    rows = []
    for index, tokens in enumerate(documents):
        bits_of = {
            name: round(bits_per_byte(nats[index], tokens, sizes), 5)
            for name, nats in scores.items()
        }
        curve = {n: _curve(scores[n][index], settings.curve) for n in ("sliding", "adapted")}
        about = {"role": role, "title": str(titles[index]), "tokens": len(tokens)}
        about["bytes"] = int(sizes[tokens].sum())
        rows.append(about | bits_of | {"curve": curve})
    return rows, speeds


def _curve(nats: np.ndarray, step: int) -> list[float]:
    """Nats of each run of ``step`` tokens, the last one shorter."""
    return [round(float(nats[at : at + step].sum()), 1) for at in range(0, len(nats), step)]


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    settings = ml_collections.ConfigDict({n: h.value for n, h in _FLAGS.items()})
    if settings.prepare:
        prepare(settings)
        return
    path = launch.new_file(settings.out)
    settings.weights = tuple(settings.weights)
    kept = {name: settings[name] for name in ("window", "validation", "curve")}
    record = provenance.of(settings) | kept | {"sinks": SINKS, "rows": [], "speeds": {}}
    with np.load(settings.tokens) as arrays:
        sizes = arrays["sizes"]
    model = load(settings)
    record["choices"] = choose(model, settings, sizes)
    record["chosen"] = min(record["choices"], key=lambda row: row["late_bits_per_byte"])
    print(f"chosen: {record['chosen']}", flush=True)
    launch.write_json(path, record)
    ways = ways_of(model, record["chosen"], settings.window)
    for role in settings.roles:
        rows, speeds = report(ways, role, record["chosen"]["rate"], settings, sizes)
        record["rows"] += rows
        record["speeds"][role] = speeds
        launch.write_json(path, record)
    for role in settings.roles:
        rows = [row for row in record["rows"] if row["role"] == role]
        saved = np.array([1 - r["adapted"] / min(r["isolated"], r["sliding"]) for r in rows])
        print(
            f"{role}: saved {100 * saved.mean():.2f} % (median {100 * np.median(saved):.2f}), "
            f"worse on {100 * (saved < 0).mean():.1f} % of {len(saved)}"
        )


if __name__ == "__main__":
    _FLAGS = {
        "tokens": flags.DEFINE_string("tokens", None, "The file of token ids."),
        "prepare": flags.DEFINE_bool("prepare", False, "Whether to write that file."),
        "weights": flags.DEFINE_list("weights", [], "The GGUF file, or its parts."),
        "texts": flags.DEFINE_string("texts", "", "The folder of *.jsonl.xz, to prepare."),
        "files": flags.DEFINE_integer("files", 150, "Source files of a language.", 1),
        "out": flags.DEFINE_string("out", "runs/books.json", "The JSON file to write."),
        "settings": flags.DEFINE_list("settings", list(SETTINGS), "Which settings are tried."),
        "roles": flags.DEFINE_list("roles", ["books", "code_c", "code_python"], "What is read."),
        "window": flags.DEFINE_integer("window", 512, "Tokens that a token sees.", 2),
        "validation": flags.DEFINE_integer("validation", 16384, "First tokens of a book.", 8),
        "choose_seconds": flags.DEFINE_float("choose_seconds", 160.0, "No setting is begun after."),
        "rows": flags.DEFINE_integer("rows", 16, "Documents side by side.", 1),
        "curve": flags.DEFINE_integer("curve", 2048, "Tokens of a point of a curve.", 1),
        "smoke": flags.DEFINE_bool("smoke", False, "A tiny random model, for a CPU."),
    }
    flags.mark_flag_as_required("tokens")
    launch.run(main)
