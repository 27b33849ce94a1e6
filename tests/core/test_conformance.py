"""Every loss x selection, loss x adapter and selection x adapter keeps the library's promises.

One program per cell measures them all: parallel equals the loop; order, chunks, padding and
batch mates do not matter; a NaN instance leaves the others bitwise alone, in streams too; zero
steps are the source prediction. The pristine parameters are compared byte by byte. The cells
cover every pair; ``make test-full`` runs the whole product.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import losses, select

from . import models
from .compiling import quickly

N = 5
PARAMS = models.make_params()
PRISTINE = models.snapshot(PARAMS)
KEYS = ttt.sample_keys(jax.random.key(0), jnp.arange(N))
IMAGES = models.make_images(N)
BATCHES = models.make_images(N, batch=2)
TRAINING = models.make_images(8, seed=2)

LOSSES = {
    "rotation": losses.rotation(models.turn),
    "masked_reconstruction": losses.masked_reconstruction(models.reconstruct, patch=models.PATCH),
    "denoising": losses.denoising(models.decode, noise=0.3, num_copies=2),
    "contrastive": losses.contrastive(
        models.features, models.jitter, bank=models.features(PARAMS, TRAINING)
    ),
    "activation_matching": losses.activation_matching(
        models.activations,
        losses.activation_moments(models.activations)(PARAMS, TRAINING),
        augment=models.jitter,
        num_views=2,
    ),
    "moment_matching": losses.moment_matching(
        models.features,
        losses.feature_moments(models.features)(PARAMS, TRAINING),
        mean_weight=1.0,
        covariance_weight=1.0,
        queue=3,
    ),
    "entropy": losses.entropy(models.classify),
    "marginal_entropy": losses.marginal_entropy(models.classify, models.jitter, num_views=2),
    "pseudo_label": losses.pseudo_label(models.classify, threshold=0.1),
    "reliable_entropy": losses.reliable_entropy(models.classify, margin=0.9),
    "sample_adaptive_entropy": losses.sample_adaptive_entropy(
        models.classify, num_classes=models.CLASSES, epsilon=0.9, margin=0.9
    ),
    "weighted": losses.weighted(
        (0.5, losses.entropy(models.classify)), (2.0, losses.rotation(models.turn))
    ),
    "over_batch": losses.over_batch(losses.rotation(models.turn)),
    "stateful": models.moving_center(),
}
SELECTIONS = {
    "paths": select.paths(r".*encoder/kernel", r".*/norm/.*"),
    "norm_affine": select.norm_affine(),
    "biases": select.biases(),
    "everything": select.everything(),
    "lora": select.lora(),
    "union": select.union(select.lora(), select.norm_affine()),
    "exclude": select.exclude(select.everything(), select.paths(r"params/head/.*")),
}


def keep_some(params, x, key):
    """Rejects about half of the instances, but never one that is not finite."""
    return ~(x.reshape(-1)[0] < 0)


def build(name, loss, selection):
    if name == "gradient":
        return ttt.gradient_adapter(loss, optax.sgd(0.1, momentum=0.9), select=selection)
    if name == "anchored":
        return ttt.gradient_adapter(loss, optax.sgd(0.1), select=selection, anchor=0.3)
    if name == "sharpness":
        return ttt.sharpness_aware_adapter(loss, optax.sgd(0.1), select=selection, rho=0.05)
    return ttt.filtered(ttt.gradient_adapter(loss, optax.sgd(0.1), select=selection), keep_some)


ADAPTERS = ("gradient", "anchored", "sharpness", "filtered")
PROMISES = {
    *("order", "mates", "poison", "poison_ok", "stream_poison", "pristine"),
    *("every_1", "zero_steps", "trace", "updates"),
}


def steps_of(loss, selection):
    """Two steps for one selection of every loss and one loss of every selection."""
    return 2 if selection == "norm_affine" or loss == "entropy" else 1


def cells():
    """The product; of each loss and selection, all adapters but one are for the full run.

    Along every row and column of losses and selections the adapters come in turn, so that the
    cells without the mark hold every pair.
    """
    for i, loss in enumerate(LOSSES):
        for j, selection in enumerate(SELECTIONS):
            for k, adapter in enumerate(ADAPTERS):
                marks = () if (i + j) % len(ADAPTERS) == k else pytest.mark.full
                yield pytest.param(loss, selection, adapter, marks=marks)


def test_the_cells_of_a_short_run_hold_every_pair():
    kept = [cell.values for cell in cells() if not cell.marks]
    assert len(kept) == 98
    names = (LOSSES, SELECTIONS, ADAPTERS)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        wanted = {(a, b) for a in names[one] for b in names[other]}
        assert {(values[one], values[other]) for values in kept} == wanted


def check(adapter, apply, params, xs, num_steps):
    """Measures and judges every promise of one cell in one program."""
    before = models.snapshot(params)

    def measure(params, xs, keys):
        return ttt.audit.adapter_differences(adapter, apply, params, xs, keys, num_steps=num_steps)

    found = quickly(measure, params, xs, KEYS)
    found["pristine"] = float(models.snapshot(params) != before)
    assert set(found) == PROMISES
    ttt.audit.require(ttt.audit.findings(found, num_steps=num_steps))


@pytest.mark.parametrize(("loss", "selection", "adapter"), list(cells()))
def test_every_loss_selection_and_adapter(loss, selection, adapter):
    lifted = loss == "over_batch"
    xs = BATCHES if lifted else IMAGES
    apply = models.classify if lifted else ttt.unbatched(models.classify)
    built = build(adapter, LOSSES[loss], SELECTIONS[selection])
    check(built, apply, PARAMS, xs, steps_of(loss, selection))
    assert models.snapshot(PARAMS) == PRISTINE


def test_statistics_adapter():
    adapter = ttt.statistics_adapter(models.batch_moments, momentum=0.9)
    check(adapter, models.classify, PARAMS, BATCHES, 2)


def test_filter_rejects_and_keeps_instances():
    """The filter of the product is worth its name only if it does both."""
    for xs in (IMAGES, BATCHES):
        kept = [bool(keep_some(PARAMS, x, None)) for x in xs]
        assert any(kept) and not all(kept)


def normalized_by_batch(params, images):
    moments = models.batch_moments(params, images)["batch_stats"]
    return models.classify({**params, "batch_stats": moments}, images)


@pytest.mark.parametrize("loss", ["entropy", "marginal_entropy", "pseudo_label", "rotation"])
def test_batch_methods(loss):
    """Tent and its kin: x is a batch, and the model function itself predicts."""
    xs = models.make_images(N, batch=4)
    factory = {
        "entropy": lambda: losses.entropy(normalized_by_batch, batch=True),
        "marginal_entropy": lambda: losses.marginal_entropy(
            normalized_by_batch, models.jitter, num_views=2, batch=True
        ),
        "pseudo_label": lambda: losses.pseudo_label(normalized_by_batch, batch=True),
        "rotation": lambda: losses.rotation(models.turn, batch=True, copies=2),
    }[loss]
    adapter = ttt.gradient_adapter(factory(), optax.sgd(0.1), select=select.norm_affine())
    # Statistics of four images make small differences larger.
    check(adapter, normalized_by_batch, PARAMS, xs, 2)


@pytest.mark.parametrize("name", ["next_token", "masked_token"])
def test_token_losses(name):
    """A document's tokens with weights; a nan weight is what spoils one."""
    rng = np.random.default_rng(0)
    tables = {"embedding": rng.normal(size=(7, 4)), "head": rng.normal(size=(4, 7))}
    params = {"params": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tables)}

    def decode(params, tokens):
        return params["params"]["embedding"][tokens].cumsum(1) @ params["params"]["head"]

    loss = {
        "next_token": losses.next_token(decode),
        "masked_token": losses.masked_token(decode, mask_id=6, mask_ratio=0.5),
    }[name]
    xs = {
        "tokens": rng.integers(7, size=(N, 6)),
        "mask": rng.uniform(0.5, 1, size=(N, 6)).astype(np.float32),
    }
    adapter = ttt.gradient_adapter(loss, optax.sgd(0.1), select=select.everything())
    check(adapter, lambda params, x: decode(params, x["tokens"][None])[0], params, xs, 2)


