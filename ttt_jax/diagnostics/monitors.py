"""Monitors of collapse and harm: what adapting did to the predictions and the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _trees
from ttt_jax.base import Params, Selection
from ttt_jax.diagnostics import _inputs
from ttt_jax.losses.rotation import rotate


@_arguments.checked(logits=_arguments.array())
def effective_classes(logits: Any) -> jax.Array:
    """How many classes the probabilities use: exp of the entropy of the mean prediction.

    C where all classes have the same mean probability, 1 where every prediction is certain of the
    same class: a stream that collapses under an entropy loss heads for 1. A model that is unsure
    has a large value whatever it predicts: :func:`predicted_classes` counts the predictions.
    Compare it with the value of the pristine predictions, since a batch of one class has 1 too.

    Args:
      logits: ``[..., N, C]``, averaged over N after a softmax.

    Returns:
      Float32 ``[...]``, in [1, C]; predictions that hold a nan are left out, nan where all do.

    Raises:
      ValueError: fewer than two axes, or no instance.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(effective_classes(jnp.array([[99.0, 0.0, 0.0], [0.0, 99.0, 0.0]])).round(3))
      2.0
    """
    p = jax.nn.softmax(_inputs.as_logits("effective_classes", logits), axis=-1)
    mean = p.mean(axis=-2, where=~jnp.isnan(p).any(axis=-1, keepdims=True))
    return jnp.exp(jax.scipy.special.entr(mean).sum(axis=-1))


@_arguments.checked(logits=_arguments.array())
def predicted_classes(logits: Any) -> jax.Array:
    """How many classes are predicted: exp of the entropy of the shares of the predicted classes.

    C where all classes are predicted equally often, 1 where one class is predicted for all,
    however unsure. Compare it with the pristine model's on the same instances.

    Args:
      logits: ``[..., N, C]``.

    Returns:
      Float32 ``[...]``, in [1, C]; predictions that hold a nan are left out, nan where all do.

    Raises:
      ValueError: fewer than two axes, or no instance.

    Examples:
      >>> import jax.numpy as jnp
      >>> unsure = jnp.array([[0.1, 0.0, 0.0], [0.2, 0.0, 0.1]])
      >>> print(predicted_classes(unsure), effective_classes(unsure).round(1))
      1.0 3.0
    """
    logits = _inputs.as_logits("predicted_classes", logits)
    # A nan is class -1, which is none of them.
    counts = jax.nn.one_hot(_inputs.classes(logits), logits.shape[-1]).sum(axis=-2)
    shares = counts / counts.sum(axis=-1, keepdims=True)
    return jnp.exp(jax.scipy.special.entr(shares).sum(axis=-1))


@_arguments.checked(logits=_arguments.array(), pristine_logits=_arguments.array())
def agreement(logits: Any, pristine_logits: Any) -> jax.Array:
    """The share of instances whose predicted class is that of the pristine model.

    Args:
      logits: ``[..., N, C]``, for instance all entries of a :func:`step_size_map`.
      pristine_logits: ``[N, C]``, of the same instances.

    Returns:
      Float32 ``[...]`` in [0, 1]; a prediction with a nan agrees with nothing.

    Raises:
      ValueError: shapes that do not fit, or no instance.
    """
    logits, pristine = _inputs.as_pair("agreement", logits, pristine_logits)
    return _inputs.hits(logits, _inputs.classes(pristine)).mean(axis=-1, dtype=jnp.float32)


@_arguments.checked()
def drift(params: Params, adapted: Params, select: Selection) -> jax.Array:
    """How far the selected parameters moved: ``|adapted - params| / |params|``.

    Args:
      params: the pristine parameters.
      adapted: the adapted ones, what ``adapter.merge`` returns.
      select: the parameters to measure, all of them as one vector.

    Returns:
      Float32 scalar; 0 where nothing moved, inf where parameters that were all zero did.

    Raises:
      ValueError: the two trees differ in structure or shapes, or the selection matches nothing.
    """
    before, after = select.split(params)[0], select.split(adapted)[0]
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (before, after)]
    if not _trees.same_structure(before, after) or shapes[0] != shapes[1]:
        raise ValueError(
            "drift compares parameters with an adapted copy of the same structure; got "
            f"{jax.tree.structure(before)} {shapes[0]} and {jax.tree.structure(after)} "
            f"{shapes[1]}. Map over several copies with jax.vmap."
        )
    moved = jax.tree.map(lambda a, b: b.astype(jnp.float32) - a.astype(jnp.float32), before, after)
    distance, scale = _trees.norm(moved), _trees.norm(before)
    return jnp.where(distance == 0, 0.0, distance / jnp.where(distance == 0, 1.0, scale))


class Harm(NamedTuple):
    """What adapting did to the predictions, counted with labels.

    Attributes:
      turned_right: int32 ``[...]``, instances that only the adapted model gets right.
      turned_wrong: int32 ``[...]``, instances that only the pristine model gets right.
      rate: float32 ``[...]``, ``turned_wrong / N``.
    """

    turned_right: jax.Array
    turned_wrong: jax.Array
    rate: jax.Array


@_arguments.checked(
    adapted_logits=_arguments.array(), pristine_logits=_arguments.array(), labels=_arguments.array()
)
def harm(adapted_logits: Any, pristine_logits: Any, labels: Any) -> Harm:
    """How many predictions adapting turned right and wrong.

    **Needs labels**: an evaluation for the report, which may choose nothing. The change in
    accuracy is ``(turned_right - turned_wrong) / N``; it hides the instances that were harmed.

    Args:
      adapted_logits: ``[..., N, C]``.
      pristine_logits: ``[N, C]``, of the same instances.
      labels: integers ``[N]``.

    Returns:
      A :class:`Harm`; a prediction with a nan is wrong.

    Raises:
      ValueError: shapes that do not fit, labels that are not integers, or no instance.
    """
    adapted, pristine = _inputs.as_pair("harm", adapted_logits, pristine_logits, "adapted_logits")
    labels = _inputs.as_labels("harm", labels, *pristine.shape)
    now = _inputs.hits(adapted, labels)
    then = jnp.broadcast_to(_inputs.hits(pristine, labels), now.shape)
    wrong = then & ~now
    return Harm(
        turned_right=(now & ~then).sum(axis=-1, dtype=jnp.int32),
        turned_wrong=wrong.sum(axis=-1, dtype=jnp.int32),
        rate=wrong.mean(axis=-1, dtype=jnp.float32),
    )


@_arguments.checked(apply=_arguments.model)
def auxiliary_accuracy(apply: Callable[[Params, Any], Any]) -> Callable[[Params, Any], jax.Array]:
    """Accuracy of the rotation head on the four rotated copies of an image, without labels.

    Args:
      apply: model function of the rotation head, ``(params, images[N, H, W, C]) -> [N, 4]``.

    Returns:
      ``(params, image[H, W, C]) -> float32 scalar``: 0, 0.25, 0.5, 0.75 or 1.

    Raises:
      ValueError: when called: an image that is not ``[H, W, C]`` and square, or a head without
        four outputs.

    References:
      The diagnostic of the published code, github.com/yueatsprograms/ttt_cifar_release; Sun et
      al., `Test-Time Training with Self-Supervision <https://arxiv.org/abs/1909.13231>`_, 2020.
    """

    def accuracy(params: Params, image: Any) -> jax.Array:
        image = jnp.asarray(image)
        if image.ndim != 3 or image.shape[0] != image.shape[1]:
            raise ValueError(
                "auxiliary_accuracy works on one square image [H, W, C]; got shape "
                f"{image.shape}. Map over a batch with jax.vmap."
            )
        turns = jnp.arange(4)
        logits = jnp.asarray(apply(params, jax.vmap(rotate, in_axes=(None, 0))(image, turns)))
        if logits.shape != (4, 4):
            raise ValueError(
                "auxiliary_accuracy needs a model function of the rotation head, images[N, H, W, "
                f"C] -> [N, 4]; got shape {logits.shape} for N = 4."
            )
        return _inputs.hits(logits, turns).mean(dtype=jnp.float32)

    return accuracy
