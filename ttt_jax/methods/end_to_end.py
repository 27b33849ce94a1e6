"""End-to-end test-time training: the last MLPs learn from the text, and the weights learned to."""

import optax

from ttt_jax import _arguments, readers, select
from ttt_jax.base import Predictor, Selection
from ttt_jax.methods.document_ttt import document_ttt
from ttt_jax.readers import Reader


@_arguments.checked(read=readers.rule, bos=_arguments.count(0), remat=_arguments.count(0))
def end_to_end(
    read: Reader,
    *,
    optimizer: optax.GradientTransformation = optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(1.0)
    ),
    select: Selection = select.paths(r".*layers_1/mlp/.*"),
    num_steps: int = 1,
    bos: int | None = None,
    remat: int | None = None,
    mixed: bool = True,
) -> Predictor:
    """A predictor that scores a document chunk by chunk, trained through its own updates.

    The network is a transformer with a sliding window; beyond it, what was read is in the MLPs of
    the last quarter of the layers, which take a step on every chunk after its score::

        W[c + 1] = W[c] - rate * clip(grad_W mean_i nats[c, i]),     W[0] of the parameters
        outer loss(parameters) = mean over all c, i of nats[c, i]

    Reading is :func:`~ttt_jax.methods.document_ttt`. The difference is in the training of the
    parameters: the outer loss is the mean of this predictor's **own** output, and its gradient goes
    through the updates, so that W[0] is where steps help. ``remat`` and ``mixed`` are of that
    gradient alone::

        predict = methods.end_to_end(models.reader(net))
        outer = lambda params, x, key: predict(params, x, key)[0].mean()
        value, grads = meta.value_and_grad(outer)(params, documents, keys)

    **Published:** window 8,192, chunks of 1,024 tokens, SGD of rate 1 (0.1 at first in training)
    with the norm of all gradients clipped to 1; AdamW outside, weight decay 0.1; 3 billion
    parameters, 164 billion tokens. The loss goes on falling with the context as that of full
    attention does, at the cost of a window.

    **Fails** on weights that were not trained so, for which a rate of 1 is far too large; a short
    outer training repairs that. It recalls no exact text from beyond the window, and small networks
    gain little.

    **Cost** of a chunk: a forward pass and a backward pass down to the first layer that learns. Of
    the outer gradient, about four times that, and the updates of all chunks one after the other.

    Args:
      read: as for :func:`~ttt_jax.methods.document_ttt`; to train, of a decoder with
        ``attention="xla"`` (fused attention has no second derivative) and ``cache_gradients``,
        ``stages=(9, 3)`` and a window.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: updates per chunk, static; 0 is the control, the window alone.
      bos: as for :func:`~ttt_jax.methods.document_ttt`.
      remat: of the outer gradient, see :func:`ttt_jax.unroll`; None: about ``sqrt(T)`` chunks.
      mixed: of the outer gradient, see :func:`ttt_jax.gradient_adapter`.

    Returns:
      A :class:`~ttt_jax.Predictor` over one document, see :func:`~ttt_jax.methods.document_ttt`.

    Raises:
      TypeError: ``read`` is no reader.
      ValueError: an argument out of range; when called: what document_ttt refuses.

    References:
      Tandon et al., `End-to-End Test-Time Training for Long Context
      <https://arxiv.org/abs/2512.23675>`_, 2025, Sections 2 and 3. The authors add a second MLP to
      the layers that learn, and keep the first as it is; here the layers' own MLPs learn. They read
      the layers before those once, which gives the same scores.
    """
    return document_ttt(
        read,
        optimizer=optimizer,
        select=select,
        num_steps=num_steps,
        bos=bos,
        remat=remat,
        mixed=mixed,
    )
