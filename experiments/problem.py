"""From a config to data and pure model functions."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from experiments import launch
from ttt_jax import checkpoint, data, models, views
from experiments import augment, launch
from ttt_jax import checkpoint, data, models
from ttt_jax.kernels import conv

MODELS = {"resnet": models.ResNet, "vit": models.ViT}


class Model(NamedTuple):
    """The model functions of a problem under one normalisation.

    Attributes:
      classify: ``(params, images[N, H, W, C] in [0, 1]) -> logits [N, classes]``.
      rotation: ``(params, images) -> [N, 4]``.
      reconstruct: ``(params, images, keep[N, K]) -> [N, P, patch * patch * C]``, as
        ``ttt_jax.losses.masked_reconstruction`` needs it; None for a model that cannot.
      features: ``(params, images) -> [N, D]``, the mean of the encoder's last map or tokens, which
        the classifier reads; None for a model that does not say.
      project: ``(params, images) -> [N, P]``, the head of contrastive training; None for a model
        without one.
    """

    classify: Callable[[Any, jax.Array], jax.Array]
    rotation: Callable[[Any, jax.Array], jax.Array]
    reconstruct: Callable[[Any, jax.Array, jax.Array], jax.Array] | None
    features: Callable[[Any, jax.Array], jax.Array] | None = None
    project: Callable[[Any, jax.Array], jax.Array] | None = None


class Problem(NamedTuple):
    """A model family on a data set.

    Attributes:
      module: the Linen module.
      model: ``model(norm) -> Model``; ``norm`` as in ``ttt_jax.models.from_linen``: running
        statistics, the batch's, or a prior of that many source instances.
      normalize: images in [0, 1] to what the module takes.
      view: one random view of an image, the same family in training, in the auxiliary tasks and
        in test-time augmentation.
      every_view: all views that ``view`` can draw, ``image -> [V, H, W, C]``.
      image_shape: ``(H, W, C)``.
      mask_ratio: share of the patches that masked reconstruction hides in training.
    """

    module: Any
    model: Callable[[Any], Model]
    normalize: Callable[[jax.Array], jax.Array]
    view: views.image.Augment
    every_view: Callable[[jax.Array], jax.Array]
    image_shape: tuple[int, int, int]
    mask_ratio: float


def load_data(config: ml_collections.ConfigDict, split: str, *, whole: bool = True) -> data.Source:
    """A split of the config's data set, by role: ``train``, ``validation`` or ``test``.

    Args:
      config: see ``experiments/configs``.
      split: the role.
      whole: whether all images may be read now, where the config keeps them in memory. Otherwise
        each is read when it is needed.
    """
    base = config.data[split].partition("[")[0]
    # Sets of one file per split name it by its place: npz:DIR/{split}.npz
    name = config.data.name.replace("{split}", base)
    source = data.load(name, config.data[split], data_dir=config.data.dir or None)
    imbalance = launch.setting(config, "data.imbalance")
    if split == "train" and imbalance != 1:
        # Which images stay belongs to the data set: it is the same for every seed.
        source = data.long_tailed(source, imbalance=imbalance, seed=0)
    return source.in_memory() if config.data.in_memory and whole else source


def build(
    config: ml_collections.ConfigDict, source: data.Source, *, shared_kernels: bool = False
) -> Problem:
    """The problem that a config describes, for images like those of ``source``.

    Args:
      config: see ``experiments/configs``.
      source: the images; their shape and classes complete the model's options.
      shared_kernels: whether all instances use the same kernels (training, a prediction without
        adaptation): XLA's own convolution is then the fastest, but for fused kernels where they
        fit.

    Raises:
      ValueError: an unknown model or rim of views, or images without one fixed shape.
    """
    if config.model.name not in MODELS:
        raise ValueError(f"model.name must be one of {sorted(MODELS)}; got {config.model.name!r}.")
    if None in source.image_shape:
        raise ValueError(
            f"{source.name} has images of several sizes {source.image_shape}; resize them first."
        )
    options = {key: value for key, value in config.model.items() if key != "name"}
    options["num_classes"] = source.num_classes
    if config.model.name == "vit":
        options |= {"image_size": source.image_shape[0], "channels": source.image_shape[2]}
    if "dtype" in options:
        options["dtype"] = jnp.dtype(options["dtype"])
    if config.model.name == "resnet" and shared_kernels:
        options["conv"] = _shared_form(models.ResNet(**options), source.image_shape)
    module = MODELS[config.model.name](**options)
    mean, std = config.data.mean, config.data.std

    def normalize(images: jax.Array) -> jax.Array:
        return (images - mean) / std

    def model(norm: Any = "running") -> Model:
        def head(method: str | None) -> Any:
            apply = models.from_linen(module, method, norm=norm)
            return lambda params, images: apply(params, normalize(images))

        reconstruct = None
        if hasattr(module, "reconstruct"):
            raw = models.from_linen(module, "reconstruct", norm=norm)

            def reconstruct(params: Any, images: jax.Array, keep: jax.Array) -> jax.Array:
                return raw(params, normalize(images), keep)

        return Model(
            classify=head(None),
            rotation=head("rotation"),
            reconstruct=reconstruct,
            features=head("features") if hasattr(module, "features") else None,
            project=head("project") if getattr(module, "projection", 0) else None,
        )

    padding, flip = config.views.padding, config.views.flip
    pad_mode = _pad_mode(launch.setting(config, "views.rim"))
    shift = views.image.shift(padding, pad_mode)
    steps = [shift, views.image.flip] if flip else [shift]
    return Problem(
        module=module,
        model=model,
        normalize=normalize,
        view=views.image.chain(*steps),
        every_view=views.image.every_view(padding, flip, pad_mode),
        image_shape=tuple(source.image_shape),
        mask_ratio=launch.setting(config, "train.mask_ratio"),
    )


def _pad_mode(rim: str) -> str:
    modes = {"edge": "edge", "black": "constant"}
    if rim not in modes:
        raise ValueError(f"The rim of views must be one of {sorted(modes)}; got {rim!r}.")
    return modes[rim]


def _shared_form(net: models.ResNet, image_shape: tuple[int, ...]) -> str:
    sizes = (image_shape, net.width, net.groups, net.dtype)
    fused = net.norm == "group" and conv.supported(*sizes)
    return "fused" if fused else "lax"


def initial(problem: Problem, seed: int) -> Any:
    """Freshly initialised variables."""
    init = jax.jit(lambda key: models.init(problem.module, key, problem.image_shape))
    return init(jax.random.key(seed))


def shapes(problem: Problem) -> Any:
    """The layout of the variables, for checking a checkpoint against the model."""
    return jax.eval_shape(
        lambda key: models.init(problem.module, key, problem.image_shape), jax.random.key(0)
    )


def has_batch_norm(problem: Problem) -> bool:
    """Whether the model normalises by statistics of the batch."""
    return "batch_stats" in shapes(problem)


_FORMS = ("dtype", "conv", "attention")


def checkpoint_path(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Where the pristine checkpoint of a seed lives."""
    return workdir / "checkpoints" / f"seed_{seed}"


def checkpoint_metadata(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a checkpoint must agree on with the config that uses it."""
    return {
        "mean": config.data.mean,
        "std": config.data.std,
        # The compute dtype and the forms of layers change no parameter.
        "model": {k: v for k, v in config.model.items() if k not in _FORMS},
        "dataset": config.data.name,
    }


def load_checkpoint(
    path: str | pathlib.Path,
    problem: Problem,
    config: ml_collections.ConfigDict,
    *,
    sharding: Any = None,
) -> checkpoint.Pristine:
    """The pristine checkpoint, checked against the model and the config's normalisation.

    Args:
      path: of the checkpoint.
      problem: the model.
      config: see ``experiments/configs``.
      sharding: as in :func:`ttt_jax.checkpoint.load`: where the parameters are put.

    Raises:
      CheckpointError: damaged, of another layout, or made with other constants.
    """
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}; train one first: python -m experiments.train with "
            "the same --workdir and --config, or name another with --checkpoint."
        )
    pristine = checkpoint.load(path, like=shapes(problem), sharding=sharding)
    pristine.require(**checkpoint_metadata(config))
    return pristine
