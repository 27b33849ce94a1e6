"""CoTTA: a moving-average teacher, averaged over augmentations, and stochastic restoration."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks, _varying, resets, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Adapter, Key, Params, PyTree, Reset, Selection, StatefulLoss, Stream
from ttt_jax.methods._batches import Serve, checked, one_view_each, with_batch_axis
from ttt_jax.online import online


@_arguments.checked()
def cotta(
    classify: Callable[[Params, Any], jax.Array],
    *,
    augment: Callable[[Any, Key], Any],
    num_views: int = 32,
    threshold: float | jax.Array = 0.92,
    decay: float | jax.Array = 0.999,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    select: Selection = select.everything(),
    num_steps: int = 1,
    reset: Reset = resets.stochastic_restore(0.01),
    predict: str = "before",
    batch: bool = True,
    serve: Serve | None = None,
) -> Stream:
    """A stream over batches that learns from its own slow average (CoTTA).

    Loss: ``mean_n -sum_c q_nc log p_nc``. p is the student's prediction; q comes from the
    teacher's logits: their mean over ``num_views`` augmented batches where the source model's mean
    confidence is below ``threshold``, those of the plain batch elsewhere. After the update the
    teacher is ``decay * teacher + (1 - decay) * student``, and each element of the student is that
    of the source again with probability 0.01. The output is the teacher's logits, the same as q's.

    **Published:** CIFAR-10-C in batches of 200: the defaults. CIFAR-100-C: threshold 0.72.
    ImageNet-C: 0.1, SGD 0.01, ``resets.stochastic_restore(0.001)``, batches of 64. Augmentations:
    color jitter, affine, blur, flip, noise. Continual CIFAR-10-C, WRN-28-10: source 43.5 % error,
    Tent 20.0 %, CoTTA 16.5 % (benchmark of mariodoebler/test-time-adaptation).

    **Fails** where all parameters of a transformer adapt: 77.0 % error with ViT-B on continual
    ImageNet-C, source 60.2 % (same benchmark). On streams ordered by label it falls with the
    batch statistics.

    **Cost** of an instance: a forward and backward pass of the student, a forward pass of the
    source and ``num_views`` of the teacher per step. The output repeats the first step's teacher,
    which a compiler may share.

    Args:
      classify: model function ``(params, inputs[N, ...]) -> logits[N, ..., C]``, its BatchNorm
        served with the statistics of the batch.
      augment: ``augment(x, key) -> x``, one random view of one instance.
      num_views: augmented batches, static; each goes through the model by itself.
      threshold: mean confidence of the source below which the teacher averages. May be traced.
      decay: weight of the old teacher. May be traced.
      optimizer: an optax transformation.
      select: the parameters that adapt; teacher and student are copies of these alone.
      num_steps: inner steps per batch, static.
      reset: what is restored; the default restores elements of the student at every batch.
      predict: ``"before"`` or ``"after"`` the update.
      batch: whether the instance is a batch ``[N, ...]``; with False, one instance.
      serve: ``(params, x) -> output``, which predicts with the teacher's parameters; ``None``
        for the logits of q.

    Returns:
      A :class:`~ttt_jax.Stream`.

    Raises:
      ValueError: ``num_views`` < 1, ``num_steps`` or ``predict`` out of range.

    References:
      Wang et al., `Continual Test-Time Domain Adaptation <https://arxiv.org/abs/2203.13591>`_,
      2022, Eqs. 1-8. Against the authors' code, github.com/qinenergy/cotta: each image has a view
      of its own (there the whole batch shares one draw), and views are made where they are used.
    """
    classify = checked("cotta", classify)
    _checks.check_count("methods.cotta: num_views", num_views)
    _checks.check_share("methods.cotta: threshold", threshold)
    _checks.check_share("methods.cotta: decay", decay)

    def target(source: Params, teacher: Params, inputs: Any, key: Key) -> jax.Array:
        """The teacher's logits, averaged where the source is unsure."""
        # Under vmap jax casts what the branches share twice: here it is cast before.
        source, teacher = _varying.along((source, teacher), inputs)

        def averaged() -> jax.Array:
            keys = jax.random.split(key, num_views)
            # One batch after the other: batch statistics must not mix the views.
            views = jax.lax.map(
                lambda k: classify(teacher, one_view_each(augment, inputs, k)), keys
            )
            return views.astype(jnp.float32).mean(axis=0)

        def plain() -> jax.Array:
            return classify(teacher, inputs).astype(jnp.float32)

        likely = jax.nn.softmax(classify(source, inputs).astype(jnp.float32), axis=-1).max(axis=-1)
        return jax.lax.cond(likely.mean() < threshold, averaged, plain)

    def distillation(source: Params) -> StatefulLoss:
        """Cross-entropy to the teacher, which is the memory; the source is never copied."""

        def value(params: Params, memory: PyTree, x: Any, key: Key) -> tuple[jax.Array, PyTree]:
            inputs = with_batch_axis(x, batch)
            teacher = select.merge(memory, select.split(params)[1])
            logits = jax.lax.stop_gradient(target(source, teacher, inputs, key))
            log_p = jax.nn.log_softmax(classify(params, inputs).astype(jnp.float32), axis=-1)
            return -(jax.nn.softmax(logits, axis=-1) * log_p).sum(axis=-1).mean(), memory

        def after(adapted: Params, memory: PyTree) -> PyTree:
            return jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new, memory, select.split(adapted)[0]
            )

        return StatefulLoss(lambda params: select.split(params)[0], value, after)

    def adapter_of(source: Params) -> Adapter:
        return gradient_adapter(distillation(source), optimizer, select=select)

    # The stream's instance is x and a key, for the views of the prediction; what it predicts with
    # is the source and the teacher.
    def step(params: Params, state: PyTree, x: Any, key: Key) -> Any:
        return adapter_of(params).step(params, state, x[0], key)

    def merge(params: Params, state: PyTree) -> tuple[Params, Params]:
        return params, select.merge(state.memory, select.split(params)[1])

    def apply(models: tuple[Params, Params], x: tuple[Any, Key]) -> Any:
        if serve is not None:
            return serve(models[1], x[0])
        logits = target(*models, with_batch_axis(x[0], batch), jax.random.fold_in(x[1], 0))
        return logits if batch else logits[0]

    adapter = Adapter(lambda params: adapter_of(params).init(params), step, merge)
    paired = online(adapter, apply, num_steps=num_steps, reset=reset, predict=predict)
    return Stream(
        paired.init, lambda params, carry, x, key: paired.step(params, carry, (x, key), key)
    )
