"""Test-time training on a text's nearest neighbors: learn its like from a corpus, then score it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax import (
    _arguments,
    _trees,
    _varying,
    inner,
    neighbors,
    passages as passages_lib,
    readers,
    select,
)
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import (
    Adapter,
    FromSource,
    Info,
    Key,
    Params,
    Predictor,
    PyTree,
    Selection,
    StepInfo,
)
from ttt_jax.losses.tokens import masked_mean, token_nats
from ttt_jax.methods.document_ttt import chunks_of, document_of, learning_stream
from ttt_jax.readers import Reader
from ttt_jax.source import value_of

ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(5e-6, weight_decay=0.01))
"""The published optimizer."""


@_arguments.checked(
    read=readers.rule,
    k=_arguments.count(),
    query_chunks=_arguments.count(),
    bos=_arguments.count(0),
)
def neighbors_ttt(
    read: Reader,
    *,
    features: Callable[[Params, Any], jax.Array] | None = None,
    choose: Callable[[jax.Array, jax.Array, int], jax.Array] | None = None,
    k: int = 20,
    optimizer: optax.GradientTransformation = ADAMW,
    select: Selection = select.everything(),
    query_chunks: int | None = 1,
    bos: int | None = None,
) -> FromSource:
    """A method that learns from the k passages of a corpus nearest to a document, then scores it.

    One step on each passage, the nearest first, then the scores of the rest of the document::

        w[j + 1] = optimizer(w[j], grad_w of mean nats of passage j),     j = 0 ... k - 1
        nats[i]  = -log p(token i | tokens before it; w[k])

    Passages are sought by the features of the document's first ``query_chunks`` chunks, which the
    pristine weights score, so that no score depends on a later token
    (:func:`ttt_jax.audit.score_before_update` passes). ``query_chunks=None`` seeks by the whole
    document and scores all of it adapted, as published: the choice then knows the tokens that are
    scored, which is another protocol; say so.

    **Published:** 20 to 50 neighbors, one step each, AdamW 5e-6 with gradients clipped to 1, all
    weights. GPT-2 large on the Pile with an index of 800 GB: 0.85 bits per byte. With SIFT in place
    of the nearest (``choose=ttt_jax.passages.sift``) passages repeat each other less.

    **Fails** where the corpus has nothing like the document: general text pulls the model to
    where it was. A corpus that holds the document itself, or a copy, gives scores that say nothing:
    :func:`ttt_jax.audit.apart` finds them. The step size is small for low-rank weights; choose it
    on held-out documents.

    **Cost** of a document: k forward and backward passes of a passage, a product of its features
    with the corpus's ``[M, D]``, and a forward pass of the document. Once: features of the corpus.

    Args:
      read: a :class:`ttt_jax.readers.Reader`; reads passages and documents. With a cache, the keys
        of the query's chunks stay those of the pristine weights.
      features: model function ``(params, x) -> [N, D]`` over passages ``{"tokens", "mask"}``
        ``[N, P]`` of any length P; ``None`` for :func:`ttt_jax.passages.token_counts`.
      choose: ``choose(features[D], bank[M, D], k) -> indices[k]`` in the order of learning;
        ``None`` for the nearest by cosine.
      k: how many passages, static, at most the corpus where they are the nearest.
      optimizer: an optax transformation, fresh for every document.
      select: the parameters that adapt.
      query_chunks: chunks that the passages are sought by, static; ``None`` for all.
      bos: as for :func:`~ttt_jax.methods.document_ttt`.

    Returns:
      A :class:`~ttt_jax.FromSource`. ``measure(params, x)`` takes passages, integers ``[N, P]`` or
      ``{"tokens", "mask"}``, and gives ``{"instances", "features"}``, which ``reduce``
      concatenates; ``build`` gives a :class:`~ttt_jax.Predictor` over one document as
      :func:`~ttt_jax.methods.document_ttt`'s. Its ``Info`` has the k steps. Pass the corpus into
      the compiled function and build there: closed over, it would be stored in the program. For
      a corpus in an index of another library, ``measure`` the passages that it returns.

    Raises:
      TypeError: ``read`` is no reader.
      ValueError: an argument out of range; when called: a k larger than the corpus (but with
        :func:`ttt_jax.passages.sift`, which may take a passage again), a document of no more than
        ``query_chunks`` chunks, or what document_ttt refuses.

    References:
      Hardt and Sun, `Test-Time Training on Nearest Neighbors for Large Language Models
      <https://arxiv.org/abs/2305.18466>`_, 2024, whose code (github.com/socialfoundations/tttlm)
      restores the weights after a document and keeps the moments of AdamW; here they are fresh.
    """
    seek = passages_lib.token_counts() if features is None else features
    adapter = learner(read, optimizer, select, bos)

    def measure(params: Params, x: Any) -> PyTree:
        passages = passages_of("neighbors_ttt", x)
        return {"instances": passages, "features": seek(params, passages)}

    def build(statistics: PyTree) -> Predictor:
        pool = value_of(statistics)
        find = neighbors.finder(seek, pool["instances"], pool["features"], k=k, choose=choose)

        def predict(params: Params, x: Any, key: Key) -> tuple[Any, Info]:
            tokens, mask = document_of("neighbors_ttt", x)
            first, query = query_of("neighbors_ttt", tokens, mask, query_chunks)
            found = find(params, query)
            state, info = learn(adapter, params, adapter.init(params), found, key)
            trees = params, adapter.merge(params, state)
            nats, ok = score(read, trees, chunks_of(tokens, mask, bos), first, key)
            return nats, info._replace(ok=info.ok & ok)

        return predict

    return FromSource(measure, "concatenate", build)


def learn(
    adapter: Adapter, params: Params, start: PyTree, passages: PyTree, key: Key
) -> tuple[PyTree, Info]:
    """One step on each of the passages ``[k, P]`` in their order; the state that they leave."""
    count = passages["tokens"].shape[0]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count))

    def step(state: PyTree, passage: Any) -> tuple[PyTree, StepInfo]:
        return adapter.step(params, state, *passage)

    state, infos = _varying.scan(step, start, (passages, keys))
    updated = _trees.differs(start.fast, state.fast)
    return state, Info(infos.loss, infos.grad_norm, infos.finite.all(), updated)


def score(
    read: Reader, params: tuple[Params, Params], chunks: dict[str, jax.Array], first: int, key: Key
) -> tuple[jax.Array, jax.Array]:
    """Nats ``[T, L]``, the first chunks' by one tree of parameters, the others' by another.

    And whether all of them are finite.
    """
    count, length = chunks["inputs"].shape
    stream = learning_stream(read, (count * length, length), ADAMW, select.everything(), 0)
    memory, rows, ok = stream.init(params[0]), [], jnp.ones((), bool)
    for tree, part in zip(params, (slice(0, first), slice(first, count)), strict=True):
        xs = jax.tree.map(lambda leaf, part=part: leaf[part], chunks)
        if xs["inputs"].shape[0]:

            def step(memory: PyTree, chunk: Any, tree: Params = tree) -> Any:
                return stream.step(tree, memory, chunk, key)

            memory, (nats, info) = _varying.scan(step, memory, xs)
            rows.append(nats)
            ok &= info.ok.all()
    return jnp.concatenate(rows), ok


def learner(
    read: Reader, optimizer: optax.GradientTransformation, select: Selection, bos: int | None
) -> Adapter:
    """An adapter over one passage ``{"tokens", "mask"}`` ``[P]``, read from its beginning."""
    readers.check_bos(read, bos)

    def loss(params: Params, passage: Any, key: Key) -> jax.Array:
        chunk = chunks_of(passage["tokens"][None], passage["mask"][None], bos)
        length = passage["tokens"].shape[0]
        inputs = {"tokens": chunk["inputs"], "positions": chunk["positions"]}
        logits, _ = read.read(params, read.init(1, length, length), inputs)
        return masked_mean(token_nats(logits, chunk["targets"]), chunk["mask"])

    return inner.guarded(gradient_adapter(loss, optimizer, select=select))


def passages_of(name: str, x: Any) -> dict[str, jax.Array]:
    """``{"tokens", "mask"}``, each ``[N, P]``; a set of passages is shaped as a document is."""
    tokens, mask = document_of(name, x)
    return {"tokens": tokens, "mask": mask}


def query_of(
    name: str, tokens: jax.Array, mask: jax.Array, query_chunks: int | None
) -> tuple[int, Mapping[str, jax.Array]]:
    """How many chunks come before the search, and what is sought by, as one passage."""
    if query_chunks is not None and query_chunks >= len(tokens):
        raise ValueError(
            f"methods.{name} seeks by the first query_chunks={query_chunks} chunks and adapts for "
            f"the others; got a document of {len(tokens)}. Cut it into shorter chunks, or pass "
            "query_chunks=None."
        )
    first = len(tokens) if query_chunks is None else query_chunks
    index = jnp.arange(tokens.size).reshape(tokens.shape)
    last = jnp.where(mask != 0, index, -1).max()
    query = {
        "tokens": tokens[:first].reshape(-1),
        "mask": (index <= last)[:first].astype(mask.dtype).reshape(-1),
    }
    return query_chunks or 0, query
