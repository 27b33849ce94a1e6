"""What one set of images tells about a model and its adaptation, from one compiled program."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ttt_jax as ttt
from experiments import settings as settings_lib
from experiments.settings import Settings
from experiments.tasks.images import ImageModel
from ttt_jax import diagnostics, methods

# A choice without labels must keep this share of the classes that the source predictions use.
CLASSES_KEPT = 0.9
# How far the smoothness is measured, relative to the norm of the parameters: far enough for
# bfloat16 to resolve the change of the gradient.
_RADIUS = 0.01

Cell = Callable[[Any, jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]


# The methods whose private steps descend one loss that is known here.
METHODS = ("ttt_rotation", "ttt_mae", "memo")


class Auxiliary(NamedTuple):
    """The auxiliary task of a method.

    Attributes:
      loss: what its inner steps descend.
      head: the method of the module that the loss calls.
      inputs: shapes of the arguments of ``head``.
      accuracy: ``(params, image) -> scalar``, where there is a right answer without labels.
    """

    loss: ttt.AuxLoss
    head: Callable[..., Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    accuracy: Callable[[Any, jax.Array], jax.Array] | None = None


def filled(name: str, settings: Settings) -> Settings:
    """Settings with the defaults of a method for those that a config leaves out."""
    parameters = inspect.signature(getattr(methods, name)).parameters.values()
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, int | float)}
    return {"select": "all", **defaults, **settings}


def heads_of(network: ImageModel, settings: Settings) -> Mapping[str, Any]:
    """The model functions of some settings, with kernels private to each image."""
    return network.heads(norm=settings.get("prior", "running"), private=True)


def auxiliary_of(name: str, network: ImageModel, settings: Settings) -> Auxiliary:
    """The auxiliary task of a method in :data:`METHODS` under its settings.

    Raises:
      ValueError: a model without the head that the loss calls.
    """
    heads, kind = heads_of(network, settings), type(network.private.module)
    images = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    needed = {"ttt_rotation": "rotation", "ttt_mae": "reconstruct"}.get(name, "classify")
    if needed not in heads:
        raise ValueError(
            f"{name} needs the head {needed!r}, and {kind.__name__} has "
            f"{', '.join(sorted(heads))}; choose another model.name or --method."
        )
    augment = heads[settings.get("augment", "augment")]
    if name == "ttt_mae":
        loss = ttt.losses.masked_reconstruction(
            heads["reconstruct"],
            patch=heads["patch"],
            mask_ratio=settings["mask_ratio"],
            num_masks=settings["num_masks"],
        )
        keep = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return Auxiliary(loss, kind.reconstruct, (images, keep))
    if name == "memo":
        num_views = settings["num_views"]
        loss = ttt.losses.marginal_entropy(heads["classify"], augment, num_views=num_views)
        return Auxiliary(loss, kind.__call__, (images,))
    loss = ttt.losses.rotation(heads["rotation"], copies=settings["copies"], augment=augment)
    accuracy = diagnostics.auxiliary_accuracy(heads["rotation"])
    return Auxiliary(loss, kind.rotation, (images,), accuracy)


def shared_encoder(network: ImageModel, settings: Settings, task: Auxiliary) -> ttt.Selection:
    """The adapting parameters that both the classifier and the auxiliary head read.

    In the others one of the two gradients is zero, so they add nothing to the inner product and
    would only dilute the cosine.

    Raises:
      ValueError: the settings adapt no parameter that both heads read.
    """

    def read_by(method: Any, *inputs: jax.ShapeDtypeStruct) -> set[str]:
        # Linen creates just the parameters that a method touches.
        tree = jax.eval_shape(
            lambda key: network.private.module.lazy_init(key, *inputs, method=method),
            jax.random.key(0),
        )
        return set(ttt.select.describe(ttt.select.everything(), tree).paths)

    shapes = jax.eval_shape(network.init, jax.random.key(0))
    adapting = ttt.select.describe(settings_lib.selection(settings["select"]), shapes).paths
    classifier = read_by(type(network.private.module).__call__, task.inputs[0])
    both = classifier & read_by(task.head, *task.inputs)
    chosen = [re.escape(path) for path in adapting if path in both]
    if not chosen:
        raise ValueError(
            f"select={settings['select']!r} adapts no parameter that the classifier and the "
            f"auxiliary head ({task.head.__name__}) share, so their gradients cannot be compared; "
            "select part of the shared encoder."
        )
    return ttt.select.paths(*chosen)


def secant_smoothness(
    main_loss: Callable[..., jax.Array], aux_loss: ttt.AuxLoss, select: ttt.Selection
) -> Callable[[Any, Any, Any, jax.Array], jax.Array]:
    """How fast the main gradient changes along the auxiliary one.

    The beta of Sun et al. 2020, Theorem 1, bounds this everywhere and in every direction; here it
    is read off one secant, from the pristine parameters along minus the auxiliary gradient, 1 % of
    their norm long. That is never more than the bound, so a step size computed with it may exceed
    the one that the theorem guarantees.

    Returns:
      ``(params, x, label, key) -> float32 scalar``, keys as in ``gradient_alignment``; 0 where the
      auxiliary gradient is zero.
    """

    def smoothness(params: Any, x: Any, label: Any, key: jax.Array) -> jax.Array:
        fast, frozen = select.split(params)
        aux_key, main_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        aux = jax.grad(lambda some: aux_loss(select.merge(some, frozen), x, aux_key))(fast)
        main = jax.grad(lambda some: main_loss(select.merge(some, frozen), x, label, main_key))
        length, reach = optax.tree.norm(aux), _RADIUS * optax.tree.norm(fast)
        step = reach / jnp.where(length == 0, 1.0, length)
        moved = jax.tree.map(lambda p, g: p - step * g, fast, aux)
        change = jax.tree.map(jnp.subtract, main(moved), main(fast))
        return jnp.where(length == 0, 0.0, optax.tree.norm(change) / reach)

    return smoothness


def build(
    network: ImageModel,
    method: str,
    settings: Settings,
    learning_rates: Sequence[float],
    chunk_size: int,
) -> Cell:
    """The measurements of a set of images, as one function to jit.

    Args:
      network: the model.
      method: one of :data:`METHODS`, whose loss the steps descend.
      settings: of the method, all of them: ``num_steps``, ``learning_rate``, ``select``...
      learning_rates: of the map, L of them; ``settings["learning_rate"]`` among them.
      chunk_size: private copies of the model in flight at once.

    Returns:
      ``(params, images[N, H, W, C], labels[N], keys[N]) -> values``: scalars, and maps
      ``[L, S + 1]`` over learning rates and numbers of steps. "Before" is the model that the
      steps start from, under the settings' ``prior`` if they have one.

    Raises:
      ValueError: as :func:`auxiliary_of` and :func:`shared_encoder`.
    """
    classify = ttt.unbatched(heads_of(network, settings)["classify"])
    task = auxiliary_of(method, network, settings)
    encoder = shared_encoder(network, settings, task)
    chosen = settings_lib.selection(settings["select"])
    rate_index = list(learning_rates).index(settings["learning_rate"])

    def main_loss(params: Any, image: Any, label: Any, key: jax.Array) -> jax.Array:
        logits = classify(params, image).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    align = diagnostics.gradient_alignment(main_loss, task.loss, select=encoder)
    smoothness = secant_smoothness(main_loss, task.loss, encoder)

    def make(learning_rate: jax.Array) -> ttt.Adapter:
        optimizer = settings_lib.optimizer(settings | {"learning_rate": learning_rate})
        return ttt.gradient_adapter(task.loss, optimizer, select=chosen)

    def one(params: Any, example: Any, key: jax.Array) -> Any:
        image, label = example

        def observe(adapted: Any, image: jax.Array) -> dict[str, jax.Array]:
            seen = {
                "logits": classify(adapted, image),
                "drift": diagnostics.drift(params, adapted, encoder),
            }
            if task.accuracy is not None:
                seen["accuracy"] = task.accuracy(adapted, image)
            return seen

        predict = diagnostics.step_size_map(
            make, observe, learning_rates=learning_rates, num_steps=settings["num_steps"]
        )
        seen, info = predict(params, image, key)
        aligned = align(params, image, label, key)
        return {**seen, "alignment": aligned, "beta": smoothness(params, image, label, key)}, info

    # Each learning rate has a copy of its own.
    run = ttt.batched(one, chunk_size=max(1, chunk_size // len(learning_rates)))

    def cell(params: Any, images: Any, labels: Any, keys: jax.Array) -> dict[str, jax.Array]:
        seen, info = run(params, (images, labels), keys)
        logits = jnp.moveaxis(seen["logits"], 0, 2)
        accuracy = {}
        if task.accuracy is not None:
            before, after = seen["accuracy"].mean(0)[rate_index, jnp.array([0, -1])]
            accuracy = {"auxiliary_accuracy_before": before, "auxiliary_accuracy_after": after}
        return {
            **accuracy,
            **_alignment(seen["alignment"], seen["beta"]),
            **_outcome(logits[rate_index, -1], logits[0, 0], labels),
            "drift": seen["drift"].mean(0)[rate_index, -1],
            "non_finite": (~info.ok[:, rate_index]).sum(),
            **_map(logits, labels),
        }

    return cell


def _alignment(alignment: diagnostics.Alignment, beta: jax.Array) -> dict[str, jax.Array]:
    """Means over the images whose gradients are finite; the step's median where it exists."""
    finite = jnp.isfinite(alignment.main_norm) & jnp.isfinite(alignment.aux_norm)
    step = diagnostics.guaranteed_step(alignment, smoothness=beta)
    columns = {
        "inner_product": alignment.inner,
        "cosine": alignment.cosine,
        "main_norm": alignment.main_norm,
        "aux_norm": alignment.aux_norm,
        "aligned_share": alignment.inner > 0,
        "smoothness": beta,
    }
    means = {name: jnp.mean(column, where=finite) for name, column in columns.items()}
    guaranteed = jnp.nanmedian(jnp.where(finite & (step > 0), step, jnp.nan))
    return means | {"guaranteed_step": guaranteed}


