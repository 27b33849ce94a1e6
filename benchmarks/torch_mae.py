"""TTT-MAE in PyTorch: the peers of ``ttt_mae`` in :mod:`benchmarks.vision`.

The network computes what :class:`ttt_jax.models.ViT` does, written the usual PyTorch way: one
product for query, key and value, ``scaled_dot_product_attention`` (written out for ``vmap``), mask
tokens appended and brought to their places by a gather.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import works
from ttt_jax.models.vit import sincos_positions

# The fused kernels have no vmap rule of their own for the backward pass, and the softmax inside
# their unfused form has no backward pass from float32 to bfloat16.
ATTENTION = {"torch_loop": "sdpa", "torch_func_vmap": "products"}

Autocast = Callable[[], Any]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention ``[..., T, D]`` by two products and a float32 softmax between them."""
    scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    return scores.float().softmax(-1).to(value.dtype) @ value


class Block(nn.Module):
    """Pre-norm attention and MLP (four times as wide), each added to its input."""

    def __init__(self, width: int, heads: int, attend: Attend):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, T, width] -> [N, T, width]``."""
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        mixed = self.attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Part(nn.Module):
    """Encoder or decoder: embedding, positions, blocks and a norm."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int, side: int, attend: Attend):
        super().__init__()
        self.embed, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width, 1e-6)
        self.blocks = nn.Sequential(*(Block(width, heads, attend) for _ in range(depth)))
        table = torch.from_numpy(sincos_positions(side, side, width))
        self.register_buffer("positions", table)


class Mae(nn.Module):
    """ViT with a decoder of masked autoencoders."""

    def __init__(self, sizes: works.ViTSizes, attend: Attend = F.scaled_dot_product_attention):
        super().__init__()
        pixels, side = 3 * sizes.patch**2, sizes.image_size // sizes.patch
        self.patch = sizes.patch
        self.encoder = Part(pixels, sizes.width, sizes.depth, sizes.heads, side, attend)
        widths = (sizes.width, sizes.decoder_width)
        self.decoder = Part(*widths, sizes.decoder_depth, sizes.decoder_heads, side, attend)
        self.mask_token = nn.Parameter(0.02 * torch.randn(sizes.decoder_width))
        self.pixels = nn.Linear(sizes.decoder_width, pixels)
        self.head = nn.Linear(sizes.width, sizes.classes)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """``[N, H, W, 3] -> [N, T, patch * patch * 3]``."""
        n, side, patch = len(images), images.shape[1] // self.patch, self.patch
        grid = images.reshape(n, side, patch, side, patch, 3).permute(0, 1, 3, 2, 4, 5)
        return grid.reshape(n, side * side, -1)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """``[N, H, W, 3] -> [N, classes]``."""
        x = self.encoder.embed(self.patches(images)) + self.encoder.positions
        x = self.encoder.norm(self.encoder.blocks(x))
        return self.head(x.float().mean(1))

    def loss(self, image: torch.Tensor, order: torch.Tensor, visible: int) -> torch.Tensor:
        """Mean squared error of the hidden patches of ``[H, W, 3]`` under masks ``[V, T]``.

        The first ``visible`` places of each row of ``order`` are seen.
        """
        patches, keep = self.patches(image[None])[0], order[:, :visible]
        x = self.encoder.embed(patches[keep]) + self.encoder.positions[keep]
        x = self.decoder.embed(self.encoder.norm(self.encoder.blocks(x)))
        hidden = self.mask_token.expand(len(order), order.shape[1] - visible, -1)
        x = torch.cat([x, hidden.to(x.dtype)], 1)
        x = x.gather(1, order.argsort(1)[..., None].expand(-1, -1, x.shape[-1]))
        x = self.decoder.norm(self.decoder.blocks(x + self.decoder.positions))
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        target = (patches - mean) / (variance + 1e-6).sqrt()
        errors = (self.pixels(x).float() - target).square().mean(-1)
        return errors.gather(1, order[:, visible:]).mean()

    def forward(self, method: str, *args: Any) -> torch.Tensor:
        """Calls a method, so that ``functional_call`` reaches them all."""
        return getattr(self, method)(*args)


def masks(sizes: works.ViTSizes, device: str) -> torch.Tensor:
    """Random orders of the patches, ``[masks, T]``."""
    return torch.rand(sizes.copies, sizes.tokens, device=device).argsort(1)


def loop(
    net: Mae, images: torch.Tensor, sizes: works.ViTSizes, num_steps: int, cast: Autocast
) -> torch.Tensor:
    """One image after another, weights restored and a new optimizer for each."""
    pristine = copy.deepcopy(net.state_dict())
    net.requires_grad_(False)
    net.encoder.requires_grad_(True)
    logits = []
    for image in images:
        net.load_state_dict(pristine)
        optimizer = torch.optim.SGD(
            net.encoder.parameters(), works.MAE_LEARNING_RATE, works.MAE_MOMENTUM
        )
        for _ in range(num_steps):
            order = masks(sizes, images.device)
            with cast():
                loss = net.loss(image, order, sizes.visible)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad(), cast():
            logits.append(net.classify(image[None]))
    net.load_state_dict(pristine)
    return torch.cat(logits)


def func_vmap(
    net: Mae, images: torch.Tensor, sizes: works.ViTSizes, num_steps: int, cast: Autocast
) -> torch.Tensor:
    """All images at once, each with its own encoder."""
    params = {name: leaf.detach() for name, leaf in net.named_parameters()}
    pristine = {name: leaf for name, leaf in params.items() if name.startswith("encoder.")}
    call = torch.func.functional_call

    def objective(fast: Any, image: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return call(net, {**params, **fast}, ("loss", image, order, sizes.visible))

    def adapted_logits(image: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
        fast, momentum = pristine, {name: torch.zeros_like(p) for name, p in pristine.items()}
        for order in orders.unbind(0):
            gradient = torch.func.grad(objective)(fast, image, order)
            momentum = {
                name: works.MAE_MOMENTUM * trace + gradient[name]
                for name, trace in momentum.items()
            }
            fast = {name: p - works.MAE_LEARNING_RATE * momentum[name] for name, p in fast.items()}
        return call(net, {**params, **fast}, ("classify", image[None]))[0]

    orders = torch.stack(
        [
            torch.stack([masks(sizes, images.device) for _ in range(num_steps)])
            for _ in range(len(images))
        ]
    )
    with torch.no_grad(), cast():
        return torch.func.vmap(adapted_logits)(images, orders)


def mae_call(case: Any, device: str, cast: Autocast) -> Callable[[], torch.Tensor]:
    """What is timed of ``ttt_mae``."""
    side = case.sizes.image_size
    alone = case.way == "torch_loop"
    net = Mae(case.sizes, F.scaled_dot_product_attention if alone else products).to(device)
    images = torch.rand(case.samples, side, side, 3, device=device)
    way = loop if alone else func_vmap
    return lambda: way(net, images, case.sizes, case.num_steps, cast)
