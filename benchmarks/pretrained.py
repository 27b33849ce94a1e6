"""Is a pretrained decoder read right? Nats per token of isolated windows of a text.

``python -m benchmarks.pretrained --weights=PARTS --texts=FILE.jsonl.xz --title=TITLE --out=FILE``
scores the first windows of 512 tokens, each a sequence of its own, in float32 products of full
precision. Without a token that begins a text, the first of a window has no score.
"""

import json
import lzma
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from benchmarks import options
from experiments import launch, provenance
from ttt_jax import models
from ttt_jax.losses.tokens import token_nats


def read_text(path: str, title: str) -> str:
    """The text of the row that has this title.

    Raises:
      UserError: no row has.
    """
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        if row["title"] == title:
            return str(row["text"])
    raise launch.UserError(
        f"--title needs one of the file's; got {title!r}. Titles: "
        f"{', '.join(row['title'] for row in rows[:5])} ..."
    )


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Scores the windows and writes the record."""
    path = launch.new_file(out)
    made = models.load_gguf(tuple(settings.weights))
    if made.tokenizer is None:
        raise launch.UserError("--weights needs a file with a tokenizer.")
    length, bos = settings.window, made.tokenizer.bos
    # A token has four characters or more in the mean; what is left over does no harm.
    text = read_text(settings.texts, settings.title)[: 8 * length * settings.windows]
    ids = jnp.asarray(made.tokenizer.encode(text)[: length * settings.windows], jnp.int32)
    windows = ids.reshape(settings.windows, length)
    if bos is not None:
        windows = jnp.concatenate([jnp.full((len(windows), 1), bos, jnp.int32), windows], 1)

    @jax.jit
    def score(params: Any, window: Any) -> jax.Array:
        logits = made.module.apply(params, window[None])[0]
        return token_nats(logits[:-1], window[1:]).mean()

    with jax.default_matmul_precision("highest"):
        nats = [float(score(made.params, window)) for window in windows]
    row = {
        "model": made.name,
        "window": length,
        "scored_tokens": windows.shape[1] - 1,
        "bos": bos,
        "title": settings.title,
        "nats_per_token": nats,
    }
    record = provenance.of(settings) | {"rows": [row]}
    launch.write_json(path, record)
    for index, value in enumerate(nats):
        print(f"window {index}: {value:.4f} nats per token")
    return record


if __name__ == "__main__":
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "weights": flags.DEFINE_list("weights", None, "The GGUF file, or its parts."),
        "texts": flags.DEFINE_string("texts", None, "A *.jsonl.xz of titles and texts."),
        "title": flags.DEFINE_string("title", "Pride and Prejudice", "Of the text."),
        "window": flags.DEFINE_integer("window", 512, "Tokens of a window.", 2),
        "windows": flags.DEFINE_integer("windows", 6, "How many.", 1),
    }
    flags.mark_flags_as_required(("out", "weights", "texts"))
    options.start(run, _FLAGS)
