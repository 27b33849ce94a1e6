"""The PyTorch peers of :mod:`benchmarks.vision`; imports torch, which is no dependency of ours.

Three ways to the same work: ``torch_loop``, one sample after another as in published code of
test-time training (restore the weights, one optimizer step, predict); ``torch_func_vmap``, all
samples at once with ``torch.func.vmap`` over ``torch.func.grad``; and for batches ``torch_ttt``,
the engine of that package. The first two draw all views of a call's samples with one indexing
operation, so that neither waits for augmentation.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import torch_mae, works

TURNS = 4
LEARNING_RATE, PADDING = works.ROTATION_LEARNING_RATE, works.PADDING
ATTENTION = torch_mae.ATTENTION


def norm_of(channels: int, groups: int | None) -> nn.Module:
    """GroupNorm, or for ``None`` BatchNorm.

    It keeps no running statistics: torch-ttt puts the model into evaluation mode, where BatchNorm
    would otherwise use those of the source instead of the batch's, as Tent prescribes.
    """
    if groups is None:
        return nn.BatchNorm2d(channels, track_running_stats=False)
    return nn.GroupNorm(groups, channels)


class Block(nn.Module):
    """Pre-activation basic block; the shortcut averages 2x2 pixels and pads channels with zeros."""

    def __init__(self, channels: int, features: int, stride: int, groups: int | None):
        super().__init__()
        self.stride, self.extra = stride, features - channels
        self.norm1 = norm_of(channels, groups)
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.norm2 = norm_of(features, groups)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, C, H, W] -> [N, features, H / stride, W / stride]``."""
        shortcut = F.avg_pool2d(x, 2) if self.stride == 2 else x
        if self.extra:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.extra))
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x))) + shortcut


class Branch(nn.Module):
    """The last layer of blocks, norm, pooling and a linear head."""

    def __init__(self, layer: nn.Module, channels: int, groups: int | None, outputs: int):
        super().__init__()
        self.layer, self.norm = layer, norm_of(channels, groups)
        self.fc = nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, C, H, W] -> [N, outputs]``."""
        return self.fc(F.relu(self.norm(self.layer(x))).mean((2, 3)))


class Net(nn.Module):
    """ResNet whose rotation branch leaves it after the second layer; BatchNorm for batches."""

    def __init__(self, sizes: works.ResNetSizes):
        super().__init__()
        width, groups = sizes.width, sizes.groups if sizes.batch == 1 else None

        def layer(channels: int, features: int, stride: int) -> nn.Module:
            first = Block(channels, features, stride, groups)
            blocks = (sizes.depth - 2) // 6
            rest = (Block(features, features, 1, groups) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        self.shared = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False),
            layer(width, width, 1),
            layer(width, 2 * width, 2),
        )
        last = layer(2 * width, 4 * width, 2)
        self.main = Branch(last, 4 * width, groups, sizes.classes)
        self.rotation = Branch(copy.deepcopy(last), 4 * width, groups, TURNS)

    def forward(self, x: torch.Tensor, head: str = "main") -> torch.Tensor:
        """``[N, 3, H, W] -> [N, classes]``, or ``[N, 4]`` from the head called ``rotation``."""
        return getattr(self, head)(self.shared(x))


def views(images: torch.Tensor, copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops of the edge-padded images, each turned by a random right angle.

    Returns:
      ``[S, copies, 3, H, W]`` and the turns ``[S, copies]``.
    """
    samples, _, size, _ = images.shape
    device = images.device
    padded = F.pad(images, (PADDING,) * 4, mode="replicate").permute(0, 2, 3, 1)
    rows, columns = torch.meshgrid(
        *(torch.arange(size, device=device) for _ in range(2)), indexing="ij"
    )
    turned = [torch.stack([torch.rot90(c, k) for k in range(TURNS)]) for c in (rows, columns)]
    turns = torch.randint(TURNS, (samples, copies), device=device)
    offsets = torch.randint(2 * PADDING + 1, (2, samples, copies, 1, 1), device=device)
    sample = torch.arange(samples, device=device).view(-1, 1, 1, 1)
    cut = padded[sample, turned[0][turns] + offsets[0], turned[1][turns] + offsets[1]]
    return cut.permute(0, 1, 4, 2, 3).contiguous(), turns


def adapted(net: Net, norm_only: bool) -> list[str]:
    """The names of the parameters that a step changes."""
    norms = {name for name, module in net.named_modules() if isinstance(module, nn.GroupNorm)}
    names = (name for name, _ in net.named_parameters())
    return [name for name in names if not norm_only or name.rpartition(".")[0] in norms]


