"""A small causal transformer over bytes."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ByteDecoder(nn.Module):
    """Predicts each byte of a chunk from those before it.

    Attributes:
      length: bytes of a chunk, at most.
      width: of the residual stream.
      depth: number of blocks.
      heads: of attention.
    """

    length: int
    width: int = 64
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """``[N, L] -> logits [N, L, 256]``; position i sees tokens before i alone."""
        before = jnp.pad(tokens[:, :-1] + 1, ((0, 0), (1, 0)))  # 0 begins a chunk
        positions = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        x = nn.Embed(257, self.width, name="embed")(before) + positions[None, : tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for index in range(self.depth):
            y = nn.LayerNorm(name=f"attention_norm_{index}")(x)
            attention = nn.MultiHeadDotProductAttention(self.heads, name=f"attention_{index}")
            x = x + attention(y, y, mask=mask)
            y = nn.LayerNorm(name=f"mlp_norm_{index}")(x)
            y = nn.Dense(4 * self.width, name=f"mlp_in_{index}")(y)
            x = x + nn.Dense(self.width, name=f"mlp_out_{index}")(nn.gelu(y))
        return nn.Dense(256, name="out")(nn.LayerNorm(name="norm")(x))
