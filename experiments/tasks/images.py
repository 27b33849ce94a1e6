"""Image classification: digits, CIFAR, PACS, or a user's own arrays and model."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import ttt_jax as ttt
from experiments import config_keys, launch, settings
from experiments.tasks import image_metrics, image_order, image_splits, networks
from ttt_jax import data
from ttt_jax.task import Examples, Task
from ttt_jax.views import augmix, image as views

# The views of probes are fixed, so that the values before and after adapting differ by the
# adaptation alone.
_PROBE_KEY = 8
_PROBE_VIEWS = 8
_ROLES = ("train", "validation", "test")
# Images per batch of a pass over the training split.
_PASS_BATCH = 500


KEYS = {**config_keys.IMAGES, **config_keys.MODEL}
HEAD_KEYS = config_keys.IMAGE_HEADS
stream_names = image_order.names


def model_options(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The options of the model of a config.

    Raises:
      ValueError: an unknown model.
    """
    return networks.options_of(config.model.name)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Refuses orders that exclude each other, and settings chosen on what is reported.

    Raises:
      ValueError: naming the keys.
    """
    image_order.check(config)
    image_splits.check(config)


def task(config: ml_collections.ConfigDict) -> Task:
    """The task of a config; see ``experiments/configs``.

    Raises:
      ValueError: an unknown model, order or pad of views, or images without one fixed shape.
    """
    image_order.check(config)
    test = load_data(config, "test")
    _check_channels(config, test)
    net = ImageModel(config, test)
    groups: dict[str, np.ndarray] = {}
    if launch.setting(config, "data.imbalance") != 1:
        labels = load_data(config, "train", in_memory=False).labels()
        groups = image_metrics.class_groups(labels, test.num_classes)

    def streams(role: str, seed: int) -> Mapping[str, Any]:
        source = test if role == "reported" else load_data(config, "validation")
        return image_order.streams(config, source, role, seed)

    def loss(params: Any, examples: Examples, key: jax.Array) -> jax.Array:
        logits = net.training_heads()["classify"](params, examples.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, examples.y).mean()

    return Task(
        name=test.title,
        init=net.init,
        heads=net.heads,
        augment=net.view,
        loss=loss,
        training=lambda seed: TrainingImages(config, seed),
        streams=streams,
        metrics=image_metrics.metrics(test.num_classes, groups),
        chooses="error",
        ties=("cross_entropy",),
    )


def _check_channels(config: ml_collections.ConfigDict, source: data.Source) -> None:
    channels = source.image_shape[-1]
    if launch.setting(config, "adapt.corruptions") != "none" and channels not in (1, 3):
        raise ValueError(
            f"adapt.corruptions takes images of 1 or 3 channels; got {channels} of {source.name}. "
            "Set config.adapt.corruptions = 'none', or take away channels."
        )


def load_data(
    config: ml_collections.ConfigDict, split: str, *, in_memory: bool = True
) -> data.Source:
    """A split of the config's data set, by role: ``train``, ``validation`` or ``test``.

    Args:
      config: see ``experiments/configs``.
      split: the role.
      in_memory: whether all images may be read now, where the config keeps them in memory.
        Otherwise each is read when it is needed.
    """
    base = config.data[split].partition("[")[0]
    # Sets of one file per split name it by its place: npz:DIR/{split}.npz
    name = config.data.name.replace("{split}", base)
    source = data.load(name, config.data[split], data_dir=config.data.dir or None)
    if name.startswith("npz:") and name != config.data.name:
        # A file counts the classes of its own labels alone.
        source.num_classes, source.class_names = image_splits.classes(config)
    imbalance = launch.setting(config, "data.imbalance")
    if split == "train" and imbalance != 1:
        # Which images stay belongs to the data set: it is the same for every seed.
        source = data.long_tailed(source, imbalance=imbalance, seed=0)
    return source.in_memory() if config.data.in_memory and in_memory else source


def fingerprint(config: ml_collections.ConfigDict) -> dict[str, tuple[str, int, str]]:
    """The images and labels of every split, and what results call them.

    Raises:
      ValueError: a split shares its images with the reported one.
    """
    sources = {role: load_data(config, role) for role in _ROLES}
    found = image_splits.check_images(config, sources)
    return {
        f"data.{role}": (found[role], source.num_classes, source.title)
        for role, source in sources.items()
    }


def at_hand(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The fingerprints of the splits that are there, but of no training set too large for memory.

    Raises:
      ValueError: a split shares its images with the reported one.
    """
    sources = {role: load_data(config, role) for role in ("validation", "test")}
    if config.data.in_memory:
        # Who adapts a checkpoint of others may not have what it was trained on.
        with contextlib.suppress(FileNotFoundError):
            sources["train"] = load_data(config, "train")
    found = image_splits.check_images(config, sources)
    return {f"data.{role}": found[role] for role in sources}