def test_convolutions():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, images):
            hidden = nn.Conv(4, (3, 3), strides=2)(images)
            hidden = nn.relu(nn.GroupNorm(num_groups=2)(hidden))
            hidden = nn.Conv(5, (3, 3))(hidden)
            return nn.Dense(4)(hidden.mean(axis=(1, 2)))

    net = Net()
    params = jax.jit(net.init)(jax.random.key(0), IMAGES)
    adapter = ttt.gradient_adapter(
        losses.rotation(net.apply), optax.sgd(0.1), select=select.everything()
    )
    check(adapter, ttt.unbatched(net.apply), params, IMAGES, 2)


def test_vision_transformer():
    from ttt_jax import models as bundled

    net = bundled.ViT(
        image_size=6,
        patch=3,
        channels=1,
        width=8,
        depth=1,
        heads=2,
        num_classes=3,
        decoder_width=8,
        decoder_depth=1,
    )
    params = jax.jit(lambda key: bundled.init(net, key, (6, 6, 1)))(jax.random.key(0))
    reconstruct = bundled.from_linen(net, "reconstruct")
    adapter = ttt.gradient_adapter(
        losses.masked_reconstruction(reconstruct, patch=3, mask_ratio=0.5),
        optax.sgd(1e-2),
        select=select.paths(r"params/encoder/.*kernel"),
    )
    check(adapter, ttt.unbatched(bundled.from_linen(net)), params, IMAGES, 1)


