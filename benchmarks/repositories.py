"""Does learning from some files of a repository help to read and to continue another file of it?

``python -m benchmarks.repositories --weights=W --texts=FOLDER --out=FILE`` takes source files by
the repository that they are of (``code_python.jsonl.xz``). The adapter of a repository learns from
the first tokens of some files, one after the other, chunk by chunk, in the setting that
:mod:`benchmarks.books` chose on books. Then another file is read: by the pristine weights, by the
repository's adapter, by the adapter of another repository, and by either of the first two while it
is learned from itself, too. At the end of what was read each of the three continues the file
greedily, and the record has the share of tokens that are the file's own.
"""

import json
import lzma
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

import ttt_jax as ttt
from benchmarks import books, discovery, options
from experiments import launch, provenance
from ttt_jax import generation, methods, models, select

SETTING, RATE = books.SETTINGS["linear_r32_c64"], 3e-4
"""Chosen in ``documents_books.json``, on books."""

# Files of fewer characters say little of a repository.
_LEAST = 2000


class Repository(NamedTuple):
    """Tokens of a repository's files.

    Attributes:
      name: of the repository.
      files: paths of the files that are learned from, as far as their tokens are taken.
      learned: ``[T, L]``, chunks of them, one file after the other.
      path: of the file that is read afterwards.
      tokens: ``[S, L]``, its first chunks.
      following: ``[G]``, the tokens after them.
    """

    name: str
    files: list[str]
    learned: np.ndarray
    path: str
    tokens: np.ndarray
    following: np.ndarray


def repositories(
    path: pathlib.Path, encode: Callable[[str], Sequence[int]], settings: Any
) -> list[Repository]:
    """Repositories with files enough, in the order of their names.

    The file that is read is the one of the smallest checksum of its path that is long enough, and
    the files that are learned from follow it in that order.

    Raises:
      UserError: fewer than two, so that none has another one's adapter.
    """
    files: dict[str, list[tuple[str, str]]] = {}
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if len(row["text"]) >= _LEAST:
                files.setdefault(row["source"], []).append((row["path"], row["text"]))
    chunk, made = SETTING.chunk, []
    due = settings.read * chunk + settings.continued
    for name in sorted(files):
        order = sorted(files[name], key=lambda file: zlib.crc32(file[0].encode()))
        held, learned, names = None, list[int](), list[str]()
        for place, text in order:
            ids = encode(text)
            if held is None and len(ids) >= due:
                held = place, np.array(ids[:due], np.int32)
            elif len(learned) < settings.learned * chunk:
                learned.extend(ids)
                names.append(place)
            if held is not None and len(learned) >= settings.learned * chunk:
                break
        if held is None or len(learned) < settings.learned * chunk:
            continue
        rows = np.array(learned[: settings.learned * chunk], np.int32).reshape(-1, chunk)
        tokens, following = np.split(held[1], [settings.read * chunk])
        made.append(Repository(name, names, rows, held[0], tokens.reshape(-1, chunk), following))
        if len(made) == settings.repositories:
            break
    if len(made) < 2:
        raise launch.UserError(
            f"--texts must hold two repositories with {settings.learned} chunks to learn and a "
            f"file of {due} tokens; got {len(made)}. Ask for fewer chunks."
        )
    return made


def load(settings: Any) -> tuple[books.Model, Callable[[str], Sequence[int]], np.ndarray]:
    """The decoder with low-rank leaves, its tokenizer, and the bytes of every token."""
    if settings.smoke:
        module = models.Decoder(vocabulary=256, width=32, depth=1, heads=2, sinks=books.SINKS)
        params = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        small = books.Model(module.clone(window=settings.window), params)
        return books.factors(small, SETTING), lambda text: list(text.encode()), np.ones(256, int)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    made = models.load_gguf(
        settings.weights,
        dtype=dtype,
        compute_dtype=dtype,
        window=settings.window,
        sinks=books.SINKS,
    )
    model = books.factors(books.Model(made.module, made.params), SETTING)
    return model, made.tokenizer.encode, np.asarray(made.tokenizer.sizes)


