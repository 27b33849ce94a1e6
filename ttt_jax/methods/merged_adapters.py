"""Test-time model merging: one adapter per cluster of a corpus, the nearest merged per document."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _trees, neighbors, passages as passages_lib, readers, select
from ttt_jax.base import Info, Key, Params, Predictor, PyTree, Selection
from ttt_jax.methods.document_ttt import chunks_of, document_of
from ttt_jax.methods.neighbors_ttt import learn, learner, passages_of, query_of, score
from ttt_jax.predictors import no_steps
from ttt_jax.readers import Reader


@_arguments.checked(read=readers.rule, num_epochs=_arguments.count(), bos=_arguments.count(0))
def passages_adapter(
    read: Reader,
    *,
    optimizer: optax.GradientTransformation = optax.adam(3e-3, b1=0.9, b2=0.95, eps=1e-10),
    select: Selection = select.lora(),
    num_epochs: int = 1,
    bos: int | None = None,
) -> Predictor:
    """A predictor whose output is the adapter that a set of passages leaves.

    One step on each passage in turn, ``num_epochs`` times over. Under :func:`~ttt_jax.batched` the
    adapters of all clusters of a corpus are trained in one program, what
    :func:`merged_adapters` takes::

        bank     = measured features [M, D] of the pool
        clusters = ttt.passages.cluster(bank, 64)
        sets     = ttt.passages.in_clusters(pool, clusters.labels, size=256)
        adapters, info = jax.jit(ttt.batched(passages_adapter(read), chunk_size=16))(
            params, sets, keys)

    **Fails** where a cluster has few passages: many epochs on them are learned by heart.

    **Cost:** a forward and a backward pass of every passage and epoch.

    Args:
      read: a :class:`ttt_jax.readers.Reader`.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_epochs: how often every passage comes, static.
      bos: as for :func:`~ttt_jax.methods.document_ttt`.

    Returns:
      A :class:`~ttt_jax.Predictor` over passages, integers ``[S, P]`` or ``{"tokens", "mask"}``;
      a passage of mask 0 changes nothing. Output: the selected leaves after the last step, and
      ``None`` in place of the others. ``Info`` has the ``num_epochs * S`` steps.

    Raises:
      TypeError: ``read`` is no reader.
      ValueError: an argument out of range; when called: passages of another shape.

    References:
      Bertolissi et al., `Local Mixtures of Experts <https://arxiv.org/abs/2505.14136>`_, 2025,
      whose adapters are trained one by one.
    """
    adapter = learner(read, optimizer, select, bos)

    def predict(params: Params, x: Any, key: Key) -> tuple[PyTree, Info]:
        passages = passages_of("passages_adapter", x)
        again = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * num_epochs), passages)
        state, info = learn(adapter, params, adapter.init(params), again, key)
        return state.fast, info

    return predict


@_arguments.checked(
    read=readers.rule,
    adapters=_arguments.tree,
    centers=_arguments.array(2, finite=True),
    k=_arguments.count(),
    temperature=_arguments.number(0.0, above=True),
    query_chunks=_arguments.count(),
    bos=_arguments.count(0),
)
def merged_adapters(
    read: Reader,
    adapters: PyTree,
    centers: jax.Array,
    *,
    features: Callable[[Params, Any], jax.Array] | None = None,
    select: Selection = select.lora(),
    k: int = 10,
    temperature: float | jax.Array = 0.1,
    query_chunks: int | None = 1,
    bos: int | None = None,
) -> Predictor:
    """A predictor that merges the adapters nearest to a document, and scores it (TTMM).

    The weights are a softmax over the k clusters whose centers are most like the features f of the
    document's first chunks; no gradient is taken at test time::

        a    = softmax over the k nearest c of  <f, center[c]> / temperature
        fast = sum_c a[c] adapters[c]

    Leaves are averaged one by one. For whole matrices that is the mean of the updates; for
    low-rank factors it is not, as a mean of products is no product of means, unless all adapters
    share one factor: train with ``select.paths(".*kernel_lora_b")`` to average exactly.

    **Published:** hundreds to thousands of clusters by bisecting k-means, one low-rank adapter for
    each, merged in weights and not in outputs; near the gain of training on neighbors at next to
    its cost of nothing. There weights under a threshold are left out; here all but the k largest.
    The defaults of ``k`` and ``temperature`` are ours.

    **Fails** where no cluster is like the document: the softmax has to choose, and the mean of
    strange adapters is worse than none. A low temperature takes the nearest alone, a high one the
    plain mean.

    **Cost** of a document: its features, a product with ``[C, D]`` and a forward pass; memory for
    the C adapters once.

    Args:
      read: a :class:`ttt_jax.readers.Reader`.
      adapters: the selected leaves with a leading axis C, ``None`` in place of the others, from
        ``batched(passages_adapter(...))``. Closed over they would be stored in the program: pass
        them into the compiled function, and build there.
      centers: ``[C, D]``, unit rows, as of :func:`ttt_jax.passages.cluster`.
      features: as for :func:`~ttt_jax.methods.neighbors_ttt`: those that were clustered.
      select: the parameters that the adapters replace.
      k: how many are merged, static, at most C.
      temperature: of the softmax, may be traced.
      query_chunks: as for :func:`~ttt_jax.methods.neighbors_ttt`.
      bos: as for :func:`~ttt_jax.methods.document_ttt`.

    Returns:
      A :class:`~ttt_jax.Predictor` over one document with the output of
      :func:`~ttt_jax.methods.document_ttt`; its ``Info`` has no steps.

    Raises:
      TypeError: ``read`` is no reader.
      ValueError: an argument out of range; when called: adapters that are not the selected leaves
        with an axis C, or what :func:`~ttt_jax.methods.neighbors_ttt` refuses.

    References:
      Bertolissi et al., `Local Mixtures of Experts: Essentially Free Test-Time Training via Model
      Merging <https://arxiv.org/abs/2505.14136>`_, 2025, Section 3.
    """
    seek = passages_lib.token_counts() if features is None else features

    def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
        tokens, mask = document_of("merged_adapters", x)
        first, query = query_of("merged_adapters", tokens, mask, query_chunks)
        fast, frozen = select.split(params)
        _check_adapters(adapters, fast, centers.shape[0])
        found = seek(params, jax.tree.map(lambda leaf: leaf[None], query))[0]
        places = neighbors.nearest(found, centers, k)
        found = found * jax.lax.rsqrt(jnp.maximum(jnp.square(found).sum(), 1e-30))
        near = jnp.matmul(centers[places], found, precision=jax.lax.Precision.HIGHEST)
        shares = jax.nn.softmax(near / temperature)

        def mean(leaf: jax.Array) -> jax.Array:
            leaf = jnp.asarray(leaf)[places]
            exact = jax.lax.Precision.HIGHEST
            return jnp.tensordot(shares.astype(leaf.dtype), leaf, 1, precision=exact)

        own = jax.tree.map(mean, adapters)
        trees = params, select.merge(own, frozen)
        nats, ok = score(read, trees, chunks_of(tokens, mask, bos), first, key)
        return nats, no_steps()._replace(ok=ok)

    return predict


def _check_adapters(adapters: PyTree, fast: PyTree, count: int) -> None:
    given, due = jax.tree.leaves(adapters), jax.tree.leaves(fast)
    same = _trees.same_structure(adapters, fast)
    if not same or any(a.shape != (count, *b.shape) for a, b in zip(given, due, strict=True)):
        raise ValueError(
            f"methods.merged_adapters needs the selected leaves of {count} adapters on a leading "
            f"axis, one for each center; got shapes {[leaf.shape for leaf in given]} for leaves "
            f"of {[leaf.shape for leaf in due]}. Train them with batched(passages_adapter(...)) "
            "and the same selection."
        )