def _outcome(after: jax.Array, before: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """What the configured steps did to the predictions ``[N, C]``."""
    harm = diagnostics.harm(after, before, labels)
    source_error = _errors(before, labels)
    ttt_error = _errors(after, labels)
    return {
        "source_error": source_error,
        "ttt_error": ttt_error,
        "gain": source_error - ttt_error,
        "turned_right": harm.turned_right / len(labels),
        "turned_wrong": harm.rate,
        "agreement": diagnostics.agreement(after, before),
        "effective_classes_before": diagnostics.effective_classes(before),
        "effective_classes_after": diagnostics.effective_classes(after),
        "predicted_classes_before": diagnostics.predicted_classes(before),
        "predicted_classes_after": diagnostics.predicted_classes(after),
    }


def _map(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Over ``logits[L, S + 1, N, C]``: two choices, and what they chose from."""
    classes = diagnostics.effective_classes(logits)
    errors = _errors(logits, labels)
    criterion = diagnostics.lowest_entropy(floor=CLASSES_KEPT * classes[0, 0])
    free = diagnostics.select_label_free(logits, criterion=criterion)
    oracle = diagnostics.oracle_select(logits, labels)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return {
        "label_free_rate_index": free.rate_index,
        "label_free_num_steps": free.num_steps,
        "label_free_error": errors[free.rate_index, free.num_steps],
        "oracle_rate_index": oracle.oracle_rate_index,
        "oracle_num_steps": oracle.oracle_num_steps,
        "oracle_error": 1 - oracle.oracle_accuracy,
        "entropy_map": -(jnp.exp(log_p) * log_p).sum(-1).mean(-1),
        "effective_classes_map": classes,
        "oracle_error_map": errors,
    }


def _errors(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of wrong predictions, ``[..., N, C] -> [...]``; one with a nan is wrong."""
    found = jnp.argmax(logits, axis=-1)
    wrong = jnp.isnan(logits).any(axis=-1) | (found != jnp.broadcast_to(labels, found.shape))
    return wrong.mean(axis=-1, dtype=jnp.float32)