def test_batch_norm_with_a_prior():
    """A stochastic Linen module whose BatchNorm blends source and test statistics."""
    import flax.linen as nn

    from ttt_jax import models as bundled

    class Net(nn.Module):
        @nn.compact
        def __call__(self, images, train: bool = True):
            hidden = nn.Dense(5)(images.reshape(images.shape[0], -1))
            hidden = nn.BatchNorm(use_running_average=not train)(hidden)
            hidden = nn.Dropout(0.3, deterministic=not train)(nn.relu(hidden))
            return nn.Dense(4)(hidden)

    net = Net()
    params = jax.jit(lambda key: net.init(key, IMAGES, train=False))(jax.random.key(0))
    loss = losses.rotation(bundled.from_linen(net, norm=8, stochastic=True), stochastic=True)
    adapter = ttt.gradient_adapter(loss, optax.sgd(0.1), select=select.norm_affine())
    predict = bundled.from_linen(net, norm=8, kwargs={"train": False})
    check(adapter, ttt.unbatched(predict), params, IMAGES, 2)


def test_tent():
    """Entropy over a batch that is normalized by its own statistics."""
    import flax.linen as nn

    from ttt_jax import models as bundled

    class Net(nn.Module):
        @nn.compact
        def __call__(self, images, train: bool = False):
            hidden = nn.Dense(5)(images.reshape(images.shape[0], -1))
            hidden = nn.relu(nn.BatchNorm(use_running_average=not train)(hidden))
            return nn.Dense(4)(hidden)

    net = Net()
    params = jax.jit(net.init)(jax.random.key(0), IMAGES)
    apply = bundled.from_linen(net, norm="batch")
    adapter = ttt.gradient_adapter(
        losses.entropy(apply, batch=True), optax.sgd(0.1), select=select.norm_affine()
    )
    check(adapter, apply, params, models.make_images(N, batch=4), 1)


def test_nnx_module():
    from flax import nnx

    from ttt_jax import models as bundled

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(36, 5, rngs=rngs)
            self.norm = nnx.LayerNorm(5, rngs=rngs)
            self.head = nnx.Linear(5, 4, rngs=rngs)

        def __call__(self, images):
            return self.head(nnx.relu(self.norm(self.encoder(images.reshape(-1, 36)))))

    module = Net(nnx.Rngs(0))
    before = models.snapshot(nnx.as_pure(nnx.state(module)))
    apply, params = bundled.from_nnx(module)
    adapter = ttt.gradient_adapter(
        losses.rotation(apply), optax.adam(1e-2), select=select.norm_affine()
    )
    check(adapter, ttt.unbatched(apply), params, IMAGES, 2)
    assert models.snapshot(nnx.as_pure(nnx.state(module))) == before


@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
def test_low_rank_adaptation():
    import flax.linen as nn

    qwix = pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, images):
            hidden = nn.tanh(nn.Dense(5)(images.reshape(images.shape[0], -1)))
            return nn.Dense(4)(hidden)

    provider = qwix.LoraProvider(module_path="Dense_.*", rank=2, alpha=2.0)
    net = qwix.apply_lora_to_model(Net(), provider)
    params = net.init(jax.random.key(0), IMAGES)
    described = select.describe(select.lora(), params)
    assert {path.rsplit("/")[-1] for path in described.paths} == {"kernel_lora_a", "kernel_lora_b"}
    adapter = ttt.gradient_adapter(
        losses.rotation(net.apply), optax.adam(1e-2), select=select.lora()
    )
    check(adapter, ttt.unbatched(net.apply), params, IMAGES, 2)
