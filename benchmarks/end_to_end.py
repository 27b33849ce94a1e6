"""Does a network that was trained through its own steps use what lies beyond its window?

``python -m benchmarks.end_to_end --tokens=T --out=FILE`` trains decoders on books, on equal tokens
in equal order, and scores the first tokens of unseen books, position by position. ``T`` has token
ids: ``sizes``, the bytes of each token, and by role (train, validation, test) ``*_tokens``, one
book after the other, and their ``*_lengths``. Networks:

* ``full``: full attention; ``window``: a sliding window, read chunk by chunk;
* ``end_to_end``: the same window, whose last quarter of MLPs learns from every chunk after its
  score, trained through these steps (:func:`ttt_jax.methods.end_to_end`);
* from ``full``, a few steps more: ``bridge``, through the steps; ``bridge_window``, the window
  alone; ``bridge_in_place``, through the steps of :func:`ttt_jax.methods.in_place`.

Every network is scored with and without steps: ``window`` with them is joint training (TTT-naive),
``full`` with them was just switched on. Step sizes are chosen on the validation books.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import flags

import ttt_jax as ttt
from benchmarks import books, discovery, options, outer_training
from experiments import launch, provenance
from ttt_jax.losses import tokens as token_losses

# Of a training, in which step sizes grow.
WARM_UP = 0.1
_SMOKE = {
    **{"width": 16, "depth": 4, "heads": 2, "window": 8, "chunk": 4, "length": 16, "rows": 2},
    **{"score_length": 32, "score_rows": 2, "books": 3, "curve": 8, "steps": 4},
    **{"bridge_steps": 2, "dtype": "float32", "step_sizes": ("0.1", "1.0")},
}


class Net(NamedTuple):
    """A network: how it is trained, from which other one, and with which steps it is scored.

    Attributes:
      rule: ``full``, or one of :data:`RULES`; it names the program of its training.
      start: the network whose weights it begins with; None for new ones.
      steps: the rule of its steps in scoring.
    """

    rule: str
    start: str | None
    steps: str


NETS = {
    "full": Net("full", None, "end_to_end"),
    "window": Net("window", None, "end_to_end"),
    "end_to_end": Net("end_to_end", None, "end_to_end"),
    "bridge": Net("end_to_end", "full", "end_to_end"),
    "bridge_window": Net("window", "full", "end_to_end"),
    "bridge_in_place": Net("in_place", "full", "in_place"),
}


# Of each pair the first way is to have the lower loss.
PAIRS = (
    ("full", "window, steps off"),
    ("end_to_end, steps on", "window, steps off"),
    ("end_to_end, steps on", "end_to_end, steps off"),
    ("window, steps on", "window, steps off"),
    ("full, steps on", "full, steps off"),
    ("bridge, steps on", "bridge_window, steps off"),
    # With the bridge and without one, and with one that knows nothing of the steps.
    ("bridge, steps on", "full, steps on"),
    ("bridge, steps on", "bridge_window, steps on"),
    ("bridge_in_place, steps on", "bridge_window, steps off"),
)


class Lab:
    """The programs, each compiled once for all networks, and the networks that were trained."""

    def __init__(self, settings: Any, deadline: float):
        """Reads the books and names the programs."""
        self.settings, self.deadline = settings, deadline
        with np.load(settings.tokens) as arrays:
            self.sizes = arrays["sizes"]
        self.train_books = books.read_tokens(settings.tokens, "train")
        self.module = outer_training.decoder(settings, len(self.sizes))
        self.nets: dict[str, Any] = {}
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def _call(self, name: Any, make: Callable[[], Any], *arguments: Any) -> Any:
        if name not in self._compiled:
            begin = time.perf_counter()
            self._compiled[name] = jax.jit(make()).lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - begin
        return self._compiled[name](*arguments)

    def late(self) -> bool:
        """Whether no more is to be begun."""
        return time.perf_counter() > self.deadline

    def train(self, name: str) -> dict[str, Any]:
        """Trains a network; a row with its losses."""
        net, settings = NETS[name], self.settings
        steps = settings.bridge_steps if net.start else settings.steps
        peak = settings.bridge_rate if net.start else settings.rate
        warm = max(1, round(WARM_UP * steps))
        rates = optax.warmup_cosine_decay_schedule(0.0, peak, warm, steps + 1, 0.05 * peak)
        if net.start:
            params = self.nets[net.start]
        else:
            key = jax.random.key(settings.seed)
            params = jax.jit(self.module.init)(key, jnp.zeros((1, 2), jnp.int32))
        optimizer = outer_training.outer()
        state = jax.jit(optimizer.init)(params)
        passages = outer_training.draws(self.train_books, settings, settings.seed)

        def step() -> Any:
            if net.rule == "full":
                loss = outer_training.full_nats(self.module)
            else:
                loss = outer_training.mean_nats(
                    net.rule, self.module, remat=settings.remat, mixed=settings.mixed
                )

            def advance(params: Any, state: Any, tokens: Any, rate: Any, own: Any) -> Any:
                value, grads = jax.value_and_grad(loss)(params, tokens, own)
                updates, state = optimizer.update(grads, state, params)
                moved = jax.tree.map(lambda a, b: a - rate * b, params, updates)
                return moved, state, value

            return advance

        curve: list[Any] = []
        seconds, before = 0.0, self.compile_seconds
        for count in range(steps):
            if self.late():
                break
            # As published, the inner steps begin with a tenth of their size.
            own = settings.inner_rate * min(1.0, 0.1 + 0.9 * count / warm)
            given = params, state, next(passages), jnp.float32(rates(count + 1)), jnp.float32(own)
            begin = time.perf_counter()
            params, state, value = self._call(("train", net.rule), step, *given)
            curve.append(float(value))
            # The first call compiles.
            seconds += time.perf_counter() - begin if count else 0.0
        self.nets[name] = params
        tokens = len(curve) * settings.rows * settings.length
        done = {"net": name, "steps": len(curve), "tokens": tokens, "whole": len(curve) == steps}
        speed = (tokens - settings.rows * settings.length) / seconds if seconds else None
        spent = {"tokens_per_s": speed, "compile_seconds": self.compile_seconds - before}
        return done | spent | {"training_nats": curve}

    def score(self, rule: str, name: str, rate: float, documents: np.ndarray) -> np.ndarray:
        """Nats ``[N, tokens]``; of ``full`` all tokens are read at once."""
        settings = self.settings
        cut = documents.reshape(len(documents), -1, settings.chunk)
        size = settings.score_rows

        def nats() -> Any:
            if rule == "full":
                whole = self.module.clone(window=None, attention="fused", cache_gradients=False)

                def alone(params: Any, x: jax.Array) -> jax.Array:
                    flat = x.reshape(1, -1)
                    logits = whole.apply(params, flat)[:, :-1]
                    made = token_losses.token_nats(logits, flat[:, 1:])
                    return jnp.pad(made[0], (1, 0))

                return lambda params, xs, rate: jax.lax.map(lambda x: alone(params, x), xs)

            def together(params: Any, xs: jax.Array, rate: Any) -> jax.Array:
                predict = outer_training.predictor(rule, self.module, rate)
                keys = ttt.sample_keys(jax.random.key(0), jnp.arange(size))
                return ttt.batched(predict)(params, xs, keys)[0].reshape(size, -1)

            return together

        parts = []
        for first in range(0, len(cut), size):
            part = cut[first : first + size]
            # The last call repeats its last document.
            filled = part[np.minimum(np.arange(size), len(part) - 1)]
            given = self.nets[name], filled, jnp.float32(rate)
            made = np.asarray(self._call(("score", rule), nats, *given))
            parts.append(made[: len(part)])
        return np.concatenate(parts)


def documents_of(settings: Any, role: str) -> np.ndarray:
    """The first tokens ``[N, tokens]`` of the books that have as many."""
    length = settings.score_length
    rows = [row[:length] for row in books.read_tokens(settings.tokens, role) if len(row) >= length]
    if not rows:
        raise launch.UserError(f"no {role} book has {length} tokens; lower --score_length.")
    return np.stack(rows[: settings.books]).astype(np.int32)


def scored(nats: np.ndarray, documents: np.ndarray, sizes: np.ndarray, step: int) -> dict[str, Any]:
    """Losses of a way: the mean, of each document, by position."""
    of_each = nats[:, 1:].mean(1)
    parts = [nats[:, max(at, 1) : at + step].mean() for at in range(0, nats.shape[1], step)]
    bits = [books.bits_per_byte(*pair, sizes) for pair in zip(nats, documents, strict=True)]
    return {
        "nats": float(of_each.mean()),
        "bits_per_byte": float(np.mean(bits)),
        "documents": [round(float(each), 5) for each in of_each],
        "curve": [round(float(part), 5) for part in parts],
    }


def score_net(lab: Lab, name: str, validation: np.ndarray, test: np.ndarray) -> Iterator[Any]:
    """Rows of a network: as it was trained, its window alone, and with steps of a chosen size."""
    settings, net = lab.settings, NETS[name]

    def row(way: str, rule: str, rate: float | None) -> dict[str, Any]:
        begin, before = time.perf_counter(), lab.compile_seconds
        nats = lab.score(rule, name, rate or 0.0, test)
        seconds = time.perf_counter() - begin - (lab.compile_seconds - before)
        made = scored(nats, test, lab.sizes, settings.curve)
        about = {"way": way, "net": name, "rule": rule, "rate": rate, "seconds": seconds}
        return about | made

    if name == "full":
        yield row("full", "full", None)
    yield row(f"{name}, steps off", "window", None)
    tried = {}
    for rate in map(float, settings.step_sizes):
        tried[rate] = float(lab.score(net.steps, name, rate, validation)[:, 1:].mean())
    chosen = min(tried, key=lambda rate: tried[rate])
    zero, still = (lab.score(rule, name, 0.0, validation) for rule in (net.steps, "window"))
    yield row(f"{name}, steps on", net.steps, chosen) | {
        "validation_nats": {f"{rate:g}": value for rate, value in tried.items()},
        "validation_nats_without": float(still[:, 1:].mean()),
        "zero_is_control": bool((zero == still).all()),
        "zero_difference": float(np.abs(zero - still).max()),
    }


def gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how many nats a way is better than another, over books, and in the last positions."""
    by_way = {row["way"]: row for row in rows}
    made = []
    for way, other in PAIRS:
        if {way, other} <= by_way.keys():
            a, b = by_way[way], by_way[other]
            each = np.array(b["documents"]) - np.array(a["documents"])
            row = {"way": way, "other": other, "gain": float(each.mean())}
            row |= {"interval": discovery.interval(each), "worse": int((each < 0).sum())}
            made.append(row | {"last": b["curve"][-1] - a["curve"][-1]})
    return made


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Trains and scores one network after another, and writes the record after every row."""
    launch.chosen("network", settings.nets, NETS)
    settings = ml_collections.ConfigDict(settings)
    settings.update(_SMOKE if settings.smoke else {})
    check(settings)
    path = launch.new_file(out)
    validation, test = (documents_of(settings, role) for role in ("validation", "test"))
    lab = Lab(settings, time.perf_counter() + settings.seconds)
    record = provenance.of(settings) | {"trained": [], "rows": []}
    record |= {"documents": {"validation": len(validation), "test": len(test)}}
    for name in settings.nets:
        if lab.late():
            print(f"{name}: no time left", flush=True)
            continue
        record["trained"].append(lab.train(name))
        record["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(lab.nets[name]))
        launch.write_json(path, record)
        print(trained_line(record["trained"][-1]), flush=True)
        for row in score_net(lab, name, validation, test):
            record["rows"].append(row)
            record["gains"] = gains(record["rows"])
            launch.write_json(path, record)
    print(table(record["rows"], settings))
    for row in record.get("gains", ()):
        low, high = row["interval"]
        print(
            f"{row['way']} over {row['other']}: {row['gain']:+.4f} nats ({low:+.4f}, {high:+.4f}), "
            f"{row['last']:+.4f} in the last positions, worse on {row['worse']}"
        )
    return record


def check(settings: Any) -> None:
    """Raises ``UserError`` for lengths that do not fit, or networks without their start."""
    for name in ("length", "score_length", "curve"):
        if settings[name] % settings.chunk:
            raise launch.UserError(
                f"--{name} must be a multiple of --chunk; got {settings[name]} and "
                f"{settings.chunk}."
            )
    for place, name in enumerate(settings.nets):
        start = NETS[name].start
        if start and start not in settings.nets[:place]:
            raise launch.UserError(f"--nets must have {start} before {name}, which begins with it.")


def trained_line(row: dict[str, Any]) -> str:
    """A line of a training."""
    last = np.mean(row["training_nats"][-10:])
    speed = row["tokens_per_s"] or float("nan")
    part = "" if row["whole"] else ", stopped early"
    return (
        f"{row['net']}: {row['tokens'] / 1e6:.1f}M tokens, {last:.4f} nats, {speed:,.0f} tokens/s, "
        f"compilation {row['compile_seconds']:.0f} s{part}"
    )


def table(rows: Sequence[dict[str, Any]], settings: Any) -> str:
    """Nats by way: all, the first positions, those up to the training length, the last."""
    place = max(settings.length // settings.curve, 1) - 1
    lines = [f"{'':28}{'rate':>7}{'all':>9}{'first':>9}{'trained':>9}{'last':>9}"]
    for row in rows:
        curve = row["curve"]
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        parts = (row["nats"], curve[0], curve[min(place, len(curve) - 1)], curve[-1])
        lines.append(f"{row['way']:28}{rate:>7}" + "".join(f"{part:9.4f}" for part in parts))
    return "\n".join(lines)


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "tokens": flags.DEFINE_string("tokens", None, "The file of token ids."),
        "nets": flags.DEFINE_list("nets", list(NETS), "Which networks, in their order."),
        "width": flags.DEFINE_integer("width", 256, "Of the decoders.", 2),
        "depth": flags.DEFINE_integer("depth", 8, "Layers; the MLPs of the last quarter learn.", 2),
        "heads": flags.DEFINE_integer("heads", 4, "Of attention.", 1),
        "window": flags.DEFINE_integer("window", 256, "Tokens that a token sees.", 1),
        "chunk": flags.DEFINE_integer("chunk", 128, "Tokens of an inner step.", 1),
        "length": flags.DEFINE_integer("length", 4096, "Tokens of a passage in training.", 2),
        "rows": flags.DEFINE_integer("rows", 16, "Passages of a training step.", 1),
        "steps": flags.DEFINE_integer("steps", 250, "Of a training from new weights.", 1),
        "bridge_steps": flags.DEFINE_integer("bridge_steps", 50, "From the full network.", 1),
        "rate": flags.DEFINE_float("rate", 3e-3, "Outer step size.", 0.0),
        "bridge_rate": flags.DEFINE_float("bridge_rate", 1e-3, "The same of a bridge.", 0.0),
        "inner_rate": flags.DEFINE_float("inner_rate", 1.0, "Inner step size in training.", 0.0),
        "step_sizes": flags.DEFINE_list(
            "step_sizes", ["0.01", "0.03", "0.1", "0.3", "1.0"], "Inner ones that are tried."
        ),
        "remat": flags.DEFINE_integer("remat", 6, "Chunks between two kept states.", 0),
        "mixed": flags.DEFINE_bool(
            "mixed", True, "Whether steps are differentiated in mixed mode."
        ),
        "score_length": flags.DEFINE_integer("score_length", 16384, "First tokens of a book.", 2),
        "score_rows": flags.DEFINE_integer("score_rows", 16, "Books side by side.", 1),
        "books": flags.DEFINE_integer("books", 48, "Of a role, at most.", 1),
        "curve": flags.DEFINE_integer("curve", 512, "Tokens of a point of a curve.", 1),
        "dtype": flags.DEFINE_string("dtype", "bfloat16", "Of the computation."),
        "seed": flags.DEFINE_integer("seed", 0, "Of weights and passages.", 0),
        "seconds": flags.DEFINE_float("seconds", 480.0, "No training step is begun after.", 0.0),
        "smoke": flags.DEFINE_bool("smoke", False, "Tiny networks, for a CPU in a minute."),
    }
    flags.mark_flags_as_required(["out", "tokens"])
    options.start(run, _FLAGS)