Autocast = Callable[[], Any]


def loop(
    net: Net, names: list[str], images: torch.Tensor, copies: int, num_steps: int, cast: Autocast
) -> torch.Tensor:
    """One sample after another with an optimizer, as published code does."""
    pristine = copy.deepcopy(net.state_dict())
    for name, leaf in net.named_parameters():
        leaf.requires_grad_(name in names)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], LEARNING_RATE)
    logits = []
    for image in images.split(1):
        net.load_state_dict(pristine)
        for _ in range(num_steps):
            inputs, turns = views(image, copies)
            with cast():
                loss = F.cross_entropy(net(inputs[0], "rotation").float(), turns[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad(), cast():
            logits.append(net(image))
    net.load_state_dict(pristine)
    return torch.cat(logits)


def func_vmap(
    net: Net, names: list[str], images: torch.Tensor, copies: int, num_steps: int, cast: Autocast
) -> torch.Tensor:
    """All samples at once, each with its own parameters."""
    params = {name: leaf.detach() for name, leaf in net.named_parameters()}
    call = torch.func.functional_call

    def objective(fast: Any, inputs: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        logits = call(net, {**params, **fast}, (inputs, "rotation"))
        return F.cross_entropy(logits.float(), turns)

    def adapted_logits(image: torch.Tensor, *drawn: torch.Tensor) -> torch.Tensor:
        fast = {name: params[name] for name in names}
        for inputs, turns in zip(drawn[::2], drawn[1::2], strict=True):
            gradient = torch.func.grad(objective)(fast, inputs, turns)
            fast = {name: fast[name] - LEARNING_RATE * gradient[name] for name in names}
        return call(net, {**params, **fast}, (image[None],))[0]

    drawn = [array for _ in range(num_steps) for array in views(images, copies)]
    with torch.no_grad(), cast():
        return torch.func.vmap(adapted_logits)(images, *drawn)


def torch_ttt(net: Net, images: torch.Tensor, batch: int, num_steps: int, cast: Autocast) -> Any:
    """One batch after another through the package's Tent engine, a copy of the model for each."""
    from torch_ttt.engine.tent_engine import TentEngine

    options = {"optimizer_name": "adam", "lr": works.TENT_LEARNING_RATE}
    engine = TentEngine(net, {**options, "num_steps": num_steps, "copy_model": True}).eval()
    with cast():
        return torch.cat([engine(part)[0] for part in images.split(batch)])


def resnet_call(case: Any, device: str, cast: Autocast) -> Callable[[], torch.Tensor]:
    """What is timed of a work on the ResNet."""
    sizes = case.sizes
    # vmap has no channels_last, and on a CPU GroupNorm in that format crashes in the backward pass
    # where its input needs no gradient (torch 2.13).
    fast = device == "cuda" and case.way != "torch_func_vmap"
    layout = torch.channels_last if fast else torch.contiguous_format
    net = Net(sizes).to(device, memory_format=layout)
    images = torch.rand(case.samples, 3, sizes.image_size, sizes.image_size, device=device)
    if case.way == "torch_ttt":
        images = images.to(memory_format=layout)
        return lambda: torch_ttt(net, images, sizes.batch, case.num_steps, cast)
    names = adapted(net, norm_only=case.work == "rotation_norm_only")
    way = {"torch_loop": loop, "torch_func_vmap": func_vmap}[case.way]
    return lambda: way(net, names, images, sizes.copies, case.num_steps, cast)


def measure(
    case: Any, clock: Callable[[Callable[[], Any]], float]
) -> tuple[float, None, int | None, str]:
    """Times a case, an ``benchmarks.vision.Case`` of bfloat16 (autocast) or float32 (TF32 allowed).

    Args:
      case: what to time.
      clock: seconds of a call; it warms up first.

    Returns:
      Seconds of a call, no seconds of compilation, peak bytes on a GPU, and the precision.
    """
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    half = case.dtype == "bfloat16"

    def cast() -> Any:
        return torch.autocast(device, torch.bfloat16, enabled=half)

    build = torch_mae.mae_call if case.work == "ttt_mae" else resnet_call
    timed = build(case, device, cast)

    def call() -> None:
        logits = timed()
        if on_gpu:
            torch.cuda.synchronize()
        assert logits.shape == (case.samples, case.sizes.classes)

    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = clock(call)
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
    return seconds, None, peak, "bf16" if half else ("tf32" if on_gpu else "ieee")