@dataclasses.dataclass(frozen=True)
class TrainingImages:
    """The training split; see :class:`ttt_jax.task.TrainingData`."""

    config: ml_collections.ConfigDict
    seed: int

    def __iter__(self) -> Iterator[Examples]:
        source = load_data(self.config, "train")
        plan = data.streams.shuffled(source, seed=self.seed)
        yield from map(_examples, data.Loader(source, plan, batch_size=_PASS_BATCH))

    def steps(self, start: int) -> Iterator[Examples]:
        """Training batches from a step on."""
        size = self.config.train.batch_size
        source = load_data(self.config, "train")
        batches = data.training_batches(source, batch_size=size, seed=self.seed, start_step=start)
        return map(_examples, batches)

    def resident(self) -> Examples:
        """The whole split, for a loop that keeps it on its device."""
        source = load_data(self.config, "train")
        return _examples(source.take(np.arange(len(source))))

    def places(self, start: int) -> Iterator[np.ndarray]:
        """Positions in the split, int64 ``[batch_size]`` per step, from a step on."""
        size = self.config.train.batch_size
        source = load_data(self.config, "train", in_memory=False)
        return data.training_places(source, batch_size=size, seed=self.seed, start_step=start)


def _examples(batch: Any) -> Examples:
    return Examples(batch.id, batch.image, batch.label, {})


