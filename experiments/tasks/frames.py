"""Frames with a class per pixel: digits that move over a canvas, under shifts of the picture.

A stream is a video, ``x[N, S, S, 1]`` in [0, 1]; ``y[N, S, S]`` is 0 for background and 1 plus the
digit's class where its ink is. The score is the mean intersection over union.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import ttt_jax as ttt
from experiments.config_keys import NEEDED, Key, whole
from ttt_jax import data, losses, metrics, models
from ttt_jax.task import Examples, Task

NUM_CLASSES = 11
SHIFTS = {"validation": ("dark",), "reported": ("clean", "noise", "faded")}

# The keys that this task reads, beside those of all.
KEYS = {
    "data.frames": Key(whole(1), "frames of a video", NEEDED),
    "data.side": Key(whole(8), "pixels along a side of the canvas", NEEDED),
    "model.width": Key(whole(1), "channels of the first layer", NEEDED),
}


class PixelNet(nn.Module):
    """Two layers of convolutions; heads for classes and for the clean picture."""

    width: int = 16

    def setup(self) -> None:
        """Makes the layers."""
        self.first = nn.Conv(self.width, (3, 3))
        self.norm = nn.GroupNorm(num_groups=4)
        self.second = nn.Conv(self.width, (5, 5))
        self.classes = nn.Conv(NUM_CLASSES, (1, 1))
        self.picture = nn.Conv(1, (1, 1))

    def __call__(self, frames: jax.Array) -> jax.Array:
        """``[N, S, S, 1] -> logits [N, S, S, 11]``."""
        return self.classes(self._features(frames))

    def denoise(self, frames: jax.Array) -> jax.Array:
        """The clean frames, ``[N, S, S, 1]``."""
        return self.picture(self._features(frames))

    def both(self, frames: jax.Array) -> Any:
        """All heads, for initialization."""
        return self(frames), self.denoise(frames)

    def _features(self, frames: jax.Array) -> jax.Array:
        return nn.relu(self.second(nn.relu(self.norm(self.first(frames)))))


def task(config: ml_collections.ConfigDict) -> Task:
    """The task of a config: ``data.side`` S, ``data.frames`` N of a video."""
    net = PixelNet(width=config.model.width)
    classify, denoise = models.from_linen(net), models.from_linen(net, "denoise")

    def loss(params: Any, examples: Examples, key: jax.Array) -> jax.Array:
        logits = classify(params, examples.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, examples.y).mean()

    def streams(role: str, seed: int) -> dict[str, Any]:
        split = "test" if role == "reported" else "train[1257:]"
        shifts = SHIFTS["reported" if role == "reported" else "validation"]
        return {shift: _video(config, split, shift, seed) for shift in shifts}

    return Task(
        name="moving digits",
        init=lambda key: net.init(
            key, jnp.zeros((1, config.data.side, config.data.side, 1)), method="both"
        ),
        heads=lambda: {"classify": classify, "denoise": denoise},
        augment=None,
        loss=loss,
        training=lambda seed: _Training(config, seed),
        streams=streams,
        metrics={
            "pixel_error": metrics.mean(
                lambda output, source, examples: (metrics.classes(output) != examples.y).mean(
                    (1, 2)
                )
            ),
            "mean_iou": metrics.mean_iou(NUM_CLASSES),
        },
        chooses="pixel_error",
    )


def denoising(denoise: Callable[..., Any]) -> Callable[..., jax.Array]:
    """The auxiliary loss of training, over a batch of frames."""
    return losses.denoising(denoise, noise=0.2, batch=True)


def denoising_online(
    classify: Callable[..., Any],
    denoise: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation,
    select: ttt.Selection = ttt.select.everything(),  # noqa: B008 (immutable)
    num_steps: int = 1,
    noise: float = 0.2,
) -> ttt.Stream:
    """Denoising steps on each frame of a video, kept for the next.

    Args:
      classify: model function of the classes.
      denoise: model function of the clean frames.
      optimizer: of the steps.
      select: what adapts.
      num_steps: steps per frame.
      noise: standard deviation added to the copies.
    """
    loss = losses.denoising(denoise, noise=noise, num_copies=2)
    return ttt.online(
        ttt.gradient_adapter(loss, optimizer, select=select),
        ttt.unbatched(classify),
        num_steps=num_steps,
        reset=ttt.resets.never(),
        predict="after",
    )


def _video(config: Any, split: str, shift: str, seed: int) -> list[Examples]:
    source = data.load("tfds:digits", split)
    rng = np.random.default_rng((seed, 11))
    count, side = config.data.frames, config.data.side
    frames, labels = _frames(source, rng, count, side, moving=True)
    frames = {
        "clean": lambda: frames,
        "noise": lambda: np.clip(frames + rng.normal(0, 0.3, frames.shape), 0, 1),
        "faded": lambda: 0.5 * frames + 0.25,
        "dark": lambda: 0.6 * frames,
    }[shift]().astype(np.float32)
    tags = {"shift": np.full(count, shift)}
    examples = Examples(np.arange(count), frames, labels, tags)
    return list(ttt.task.in_batches([examples], config.adapt.batch_size))


def _frames(
    source: Any, rng: np.random.Generator, count: int, side: int, *, moving: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Digits on canvases, one after the other along a line where they move."""
    digits = source.take(rng.integers(len(source), size=count // 16 + 1 if moving else count))
    frames = np.zeros((count, side, side, 1), np.float32)
    labels = np.zeros((count, side, side), np.int32)
    size = digits.image.shape[1]
    for index in range(count):
        digit = index // 16 if moving else index
        span = side - size + 1
        row, column = rng.integers(span, size=2)
        if moving:
            row, column = (digit * 3) % span, index % span
        image = digits.image[digit]
        frames[index, row : row + size, column : column + size] = image
        ink = image[..., 0] > 0.25
        labels[index, row : row + size, column : column + size] = ink * (1 + digits.label[digit])
    return frames, labels


@dataclasses.dataclass(frozen=True)
class _Training:
    """Training frames; see :class:`ttt_jax.task.TrainingData`."""

    config: Any
    seed: int

    def __iter__(self) -> Iterator[Examples]:
        steps = self.steps(0)
        return iter([next(steps) for _ in range(16)])

    def steps(self, start: int) -> Iterator[Examples]:
        """Digits anywhere on the canvas, the same ones at step k wherever it began."""
        source = data.load("tfds:digits", "train[:1257]").in_memory()
        size, step = self.config.train.batch_size, start
        while True:
            rng = np.random.default_rng((self.seed, step))
            frames, labels = _frames(source, rng, size, self.config.data.side, moving=False)
            yield Examples(np.arange(size), frames, labels, {})
            step += 1
