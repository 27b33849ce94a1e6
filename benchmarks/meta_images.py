"""Images, network and losses of :mod:`benchmarks.meta_learning`."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import qwix

import ttt_jax as ttt
from experiments import launch
from experiments.configs import cifar10c_level5, digits
from experiments.tasks import images as image_tasks, networks
from ttt_jax import data, diagnostics, models
from ttt_jax.data import corruptions

# Noise, blur, weather, light and artifacts: one of each is trained on, the others are reported, and
# those of validation choose step sizes.
TRAINED = corruptions.CORRUPTIONS[1::3]
REPORTED = tuple(name for name in corruptions.CORRUPTIONS if name not in TRAINED)
VALIDATION = corruptions.VALIDATION_CORRUPTIONS

MASK_RATIO, RANK = 0.75, 4
VITS = {
    "digits": {"patch": 2, "width": 16, "depth": 2, "heads": 2, "decoder_width": 8},
    "cifar10": {"patch": 4, "width": 96, "depth": 4, "heads": 3, "decoder_width": 48},
}


class Images(NamedTuple):
    """Images on the device.

    Attributes:
      image: uint8 ``[N, H, W, C]``.
      label: int32 ``[N]``.
      id: int64 ``[N]``, on the host.
    """

    image: Any
    label: Any
    id: Any


class Split(NamedTuple):
    """What is trained on, and images under the shifts of either role, by shift."""

    training: Images
    validation: dict[str, Images]
    reported: dict[str, Images]


def config_of(settings: Any) -> ml_collections.ConfigDict:
    """The config of an image task, with a vision transformer."""
    if settings.data == "digits":
        config = digits.get_config()
        config.data.dir = settings.pack
    else:
        config = cifar10c_level5.get_config()
        folder = pathlib.Path(settings.pack)
        if not (folder / "train_jpegpack.npz").exists():
            raise launch.UserError(
                "--pack must name the folder of train_jpegpack.npz and test_jpegpack.npz; got "
                f"{settings.pack!r}."
            )
        config.data.name = f"npz:{folder}/{{split}}_jpegpack.npz"
        # Its rows are sorted by class: parts are drawn from all of them.
        config.data.train = config.data.validation = "train"
    vit = {"name": "vit", "decoder_depth": 1, **VITS[settings.data]}
    if settings.smoke:
        vit |= {"width": 8, "depth": 1, "heads": 2, "decoder_width": 8}
    config.model = ml_collections.ConfigDict(vit | {"dtype": settings.dtype})
    return config


def split_of(config: ml_collections.ConfigDict, settings: Any) -> tuple[data.Source, Split]:
    """The test set, and all images under all shifts."""
    test = image_tasks.load_data(config, "test")
    train = image_tasks.load_data(config, "train")
    if settings.data == "digits":
        held = image_tasks.load_data(config, "validation")
    else:
        order = np.random.default_rng(0).permutation(len(train))
        held = train.subset(order[: settings.validation_images])
        train = train.subset(order[settings.validation_images :])
    held, train, seen = (
        _part(source, count)
        for source, count in (
            (held, settings.validation_images),
            (train, settings.train_images),
            (test, settings.test_images),
        )
    )
    roles = ((VALIDATION, held), (REPORTED, seen))
    validation, reported = (
        {name: loaded(source, *_shift(source, name, settings.severity)) for name in names}
        for names, source in roles
    )
    return test, Split(loaded(train, *_mixed(train, settings.versions)), validation, reported)


def _part(source: data.Source, count: int) -> data.Source:
    """As many images of a source, drawn at random."""
    order = np.random.default_rng(1).permutation(len(source))
    return source.subset(order[:count])


def _shift(source: data.Source, name: str, severity: int) -> tuple[Any, Any]:
    return np.full(len(source), name), np.full(len(source), severity)


def _mixed(source: data.Source, versions: int) -> tuple[Any, Any]:
    """Every image as it is, and as many times under a corruption of training, at any severity."""
    random = np.random.default_rng(2)
    domain = [np.full(len(source), "clean", dtype="U32")]
    severity = [np.zeros(len(source), np.int64)]
    for _ in range(versions):
        domain.append(random.choice(TRAINED, len(source)))
        severity.append(random.integers(1, 6, len(source)))
    return np.concatenate(domain), np.concatenate(severity)


def loaded(source: data.Source, domain: Any, severity: Any) -> Images:
    """The images of a source, once for each of its length in domains."""
    place = np.arange(len(domain)) % len(source)
    plan = data.streams.Plan(place, domain, severity.astype(np.int32))
    batches = list(data.Loader(source, plan, batch_size=500))
    image, label, ids = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("image", "label", "id")
    )
    return Images(jnp.asarray(np.rint(255 * image).astype(np.uint8)), jnp.asarray(label), ids)


class Net(NamedTuple):
    """A classifier with heads for auxiliary losses, and low-rank factors beside its kernels.

    Attributes:
      init: ``key -> params``.
      classify: ``(params, images [N, H, W, C]) -> logits [N, classes]``.
      losses: auxiliary ones of an image, by name.
      weights: of the auxiliary losses in the training; entropy is no task to be trained on.
      view: ``(image, key) -> image``, of the training.
      masks: by selection, bool ``[]`` for each leaf, whether it adapts.
    """

    init: Callable[[Any], Any]
    classify: Callable[[Any, Any], Any]
    losses: dict[str, Any]
    weights: dict[str, float]
    view: Callable[[Any, Any], Any]
    masks: dict[str, Any]


def network(config: ml_collections.ConfigDict, source: data.Source, views: int) -> Net:
    """The network of a config.

    Args:
      config: of :func:`config_of`.
      source: shape and classes of the images.
      views: masks, and random views of the entropy, in a step.
    """
    face = image_tasks.ImageModel(config, source)
    vit = face.private.module
    provider = qwix.LoraProvider(module_path=r"encoder/block_\d+/.*", rank=RANK, alpha=float(RANK))
    heads = ("__call__", "rotation", "reconstruct")
    wide = face.private._replace(module=qwix.apply_lora_to_model(vit, provider, methods=heads))
    classify, rotation, reconstruct = (_normalized(wide, head, face) for head in (None, *heads[1:]))
    init = lambda key: models.init(wide.module, key, face.image_shape)  # noqa: E731
    last = rf".*encoder/(block_{vit.depth - 1}|norm)/.*"
    chosen = {
        "norms": ttt.select.norm_affine(),
        "low rank": ttt.select.lora(),
        "last block": ttt.select.exclude(ttt.select.paths(last), ttt.select.lora()),
        "all": ttt.select.exclude(ttt.select.everything(), ttt.select.lora()),
    }
    shapes = jax.eval_shape(init, jax.random.key(0))
    return Net(
        init,
        classify,
        {
            "rotation": ttt.losses.rotation(rotation),
            "mae": ttt.losses.masked_reconstruction(
                reconstruct, patch=vit.patch, mask_ratio=MASK_RATIO, num_masks=views
            ),
            "entropy": ttt.losses.marginal_entropy(classify, face.view, num_views=views),
        },
        {"rotation": 1.0, "mae": 1.0, "entropy": 0.0},
        face.view,
        {name: mask_of(select, shapes) for name, select in chosen.items()},
    )


def _normalized(net: networks.Network, head: str | None, face: Any) -> Callable[..., Any]:
    apply, factors = net.apply(head, "running"), ttt.select.lora()

    def run(params: Any, images: Any, *rest: Any) -> Any:
        # qwix multiplies factors as they are: in float32 all that follows would be.
        fast, frozen = factors.split(params)
        fast = jax.tree.map(lambda leaf: leaf.astype(net.module.dtype), fast)
        return apply(factors.merge(fast, frozen), face.normalize(images), *rest)

    return run


def mask_of(select: ttt.Selection, params: Any) -> Any:
    """Bool ``[]`` for each leaf, whether it is selected."""
    fast, _ = select.split(params)
    return jax.tree.map(
        lambda leaf, kept: jnp.bool_(kept is not None),
        params,
        fast,
        is_leaf=lambda leaf: leaf is None,
    )


def masked(mask: Any) -> ttt.Selection:
    """The selection of a mask, which may be traced: one program serves all selections."""

    def merge(fast: Any, frozen: Any) -> Any:
        return jax.tree.map(jnp.where, mask, fast, frozen)

    return ttt.Selection(lambda params: (params, params), merge)


def floating(image: jax.Array) -> jax.Array:
    """Pixels in [0, 1]."""
    return image.astype(jnp.float32) / 255


def alignments(net: Net, aux: str, chunk: int) -> Callable[..., Any]:
    """``(params [R], mask [R], images, labels, keys) -> cosine [R, N]`` of main and auxiliary loss.

    Their gradients are those in what adapts; ``chunk`` images of a run are computed at once.
    """

    def main(params: Any, image: Any, label: Any, key: Any) -> jax.Array:
        del key
        return -jax.nn.log_softmax(net.classify(params, image[None])[0])[label]

    def run(params: Any, mask: Any, images: Any, labels: Any, keys: Any) -> jax.Array:
        align = diagnostics.gradient_alignment(main, net.losses[aux], select=masked(mask))
        rows = floating(images), labels, keys
        return jax.lax.map(lambda x: align(params, *x).cosine, rows, batch_size=chunk)

    return jax.jit(jax.vmap(run, (0, 0, None, None, None)))


def joined(shifts: dict[str, Images]) -> Images:
    """Images of several shifts, one shift after the other."""
    return jax.tree.map(lambda *same: np.concatenate(same), *shifts.values())
