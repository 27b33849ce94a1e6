"""The small world that the calls live in: a model, data, and one of each thing of the contract."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from tests.core import models
from ttt_jax import data, evaluation, losses, metrics, resets, select
from ttt_jax.task import Examples, Task

KEY = jax.random.key(0)
KEYS = ttt.sample_keys(KEY, np.arange(4))
PARAMS = models.make_params()
IMAGES = np.asarray(models.make_images(4))
IMAGE = IMAGES[0]
COLORS = np.random.default_rng(3).uniform(size=(8, 8, 3)).astype(np.float32)
BYTES = (255 * COLORS).astype(np.uint8)
LOGITS = np.random.default_rng(4).normal(size=(4, 3)).astype(np.float32)
OTHER_LOGITS = np.random.default_rng(5).normal(size=(4, 3)).astype(np.float32)
MAP = np.random.default_rng(6).normal(size=(2, 3, 4, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1])
VECTORS = np.random.default_rng(7).normal(size=(4, models.WIDTH)).astype(np.float32)
MOMENTS = losses.feature_moments(models.features)(PARAMS, IMAGES)
FEW = select.paths(r"params/norm/.*")
SGD = optax.sgd(0.1)
one = ttt.unbatched(models.classify)
entropy = losses.entropy(models.classify)
ADAPTER = ttt.gradient_adapter(entropy, SGD, select=FEW)
PREDICT = ttt.episodic(ADAPTER, one, num_steps=1)
STREAM = ttt.online(ADAPTER, one, reset=resets.never())
RESET = resets.every(2)
MODULE = nn.Dense(3)


class Net(nn.Module):
    """One BatchNorm layer between two dense ones."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x))


NET = Net()


def train_statistics(params, images):
    """Logits, and the statistics that they were normalized with."""
    moments = models.batch_moments(params, images)
    return models.classify(params, images), moments


def turn_statistics(params, images):
    return models.turn(params, images), models.batch_moments(params, images)


def views(image):
    return jnp.stack([image, image[:, ::-1]])


def linear(params):
    head = params["params"]["head"]
    return head["kernel"], head["bias"]


def main_loss(params, x, label, key):
    return -jax.nn.log_softmax(one(params, x))[label]


def make(rate):
    return ttt.gradient_adapter(entropy, optax.sgd(rate), select=FEW)


def always(params, x, key):
    return jnp.ones((), bool)


def neighbors_of(params, x):
    return jnp.stack([x, x])


def over_batch_adapter():
    loss = losses.entropy(models.classify, batch=True)
    return ttt.gradient_adapter(loss, SGD, select=FEW)


def examples(start=0):
    tags = {"domain": np.array(["a", "a", "b", "b"])}
    return Examples(np.arange(start, start + 4), IMAGES, LABELS, tags)


def task():
    return Task(
        name="toy",
        init=lambda key: PARAMS,
        heads=lambda: {"classify": models.classify, "rotation": models.turn},
        augment=None,
        loss=lambda params, examples, key: models.classify(params, examples.x).sum(),
        training=lambda seed: [examples(8)],
        streams=lambda role, seed: {"v": [examples(seed)]},
        metrics={"error": metrics.error()},
        chooses="error",
    )


TASK = task()
ROW = evaluation.Row(
    method="m", stream="v", tags={}, num_examples=4, sums={}, values={"error": 0.5}, counts={},
    seconds=0.0, compile_seconds=0.0, id=np.arange(4), each={},
)  # fmt: skip


@dataclasses.dataclass
class Reader:
    """Twelve images of three classes, in memory."""

    num_classes: int = 3
    class_names: tuple | None = None
    image_shape: tuple = (6, 6, 1)

    def __len__(self):
        return 12

    def image(self, position):
        return IMAGES[position % 4].clip(0, 1)

    def labels(self):
        return np.arange(12, dtype=np.int32) % 3

    def ids(self):
        return np.arange(12)


SOURCE = data.Source("toy", "train", Reader())
PLAN = data.streams.sequential(SOURCE)


class Batches:
    """What source statistics are taken over."""

    split = "train"

    def __iter__(self):
        return iter([IMAGES, IMAGES[:2]])


def net_params():
    return NET.init(KEY, IMAGES)


over_batch_loss = losses.entropy(models.classify, batch=True)
