"""A tiny random decoder of bytes and tiny written tasks, for a CPU."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import models
from ttt_jax.data.few_shot import Example

SETTINGS = {"shots": 4, "context": 512, "rank": 2, "steps": (2,), "every": 1, "rows": 2}
SETTINGS |= {"tasks_at_once": 3, "batch": 4}


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    bos = None
    eos = None

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text; broken UTF-8 becomes U+FFFD."""
        return bytes(ids).decode(errors="replace")


def model() -> tuple[models.Decoder, dict]:
    """The decoder and its parameters."""
    module = models.Decoder(
        vocabulary=256, width=32, depth=2, heads=2, kv_heads=1, mlp_width=32, attention="xla"
    )
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def tasks(count: int = 12) -> dict[str, list[Example]]:
    """Three tasks, one of each kind of answer."""
    rng = np.random.default_rng(0)

    def word(size: int) -> str:
        return "".join(rng.choice(list("abcdefgh"), size, replace=False))

    def first(place: int) -> Example:
        letters = word(2 + place % 2)
        listed = "".join(f"\n({'ABC'[n]}) {sign}" for n, sign in enumerate(letters))
        right = "ABC"[letters.index(min(letters))]
        return Example(f"Which letter is the first?\nOptions:{listed}", f"({right})")

    def larger(place: int) -> Example:
        return Example(f"Is {place} larger than 5?", "yes" if place > 5 else "no")

    def turned(place: int) -> Example:
        text = word(4)
        return Example(f"Turn around: {text}", text[::-1])

    makers = {"first": first, "larger": larger, "turned": turned}
    return {name: [make(place) for place in range(count)] for name, make in makers.items()}
