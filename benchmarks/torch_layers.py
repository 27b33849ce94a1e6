"""Layers of flash-linear-attention on a GPU, beside those of :mod:`benchmarks.layers`."""

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from fla.ops.delta_rule import chunk_delta_rule
from fla.ops.ttt import chunk_ttt_linear, fused_chunk_ttt_linear

CHUNK = 16


def _tokens(batch: int, tokens: int, heads: int, width: int) -> list[torch.Tensor]:
    made = [
        torch.randn(batch, tokens, heads, width, device="cuda", dtype=torch.bfloat16) * 0.3
        for _ in range(3)
    ]
    return [tensor.requires_grad_() for tensor in made]


def calls(
    way: str, sizes: tuple[int, int, int, int]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward, and forward and backward; each returns when it was started.

    Args:
      way: ``"fla_chunk"``, ``"fla_fused"`` (TTT-Linear) or ``"fla_delta"``.
      sizes: sequences, tokens, heads and width.

    The gamma and beta of TTT-Linear have the dtype of q: others do not compile backward.
    """
    batch, tokens, heads, width = sizes
    q, k, v = _tokens(*sizes)
    gate = torch.rand(batch, tokens, heads, device="cuda", dtype=torch.bfloat16).requires_grad_()
    leaves = [q, k, v, gate]
    if way == "fla_delta":
        keys = functional.normalize(k.detach().float(), dim=-1).bfloat16().requires_grad_()
        leaves[1] = keys

        def forward() -> torch.Tensor:
            out, _ = chunk_delta_rule(q, keys, v, gate)
            return out
    else:
        function = {"fla_chunk": chunk_ttt_linear, "fla_fused": fused_chunk_ttt_linear}[way]
        norm = [
            torch.full((heads, width), value, device="cuda", dtype=torch.bfloat16)
            for value in (1.0, 0.0)
        ]
        gamma, beta = (leaf.requires_grad_() for leaf in norm)
        leaves += [gamma, beta]

        def forward() -> torch.Tensor:
            made = function(q, k, v, gamma, beta, gate[..., None] / width, chunk_size=CHUNK)
            return made[0] if isinstance(made, tuple) else made

    dout = torch.randn(batch, tokens, heads, width, device="cuda", dtype=torch.bfloat16)

    def only_forward() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward(), leaves, dout)

    return only_forward, both


def median_ms(call: Callable[[], None], repeats: int, count: int) -> float:
    """Median milliseconds of a call among ``count`` that follow each other, after warm-up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / count)
    return sorted(times)[len(times) // 2]
