"""Does a language model whose layers learn while they read use what is far back?

``python -m benchmarks.layer_language --tokens=T --prepare --texts=FOLDER`` turns books into token
ids once. ``python -m benchmarks.layer_language --tokens=T --out=FILE`` then trains four decoders
from scratch that differ in what mixes tokens alone, of equal size, on equal tokens in equal order:
attention, attention under a window, TTT-Linear and TTT-MLP (:mod:`benchmarks.layer_nets`). Parts:

* ``compare``: kernels and fused attention beside plain XLA, in loss and gradient, of one layer and
  at the length of the training. A net that is over 5e-2 is not trained.
* ``language``: the step size is chosen on the validation books, in short trainings. Loss by
  position on the test books out to eight times the length of the training, and with the state (of
  attention: all that was seen) dropped every such length. ``gain`` is the difference in the last
  eighth; ``late_gain`` that of its later half, where the control has seen half a length as well.
  A number that was hidden in a text and is asked for at its end; a sample.
  With ``--fresh=SHARE`` that share of the sequences of nets with a state begins anew in each
  step; the others go on in their book (:mod:`benchmarks.layer_pages`).
* ``recall``: multi-query associative recall (:mod:`benchmarks.layer_recall`) by nets of two layers,
  the step size chosen on other draws than those that are reported.

bfloat16 compute, float32 parameters and states. Speeds leave compilation out.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from benchmarks import (
    layer_needles,
    layer_nets,
    layer_pages,
    layer_recall,
    layer_scores,
    layer_texts,
    options,
)
from experiments import launch, provenance
from ttt_jax import generation, models

PARTS = ("compare", "language", "recall")
LIMIT = 5e-2
DEPTHS = (0.1, 0.5, 0.9)
# Of the trainings that choose a step size: the same, whichever seeds are trained.
TRIAL_SEED = 100
_SMOKE = {
    **{"length": 16, "width": 64, "depth": 1, "mlp_width": 256, "window": 8, "rows": 4},
    **{"steps": 4, "trial_steps": 2, "steps_per_call": 2, "rates": ("1e-3", "3e-3"), "spans": 1},
    **{"recall_vocabulary": 512, "recall_steps": 2, "recall_rows": 5, "recall_rates": ("3e-3",)},
    **{"score_rows": 4, "needles": 2, "sample_tokens": 3, "sample_prompt": 5},
}


def sizes_of(settings: Any, texts: layer_texts.Texts) -> layer_nets.Sizes:
    """Of the language models."""
    return layer_nets.Sizes(
        vocabulary=len(texts.pieces),
        width=settings.width,
        depth=settings.depth,
        mlp_width=settings.mlp_width,
        window=settings.window,
        backbone=settings.backbone,
        form=settings.form,
        attention=settings.attention,
    )


def sample(module: models.Decoder, params: Any, texts: layer_texts.Texts, settings: Any) -> str:
    """A continuation of the beginning of a validation book."""
    book = texts.books["validation"][0][: settings.sample_prompt].astype(np.int32)
    predict = generation.generate(
        models.reader(module),
        num_tokens=settings.sample_tokens,
        sampler=generation.sample(0.8, 0.95),
    )
    made, _ = jax.jit(predict)(params, jnp.asarray(book), jax.random.key(0))
    return f"{texts.decode(book)} || {texts.decode(np.asarray(made.tokens))}"


class Language(NamedTuple):
    """One net of the language part: its programs, compiled once for all step sizes and seeds.

    Attributes:
      name: of the net.
      module: the net.
      data: the training books, on the device.
      training: which pages are read in which order.
      program: of :func:`layer_nets.program`.
      score: of :func:`layer_scores.scorer`.
      texts: all books.
      settings: of the program.
      deadline: see :func:`layer_nets.fit`.
    """

    name: str
    module: models.Decoder
    data: layer_pages.Books
    training: layer_nets.Training
    program: Callable[..., Any]
    score: Callable[..., Any]
    texts: layer_texts.Texts
    settings: Any
    deadline: float

    def trained(self, seed: int, rate: float, steps: int) -> layer_nets.Trained:
        """From fresh weights."""
        start = layer_nets.fresh(self.module, seed)
        per_call = self.settings.steps_per_call
        return layer_nets.fit(
            self.program,
            self.training,
            start,
            self.data,
            seed=seed,
            rate=rate,
            calls=-(-steps // per_call),
            deadline=self.deadline,
        )

    def validation(self, params: Any) -> float:
        """Mean nats of the validation books at the length of the training."""
        books = self.texts.books["validation"]
        tokens, _ = layer_texts.spans(books, self.settings.length, self.settings.spans)
        nats, _ = layer_scores.scored(self.score, params, tokens, self.settings.rows)
        return float(nats[:, 1:].mean())

    def choice(self) -> tuple[float, list[dict[str, Any]]]:
        """The best step size of short trainings, and a row of each; one alone is not tried."""
        rates = [float(rate) for rate in self.settings.rates]
        if len(rates) == 1:
            return rates[0], []
        rows = []
        for rate in rates:
            made = self.trained(TRIAL_SEED, rate, self.settings.trial_steps)
            nats = self.validation(made.params) if made.finished else float("inf")
            rows.append({"part": "trial", "net": self.name, "rate": rate, "validation": nats})
        return min(rows, key=lambda row: row["validation"])["rate"], rows

    def row(self, seed: int, rate: float) -> tuple[dict[str, Any], Any]:
        """A training and its loss by position, and the weights; None where it was not finished."""
        settings = self.settings
        made = self.trained(seed, rate, settings.steps)
        per_step = settings.rows * settings.length
        row = {
            "part": "language",
            "net": self.name,
            "seed": seed,
            "parameters": layer_nets.count(self.module),
            "flop_per_token": layer_nets.flop_per_token(self.module, settings.length),
            "tokens": len(made.losses) * settings.steps_per_call * per_step,
            **layer_nets.summary(made, rate, per_step),
        }
        if not made.finished:
            return row, None
        row["validation"] = self.validation(made.params)
        return row | layer_scores.positions(
            self.score, made.params, self.texts, settings
        ), made.params

    def needle(self, params: Any, seed: int) -> list[dict[str, Any]]:
        """A number hidden in test books, at several depths and lengths."""
        length = self.settings.length
        tokens, _ = layer_texts.spans(self.texts.books["test"], layer_scores.LONGER * length, 1)
        # Short texts have no room for the sentences in a smoke run.
        lengths = [
            length * times for times in (1, 2, 4, layer_scores.LONGER) if length * times >= 64
        ]
        given = layer_needles.needles(
            self.texts,
            tokens[: self.settings.needles],
            lengths=lengths,
            depths=DEPTHS,
            seed=seed,
        )
        scores = layer_scores.scored(self.score, params, given.tokens, self.settings.score_rows)
        about = {"part": "needle", "net": self.name, "seed": seed}
        return [about | row for row in layer_needles.rows_of(given, *scores)]


def language(name: str, texts: layer_texts.Texts, settings: Any, deadline: float) -> Language:
    """A net and its programs."""
    module = layer_nets.net(name, sizes_of(settings, texts))
    sizes = {name: settings[name] for name in ("length", "rows", "steps_per_call")}
    if settings.fresh < 1 and module.mixer != "attention":
        training = layer_pages.on(module, **sizes, fresh=settings.fresh)
    else:
        training = layer_pages.anywhere(module, **sizes)
    return Language(
        name,
        module,
        layer_pages.books_of(texts, settings.length),
        training,
        layer_nets.program(training),
        layer_scores.scorer(module, texts.digits),
        texts,
        settings,
        deadline,
    )


def language_rows(name: str, texts: Any, settings: Any, deadline: float) -> Iterator[Any]:
    """All rows of a net, one after another."""
    net = language(name, texts, settings, deadline)
    rate, rows = net.choice()
    yield from rows
    for seed in map(int, settings.seeds):
        row, params = net.row(seed, rate)
        yield row
        if params is None:
            continue
        yield from net.needle(params, seed)
        if name in settings.samples and seed == int(settings.seeds[0]):
            text = sample(net.module, params, texts, settings)
            yield {"part": "sample", "net": name, "seed": seed, "text": text}


def compared(name: str, texts: layer_texts.Texts, settings: Any) -> dict[str, Any]:
    """A row of the fast forms beside the plain ones."""
    books = texts.books["validation"]
    tokens, _ = layer_texts.spans(books, settings.length, settings.rows)
    # As many as in the training: kernels are configured by the number of heads at once.
    tokens = tokens[: settings.rows]
    gaps = layer_nets.differences(name, sizes_of(settings, texts), tokens, layer_pages.next_token)
    right = max(gaps.values()) <= LIMIT
    return {"part": "compare", "net": name, "right": right} | gaps


def guarded(about: dict[str, Any], rows: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The rows, and where a net fails one that says why: the others are trained all the same."""
    try:
        yield from rows()
    except launch.UserError:
        raise
    except Exception as error:  # whatever a compiler or a device raises
        message = f"{type(error).__name__}: {error}"[:300]
        yield about | {"finished": False, "right": False, "message": message}