def measured(model: books.Model, of: Sequence[Repository], settings: Any) -> dict[str, Any]:
    """By way: nats ``[R, S * L]`` of the files that are read, and what continues them."""
    read, params, adapting = models.reader(model.module), model.params, select.lora()
    optimizer = books.optimizer_of(SETTING.optimizer, RATE)
    keys = ttt.sample_keys(jax.random.key(2), jnp.arange(len(of)))

    def mapped(predict: ttt.Predictor, xs: Any) -> Any:
        return jax.jit(ttt.batched(predict, chunk_size=settings.at_once))(params, xs, keys)[0]

    learned, tokens = (
        np.stack([getattr(each, name) for each in of]) for name in ("learned", "tokens")
    )
    own = mapped(methods.document_adapter(read, optimizer=optimizer), learned)
    fresh = adapting.split(params)[0]
    pristine = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(of), *leaf.shape)), fresh)
    adapters = {
        "pristine": pristine,
        "own": own,
        "other": jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), own),
    }
    score, learn = (
        ttt.adapted(predict, select=adapting)
        for predict in (
            methods.document_ttt(read, num_steps=0),
            methods.document_ttt(read, optimizer=optimizer),
        )
    )
    draw = ttt.adapted(generation.generate(read, num_tokens=settings.continued), select=adapting)
    prompts = tokens.reshape(len(of), -1)[:, -settings.window :]
    made: dict[str, Any] = {"nats": {}, "tokens": {}}
    for name, fast in adapters.items():
        made["nats"][name] = np.asarray(mapped(score, (fast, tokens))).reshape(len(of), -1)
        made["tokens"][name] = np.asarray(mapped(draw, (fast, prompts)).tokens)
    for name in ("pristine", "own"):
        nats = np.asarray(mapped(learn, (adapters[name], tokens)))
        made["nats"][f"{name}_learning"] = nats.reshape(len(of), -1)
    return made


def rows_of(of: Sequence[Repository], made: Any, sizes: np.ndarray) -> list[dict[str, Any]]:
    """A row per repository: bits per byte of every way, and shares of right tokens."""
    rows = []
    for index, each in enumerate(of):
        bits = {
            name: books.bits_per_byte(nats[index], each.tokens.reshape(-1), sizes)
            for name, nats in made["nats"].items()
        }
        right = {
            name: float((tokens[index] == each.following).mean())
            for name, tokens in made["tokens"].items()
        }
        about = {"repository": each.name, "files": each.files, "path": each.path}
        rows.append(about | {"bits_per_byte": bits, "right": right})
    return rows


def saved(rows: Sequence[Any], way: str, beside: str = "pristine") -> tuple[float, float, float]:
    """Percent of bits that a way saves, the mean and its interval of 95 % over repositories."""
    bits = np.array([[row["bits_per_byte"][name] for name in (way, beside)] for row in rows])
    values = 100 * (1 - bits[:, 0] / bits[:, 1])
    low, high = discovery.interval(values)
    return float(values.mean()), low, high


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Learns, reads, continues, and writes the record."""
    path = launch.new_file(out)
    model, encode, sizes = load(settings)
    of = repositories(pathlib.Path(settings.texts) / "code_python.jsonl.xz", encode, settings)
    made = measured(model, of, settings)
    rows = rows_of(of, made, sizes)
    record = provenance.of(settings) | {"rate": RATE, "setting": SETTING._asdict(), "rows": rows}
    launch.write_json(path, record)
    for way in ("own", "other", "pristine_learning", "own_learning"):
        mean, low, high = saved(rows, way)
        worse = sum(r["bits_per_byte"][way] > r["bits_per_byte"]["pristine"] for r in rows)
        print(f"{way}: saved {mean:.2f} % [{low:.2f}, {high:.2f}], worse on {worse} of {len(rows)}")
    for way in made["tokens"]:
        share = 100 * np.mean([row["right"][way] for row in rows])
        print(f"{way}: {share:.1f} % of the continued tokens are the file's")
    return record


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "weights": flags.DEFINE_list("weights", [], "The GGUF file, or its parts."),
        "texts": flags.DEFINE_string("texts", "", "The folder of code_python.jsonl.xz."),
        "repositories": flags.DEFINE_integer("repositories", 16, "Repositories at most.", 2),
        "learned": flags.DEFINE_integer("learned", 256, "Chunks that are learned from.", 1),
        "read": flags.DEFINE_integer("read", 16, "Chunks of the file that is read.", 1),
        "continued": flags.DEFINE_integer("continued", 64, "Tokens that continue it.", 1),
        "window": flags.DEFINE_integer("window", 512, "Tokens that a token sees.", 2),
        "at_once": flags.DEFINE_integer("at_once", 16, "Repositories side by side.", 1),
        "smoke": flags.DEFINE_bool("smoke", False, "A tiny random model, for a CPU."),
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)
