"""MEMO with ResNet-50 in PyTorch, for :mod:`benchmarks.chunks`: every form that may be its best.

One image after another with an optimizer, as published code does, or ``torch.func.vmap`` over
``torch.func.grad``; memory format ``channels_last`` or not; compiled or not; in bfloat16 autocast.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.imagenet import CLASSES, LEARNING_RATE, PADDING, STAGES

Stages = tuple[tuple[int, int], ...]


class Form(NamedTuple):
    """A way to the same work: ``loop`` or ``vmap`` with so many at once, and how it is run."""

    way: str
    chunk_size: int
    channels_last: bool
    compile: str | None

    @property
    def name(self) -> str:
        """For a person."""
        words = [self.way] + [f"{self.chunk_size} at once"] * (self.way == "vmap")
        words += ["channels_last"] * self.channels_last
        return ", ".join(words + [f"torch.compile {self.compile}"] * bool(self.compile))


def forms() -> Iterator[Form]:
    """All that are tried."""
    for channels_last, compile in itertools.product((True, False), (None, "default")):
        yield Form("loop", 1, channels_last, compile)
    yield Form("loop", 1, True, "reduce-overhead")
    for size, channels_last in itertools.product((1, 4), (True, False)):
        yield Form("vmap", size, channels_last, None)
    for size, mode in itertools.product((1, 4), ("default", "reduce-overhead")):
        yield Form("vmap", size, False, mode)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 with four times the width."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        sizes = ((channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in sizes
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in sizes)
        self.shortcut = nn.Sequential()
        if channels != 4 * width or stride != 1:
            conv = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, C, H, W] -> [N, 4 width, H / stride, W / stride]``."""
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.relu(y) if index < 2 else y
        return F.relu(y + self.shortcut(x))


class ResNet50(nn.Module):
    """The network of :class:`benchmarks.imagenet.ResNet50`, in evaluation mode."""

    def __init__(self, stages: Stages = STAGES, classes: int = CLASSES):
        super().__init__()
        channels = stages[0][1]
        self.conv = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        blocks = []
        for stage, (count, width) in enumerate(stages):
            for block in range(count):
                blocks.append(Bottleneck(channels, width, 2 if stage and not block else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, 3, H, W] -> [N, classes]``."""
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


def crops(images: torch.Tensor, count: int) -> torch.Tensor:
    """Random crops ``[S, count, 3, H, W]`` of edge-padded images, drawn at once."""
    samples, _, size, _ = images.shape
    padded = F.pad(images, (PADDING,) * 4, mode="replicate").permute(0, 2, 3, 1)
    pixels = torch.arange(size, device=images.device)
    at = torch.randint(2 * PADDING + 1, (2, samples, count, 1, 1), device=images.device)
    sample = torch.arange(samples, device=images.device).view(-1, 1, 1, 1)
    cut = padded[sample, pixels.view(-1, 1) + at[0], pixels + at[1]]
    return cut.permute(0, 1, 4, 2, 3)


def marginal_entropy(logits: torch.Tensor) -> torch.Tensor:
    """``H(mean_j p_j)`` of ``[views, classes]``."""
    mean = logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return -(mean.exp() * mean).sum()


def loop(
    net: nn.Module, run: Callable[..., Any], images: torch.Tensor, drawn: torch.Tensor, cast: Any
) -> torch.Tensor:
    """One image after another: restore, one step, predict. ``run`` is the net, or compiled."""
    pristine = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
    logits = []
    for inputs, image in zip(drawn, images.split(1), strict=True):
        net.load_state_dict(pristine)
        with cast():
            loss = marginal_entropy(run(inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad(), cast():
            logits.append(run(image).float().clone())
    net.load_state_dict(pristine)
    return torch.cat(logits)


def func_vmap(
    net: nn.Module,
    images: torch.Tensor,
    drawn: torch.Tensor,
    cast: Any,
    size: int,
    compile: str | None,
) -> torch.Tensor:
    """``size`` images at once, each with its own parameters."""
    params = {name: leaf.detach() for name, leaf in net.named_parameters()}

    def objective(params: Any, inputs: torch.Tensor) -> torch.Tensor:
        return marginal_entropy(torch.func.functional_call(net, params, (inputs,)))

    def adapted(image: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        gradient = torch.func.grad(objective)(params, inputs)
        fast = {name: leaf - LEARNING_RATE * gradient[name] for name, leaf in params.items()}
        return torch.func.functional_call(net, fast, (image[None],))[0].float()

    many = torch.func.vmap(adapted)
    many = torch.compile(many, mode=compile) if compile else many
    with torch.no_grad(), cast():
        parts = zip(images.split(size), drawn.split(size), strict=True)
        return torch.cat([many(*part) for part in parts])


def call_of(form: Form, samples: int, views: int, size: int, net: nn.Module) -> Callable[[], Any]:
    """What is timed of a form: a call that returns when the device is done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    net = net.to(device, memory_format=layout)
    images = torch.rand(samples, 3, size, size, device=device)

    def cast() -> Any:
        return torch.autocast(device, torch.bfloat16)

    run = torch.compile(net, mode=form.compile) if form.compile else net

    def adapted() -> torch.Tensor:
        drawn = crops(images, views)
        drawn = drawn if form.channels_last else drawn.contiguous()
        if form.way == "loop":
            return loop(net, run, images, drawn, cast)
        return func_vmap(net, images, drawn, cast, form.chunk_size, form.compile)

    def call() -> torch.Tensor:
        logits = adapted()
        if device == "cuda":
            torch.cuda.synchronize()
        return logits

    return call