def rows_of(settings: Any, texts: layer_texts.Texts, deadline: float) -> Iterator[Any]:
    """All that is asked for; after the deadline no net is begun."""
    makers: dict[str, Callable[[str], Iterator[Any]]] = {
        "compare": lambda name: iter([compared(name, texts, settings)]),
        "language": lambda name: language_rows(name, texts, settings, deadline),
        "recall": lambda name: layer_recall.rows_of(name, settings, deadline),
    }
    wrong = set()
    # The comparison first: what is wrong is not trained.
    for part in (part for part in PARTS if part in settings.parts):
        for name in settings.nets:
            about = {"part": part, "net": name}
            if name in wrong or time.monotonic() > deadline:
                why = "wrong" if name in wrong else "no time left"
                yield about | {"finished": False, "message": why}
                continue
            for row in guarded(about, functools.partial(makers[part], name)):
                if part == "compare" and not row["right"]:
                    wrong.add(name)
                yield row


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any] | None:
    """Prepares the texts, or trains and measures, and writes the record after every row."""
    settings = ml_collections.ConfigDict(settings)
    if settings.prepare:
        layer_texts.write(
            settings.tokens, settings.texts, vocabulary=settings.vocabulary, most=settings.most
        )
        return None
    launch.chosen("part", settings.parts, PARTS)
    launch.chosen("net", settings.nets, layer_nets.NETS)
    for name in ("rates", "recall_rates", "seeds"):
        launch.chosen(name, settings[name], settings[name])
    settings.update(_SMOKE if settings.smoke else {})
    texts = layer_texts.read(settings.tokens)
    path = launch.new_file(out)
    record = provenance.of(settings) | {"rows": []}
    for row in rows_of(settings, texts, time.monotonic() + settings.seconds):
        record["rows"].append(row)
        record["headlines"] = headlines(record["rows"])
        launch.write_json(path, record)
        print(described(row), flush=True)
    for line in table(record["rows"], settings):
        print(line, flush=True)
    return record