class ImageModel:
    """The model of a config: its parameters' layout and its functions by name."""

    def __init__(self, config: ml_collections.ConfigDict, source: data.Source):
        if None in source.image_shape:
            raise ValueError(
                f"{source.name} has images of several sizes {source.image_shape}; resize them "
                "first."
            )
        for name in ("mean", "std"):
            value = config.data[name]
            if isinstance(value, tuple | list) and len(value) != source.image_shape[-1]:
                raise ValueError(
                    f"data.{name} must be a number or one per channel; got {value!r} for images "
                    f"of {source.image_shape[-1]} channels. Write {source.image_shape[-1]} numbers."
                )
        self.image_shape = tuple(source.image_shape)
        self.num_classes = source.num_classes
        self._config = config
        self.private = networks.build(config, source, shared_kernels=False)
        self.shared = networks.build(config, source, shared_kernels=True)
        padding, flip = config.views.padding, config.views.flip
        pad_mode = _pad_mode(config)
        shift = views.shift(padding, pad_mode)
        self.view = views.chain(*([shift, views.flip] if flip else [shift]))
        self.every_view = views.every_view(padding, flip, pad_mode)
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        self.has_batch_norm = isinstance(shapes, dict) and "batch_stats" in shapes

    def init(self, key: jax.Array) -> Any:
        """Freshly initialized parameters."""
        return self.shared.init(key)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Images in [0, 1] to what the module takes."""
        mean, std = (self._constant(name) for name in ("mean", "std"))
        return (images - mean) / std

    def _constant(self, name: str) -> Any:
        """A number, or one per channel as an array that lies along the last axis of images."""
        value = self._config.data[name]
        if not isinstance(value, tuple | list):
            return value
        return np.asarray(value, np.float32).reshape(1, 1, 1, -1)

    def training_heads(self) -> Mapping[str, Any]:
        """Heads in training mode: statistics of the batch where there is BatchNorm."""
        return self.heads(norm="batch")

    def heads(
        self,
        *,
        norm: Any = "running",
        private: bool = False,
        probe: str | None = None,
        serve: str = "plain",
        view_stride: int = 1,
    ) -> Mapping[str, Any]:
        """Model functions of images in [0, 1], and what methods need beside them.

        Args:
          norm: statistics of BatchNorm: ``"running"``, ``"batch"`` or a prior; ignored without
            BatchNorm.
          private: whether every instance has kernels of its own; otherwise XLA's own convolution
            is the fastest, but for fused kernels where they fit.
          probe: the auxiliary loss read beside the prediction: ``rotation``, ``memo``, ``mae``.
          serve: ``"plain"`` predicts the image, ``"every_view"`` the mean over all its views.
          view_stride: every how many-th view of ``"every_view"``.

        Raises:
          ValueError: an unknown ``probe`` or ``serve``.
        """
        module = self.private if private else self.shared
        if norm == "batch" and not self.has_batch_norm:
            norm = "running"
        heads = self._functions(module, norm)
        probes = self._probes(module)
        served = self._served(heads["classify"], probes, probe, serve, view_stride)
        extra: dict[str, Any] = {} if served is None else {"serve": served}
        extra |= {
            "num_classes": self.num_classes,
            "batch_norm": self.has_batch_norm,
            "augment": self.view,
            "crops": self.view,
            "augmix": views.chain(self.view, augmix.augmix),
            "simclr": views.simclr(),
            "views": lambda image: self.every_view(image)[::view_stride],
        }
        if hasattr(module.module, "patch"):
            extra["patch"] = module.module.patch
        if self.has_batch_norm:
            extra["follow"] = self._follow
        return {"observed": self._observed(heads["classify"], probes), **heads, **extra}

    def _functions(self, module: networks.Network, norm: Any) -> dict[str, Any]:
        def head(method: str | None) -> Any:
            apply = module.apply(method, norm)
            return lambda params, images, *rest: apply(params, self.normalize(images), *rest)

        functions = {"classify": head(None)}
        functions |= {name: head(name) for name in module.heads()}
        if (collect := module.activations()) is not None:
            functions["activations"] = lambda params, images: collect(
                params, self.normalize(images)
            )
        if self.has_batch_norm and "rotation" in functions:
            forward = module.statistics("rotation", outputs=True)
            functions["rotation_statistics"] = lambda params, images: forward(
                params, self.normalize(images)
            )
        return functions

    def _follow(self, params: Any, views: jax.Array, key: jax.Array) -> Any:
        """Running statistics after a training step: of the views, then of their rotations."""
        passes = [(None, views)]
        if launch.setting(self._config, "train.aux") == "rotation":
            turned = jnp.concatenate([jnp.rot90(views, k, (1, 2)) for k in range(4)])
            passes.append(("rotation", turned))
        momentum = self._config.train.statistics_momentum
        for method, images in passes:
            collect = self.shared.statistics(method)
            adapter = ttt.statistics_adapter(collect, momentum=momentum)
            state = adapter.init(params)
            state, _ = adapter.step(params, state, self.normalize(images), key)
            params = adapter.merge(params, state)
        return params

    def _probes(self, module: networks.Network) -> dict[str, Any]:
        """Deterministic readings ``(params, image) -> scalar`` of the auxiliary losses.

        They use running statistics, so that they move with the weights alone.
        """
        key = jax.random.key(_PROBE_KEY)
        heads = self._functions(module, "running")
        losses = {
            "memo": ttt.losses.marginal_entropy(
                heads["classify"], self.view, num_views=_PROBE_VIEWS
            )
        }
        if "rotation" in heads:
            losses["rotation"] = ttt.losses.rotation(heads["rotation"])
        if "reconstruct" in heads:
            losses["mae"] = ttt.losses.masked_reconstruction(
                heads["reconstruct"],
                patch=module.module.patch,
                mask_ratio=launch.setting(self._config, "train.mask_ratio"),
                num_masks=_PROBE_VIEWS,
            )
        return {
            name: lambda params, image, loss=loss: loss(params, image, key)
            for name, loss in losses.items()
        }

    def _observed(self, classify: Any, probes: Mapping[str, Any]) -> Any:
        """The source model's logits, and the readings that the config's methods ask for."""
        methods = self._config.get("methods", {})
        grids = [settings.grid_of({"probe": o.get("probe")}) for o in methods.values()]
        names = dict.fromkeys(one["probe"] for grid in grids for one in grid)
        wanted = {name: probes[name] for name in names if name in probes}

        def one(params: Any, image: jax.Array) -> dict[str, Any]:
            aux = {name: read(params, image) for name, read in wanted.items()}
            return {"logits": ttt.unbatched(classify)(params, image), "aux": aux}

        def observed(params: Any, images: jax.Array) -> dict[str, Any]:
            if images.shape[0] > 1:
                return jax.vmap(one, in_axes=(None, 0))(params, images)
            # One image, as predictors ask: without a second axis over instances.
            return jax.tree.map(lambda leaf: leaf[None], one(params, images[0]))

        return observed

    def _served(
        self, classify: Any, probes: Mapping[str, Any], probe: str | None, serve: str, stride: int
    ) -> Any:
        if serve not in ("plain", "every_view"):
            raise ValueError(f"serve must be 'plain' or 'every_view'; got {serve!r}.")
        if probe is not None and probe not in probes:
            raise ValueError(
                f"probe must be one of {sorted(probes)}, the auxiliary losses of this model; got "
                f"{probe!r}."
            )
        if probe is None and serve == "plain":
            return None
        predict = ttt.unbatched(classify)
        if serve == "every_view":
            predict = ttt.methods.mean_over_views(
                classify, lambda image: self.every_view(image)[::stride]
            )

        def apply(params: Any, image: jax.Array) -> dict[str, Any]:
            output: dict[str, Any] = {"logits": predict(params, image)}
            if probe is not None:
                output["aux"] = {probe: probes[probe](params, image)}
            return output

        return apply


# What lies beyond an image, by its name in configs.
_RIMS = {"edge": "edge", "black": "constant"}


def _pad_mode(config: ml_collections.ConfigDict) -> str:
    rim = launch.setting(config, "views.rim")
    if rim not in _RIMS:
        raise ValueError(f"views.rim must be one of {sorted(_RIMS)}; got {rim!r}.")
    return _RIMS[rim]
