"""Low-rank adapters of many tasks in PyTorch, for :mod:`benchmarks.language`.

Two peers. ``Stacked``: the adapters of all tasks in stacked tensors, multiplied by ``bmm``, one
Adam over them (the form of github.com/openai/parameter-golf, pull request 77, the fastest that is
public), every layer compiled once, the whole step replayed as a CUDA graph. ``peft``: one task
after another, as the library's users write it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from benchmarks.language import Sizes

LEARNING_RATE, BETAS, EPSILON = 3e-3, (0.9, 0.95), 1e-10


ROPE_BASE = 1e4
# Those of the compute dtype.
LOGITS = "bfloat16" if torch.cuda.is_available() else "float32"


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every matrix of a layer."""
    narrow = sizes.kv_heads * sizes.head_size
    return {
        "query": (sizes.width, sizes.width),
        "key": (sizes.width, narrow),
        "value": (sizes.width, narrow),
        "out": (sizes.width, sizes.width),
        "gate": (sizes.width, sizes.mlp_width),
        "up": (sizes.width, sizes.mlp_width),
        "down": (sizes.mlp_width, sizes.width),
    }


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _linear(name: str, x: torch.Tensor, layer: dict[str, Any], factors: Factors) -> torch.Tensor:
    """``[N, R, inputs] -> [N, R, outputs]``; task n has the n-th of the stacked factors."""
    out = x @ layer[name]
    if name in factors:
        first, second = (factor.to(x.dtype) for factor in factors[name])
        tasks, rows = len(first), x.shape[0] * x.shape[1] // len(first)
        small = torch.bmm(x.reshape(tasks, rows, -1), first)
        out = torch.baddbmm(out.reshape(tasks, rows, -1), small, second).view(out.shape)
    return out


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def _layer(
    x: torch.Tensor,
    layer: dict[str, Any],
    factors: Factors,
    held: tuple[torch.Tensor, torch.Tensor] | None,
    turn: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer over ``[N, T, width]``, and the rotated keys and the values of its tokens."""
    batch, tokens, _ = x.shape
    size = turn[0].shape[-1] * 2

    def heads(name: str, y: torch.Tensor) -> torch.Tensor:
        return _linear(name, y, layer, factors).view(batch, tokens, -1, size).transpose(1, 2)

    y = F.rms_norm(x, x.shape[-1:], layer["norm1"], 1e-5)
    query, key = _turn(heads("query", y), *turn), _turn(heads("key", y), *turn)
    value = heads("value", y)
    every_key, every_value = key, value
    if held is not None:
        every_key, every_value = (
            torch.cat([old, new], 2) for old, new in zip(held, (key, value), strict=True)
        )
    # Flash attention without a mask in memory: the last query sees every key.
    mask = None if held is None else causal_lower_right(tokens, every_key.shape[2])
    mixed = F.scaled_dot_product_attention(
        query, every_key, every_value, attn_mask=mask, is_causal=held is None, enable_gqa=True
    )
    x = x + _linear("out", mixed.transpose(1, 2).reshape(batch, tokens, -1), layer, factors)
    y = F.rms_norm(x, x.shape[-1:], layer["norm2"], 1e-5)
    gated = F.silu(_linear("gate", y, layer, factors)) * _linear("up", y, layer, factors)
    return x + _linear("down", gated, layer, factors), key, value


def _nats(x: torch.Tensor, norm: torch.Tensor, embedding: torch.Tensor, targets: Any) -> Any:
    logits = F.rms_norm(x, x.shape[-1:], norm, 1e-5) @ embedding.T
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")


class Stacked:
    """N tasks on one frozen decoder with random weights.

    Args:
      sizes: of the decoder.
      tasks: N.
      sequences: of each task.
      context: tokens that the cache holds; 0 for sequences without.
      compile: whether a layer and the head are compiled.
    """

    def __init__(
        self,
        sizes: Sizes,
        tasks: int,
        *,
        sequences: int = 1,
        context: int = 0,
        compile: bool = True,
    ):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        make = functools.partial(torch.randn, device=self.device, dtype=dtype)
        torch.manual_seed(0)
        self.sizes, self.tasks, self.sequences = sizes, tasks, sequences
        self.embedding = 0.02 * make(sizes.vocabulary, sizes.width)
        ones = torch.ones(sizes.width, device=self.device, dtype=dtype)
        self.norm = ones
        self.layers = [
            {name: 0.02 * make(*shape) for name, shape in shapes_of(sizes).items()}
            | {"norm1": ones, "norm2": ones}
            for _ in range(sizes.depth)
        ]
        self.factors: list[Factors] = [
            {name: self._pair(*shapes_of(sizes)[name], sizes.rank) for name in sizes.targets}
            for _ in range(sizes.depth)
        ]
        self.cache = [
            tuple(
                make(tasks * sequences, sizes.kv_heads, context, sizes.head_size) for _ in range(2)
            )
            for _ in range(sizes.depth if context else 0)
        ]
        leaves = [leaf for layer in self.factors for pair in layer.values() for leaf in pair]
        cuda = self.device == "cuda"
        self.optimizer = torch.optim.Adam(
            leaves, LEARNING_RATE, BETAS, EPSILON, fused=cuda, capturable=cuda
        )
        self._run = torch.compile(_layer, dynamic=False) if compile else _layer
        self._score = torch.compile(_nats, dynamic=False) if compile else _nats

    def _pair(self, inputs: int, outputs: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.randn(self.tasks, inputs, rank, device=self.device) / math.sqrt(inputs)
        second = torch.zeros(self.tasks, rank, outputs, device=self.device)
        return first.requires_grad_(), second.requires_grad_()

    def nats(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats of every target, tokens ``[N * sequences, T]``; the cache takes the tokens in."""
        length, device = tokens.shape[1], self.device
        context = self.cache[0][0].shape[2] if self.cache else 0
        half = self.sizes.head_size // 2
        powers = torch.arange(half, device=device, dtype=torch.float32) / half
        places = torch.arange(context, context + length, device=device, dtype=torch.float32)
        angle = places[:, None] * ROPE_BASE**-powers
        turn = angle.cos(), angle.sin()
        x = self.embedding[tokens]
        for index, (layer, factors) in enumerate(zip(self.layers, self.factors, strict=True)):
            held = self.cache[index] if self.cache else None
            x, *rows = self._run(x, layer, factors, held, turn)
            if held is not None:
                with torch.no_grad():
                    for old, new in zip(held, rows, strict=True):
                        old.copy_(torch.cat([old[:, :, length:], new.detach()], 2))
        return self._score(x, self.norm, self.embedding, targets)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Scores, then one step of Adam on every task's mean."""
        nats = self.nats(tokens, targets)
        (nats.sum() * self.tasks / nats.numel()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return nats.detach()


def stacked_call(model: Stacked, length: int, steps: int, *, graph: bool) -> Callable[[], Any]:
    """What is timed: ``steps`` steps on random tokens; ends when the device is done."""
    rows = model.tasks * model.sequences
    shape = (rows, length)
    tokens, targets = (
        torch.randint(model.sizes.vocabulary, shape, device=model.device) for _ in range(2)
    )
    cuda = model.device == "cuda"
    if not (graph and cuda):

        def eager() -> Any:
            for _ in range(steps):
                nats = model.step(tokens, targets)
            if cuda:
                torch.cuda.synchronize()
            return nats

        return eager
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.step(tokens, targets)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        nats = model.step(tokens, targets)

    def replay() -> Any:
        for _ in range(steps):
            recorded.replay()
        torch.cuda.synchronize()
        return nats

    return replay


def peft_call(
    sizes: Sizes,
    *,
    sequences: int = 1,
    length: int,
    context: int = 0,
    steps: int,
    compile: bool,
) -> Callable[[], Any]:
    """One task: ``steps`` steps; with ``context``, earlier tokens are read again and not scored."""
    import peft
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    names = {"query": "q_proj", "value": "v_proj", "up": "up_proj", "down": "down_proj"}
    lora = peft.LoraConfig(r=sizes.rank, target_modules=[names[target] for target in sizes.targets])
    model = peft.get_peft_model(model, lora).train()
    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.Adam(leaves, LEARNING_RATE, BETAS, EPSILON, fused=device == "cuda")
    tokens = torch.randint(sizes.vocabulary, (sequences, context + length), device=device)
    labels = tokens.clone()
    labels[:, :context] = -100
    run = torch.compile(model, dynamic=False) if compile else model

    def call() -> Any:
        for _ in range(steps):
            loss = run(input_ids=tokens, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss

    return call