def headlines(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds: of each net the gains, loss at both ends of the curve, and recall."""
    found: dict[str, Any] = {}
    for name in layer_nets.NETS:
        own = [row for row in rows if row["net"] == name and row.get("finished")]
        scores = [row for row in own if row["part"] == "language"]
        for key in ("gain", "late_gain", "validation") if scores else ():
            found[f"{name}_{key}"] = float(np.mean([row[key] for row in scores]))
        answers = [row for row in own if row["part"] == "recall" and row["chosen"]]
        if answers:
            shares = [np.mean(list(row["right"].values())) for row in answers]
            found[f"{name}_recall"] = float(np.mean(shares))
    if "ttt_linear_gain" in found:
        found["ttt_lm_loss_gain_8x"] = found["ttt_linear_gain"]
    return found


def described(row: dict[str, Any]) -> str:
    """A line of a row."""
    hidden = ("curve", "curve_reset", "training_losses", "part", "net")
    parts = [f"{name} {_short(value)}" for name, value in row.items() if name not in hidden]
    return f"{row['part']} {row['net']}: {', '.join(parts)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"[{', '.join(map(_short, value))}]" if isinstance(value, list) else str(value)


def table(rows: Sequence[dict[str, Any]], settings: Any) -> list[str]:
    """Loss at the ends of 1, 2, 4 and 8 lengths, the mean of the control, and the gains."""
    lines = [f"{'net':11}seed  x1     x2     x4     x8     reset  gain    late    tokens/s"]
    per = settings.length // max(settings.length // layer_scores.POINTS, 2)
    for row in rows:
        if row["part"] == "language" and row["finished"]:
            ends = [row["curve"][times * per - 1] for times in (1, 2, 4, layer_scores.LONGER)]
            reset = float(np.mean(row["curve_reset"][-per:]))
            speed = row["tokens_per_second"]
            lines.append(
                f"{row['net']:11}{row['seed']:<4}"
                + "".join(f"{value:7.4f}" for value in (*ends, reset))
                + f" {row['gain']:+.4f} {row['late_gain']:+.4f} {speed}"
            )
    for row in rows:
        if row["part"] == "recall" and row["chosen"]:
            shares = " ".join(f"{n}:{share:.3f}" for n, share in row["right"].items())
            lines.append(f"{row['net']:11}{row['seed']:<4} recall {shares}")
    return lines


if __name__ == "__main__":
    _FLAGS = {
        "tokens": flags.DEFINE_string("tokens", None, "The file of token ids."),
        "out": flags.DEFINE_string("out", "runs/layer_language.json", "The JSON file to write."),
        "prepare": flags.DEFINE_bool("prepare", False, "Whether to write the file of token ids."),
        "texts": flags.DEFINE_string("texts", "", "The folder of *.jsonl.xz, to prepare."),
        "vocabulary": flags.DEFINE_integer("vocabulary", 4096, "Tokens, to prepare.", 512),
        "most": flags.DEFINE_integer("most", 65536, "First tokens of held-out books.", 1),
        "parts": flags.DEFINE_list("parts", list(PARTS), "Which parts."),
        "nets": flags.DEFINE_list("nets", list(layer_nets.NETS), "Which nets, in this order."),
        "seeds": flags.DEFINE_list("seeds", ["0", "1"], "Of weights and batches."),
        "form": flags.DEFINE_enum("form", "auto", ("auto", "dual", "kernel"), "Of TTT layers."),
        "attention": flags.DEFINE_enum("attention", "fused", ("fused", "xla"), "Its form."),
        "backbone": flags.DEFINE_enum("backbone", "mamba", ("mamba", "transformer"), "Of TTT."),
        "length": flags.DEFINE_integer("length", 1024, "Tokens of a sequence in training.", 16),
        "width": flags.DEFINE_integer("width", 512, "Of the nets; a multiple of 64.", 64),
        "depth": flags.DEFINE_integer("depth", 6, "Layers.", 1),
        "mlp_width": flags.DEFINE_integer("mlp_width", 1792, "Of the net with attention.", 64),
        "window": flags.DEFINE_integer("window", 256, "Of the net with a window.", 1),
        "rows": flags.DEFINE_integer("rows", 64, "Sequences of a step.", 1),
        "fresh": flags.DEFINE_float(
            "fresh", 1.0, "Share of sequences that begin anew with a step, of TTT.", 0.0, 1.0
        ),
        "steps": flags.DEFINE_integer("steps", 500, "Of a training.", 1),
        "steps_per_call": flags.DEFINE_integer("steps_per_call", 20, "Of a compiled call.", 1),
        "rates": flags.DEFINE_list("rates", ["1e-3", "2e-3", "4e-3"], "Step sizes to choose from."),
        "trial_steps": flags.DEFINE_integer("trial_steps", 80, "Of a training to choose.", 1),
        "spans": flags.DEFINE_integer("spans", 3, "Sequences of a book that are scored.", 1),
        "score_rows": flags.DEFINE_integer("score_rows", 8, "Long sequences scored at once.", 1),
        "needles": flags.DEFINE_integer("needles", 16, "Books in which a number is hidden.", 1),
        "samples": flags.DEFINE_list("samples", ["ttt_linear"], "Nets that write a sample."),
        "sample_prompt": flags.DEFINE_integer("sample_prompt", 64, "Tokens before it.", 1),
        "sample_tokens": flags.DEFINE_integer("sample_tokens", 96, "Tokens of it.", 1),
        "recall_vocabulary": flags.DEFINE_integer("recall_vocabulary", 8192, "As published.", 256),
        "recall_rows": flags.DEFINE_integer("recall_rows", 160, "Sequences of a step.", 5),
        "recall_steps": flags.DEFINE_integer("recall_steps", 2000, "Of a training.", 1),
        "recall_rates": flags.DEFINE_list("recall_rates", ["1e-3", "3e-3"], "As rates."),
        "seconds": flags.DEFINE_float("seconds", 540.0, "After them no compiled call begins.", 1.0),
        "smoke": flags.DEFINE_bool("smoke", False, "Tiny nets and few steps, for a CPU."),
    }
    flags.mark_flag_as_required("tokens")
    options.start(run, _FLAGS)
