"""Right calls of what learns from text: losses, readers, methods over documents, passages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.core.fuzz import things, use
from tests.core.fuzz.calls import Table
from tests.methods import tiny_decoder as tiny
from ttt_jax import audit, losses, methods, models, passages, predictors, readers

TABLE = Table()
add = TABLE.add
DOCUMENT = {name: leaf[0, :2, :4] for name, leaf in tiny.DOCUMENTS.items()}
POOL = {name: leaf[:, 0] for name, leaf in tiny.DOCUMENTS.items()}
LABELS = np.array([0, 2, 1], np.int32)
CENTERS = np.eye(3, 1024, dtype=np.float32)
ADAPTERS = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tiny.DOWN.split(tiny.PARAMS)[0])
BANK = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
CHOSEN = {"select": tiny.DOWN, "optimizer": things.SGD}
READ = {"read": tiny.PLAIN}


def chunk(result):
    """The scores of a chunk of two tokens."""
    inputs = {name: np.array([[0, 1]], np.int32) for name in ("tokens", "positions")}
    return result.read(tiny.PARAMS, result.init(1, 4, 2), inputs)[0]


def document(result):
    if hasattr(result, "build"):
        result = result.build(result.measure(tiny.PARAMS, POOL))
    return result(tiny.PARAMS, DOCUMENT, things.KEY)


def many_passages(result):
    return result(tiny.PARAMS, POOL, things.KEY)


def counted(result):
    return result(None, POOL)


def scored(params, x, key):
    return x["tokens"].astype(np.float32).cumsum().reshape(x["tokens"].shape), predictors.no_steps()


def read_with_hidden(params, memory, inputs):
    logits, hidden = tiny.decode_with_hidden(params, inputs["tokens"])
    return logits, memory, {"params/down/kernel": hidden}


def aims(params, x):
    return params["params"]["embedding"][x["targets"]]


HIDDEN = readers.HiddenReader(lambda batch, tokens, chunk: (), read_with_hidden)


def of_decoder(result):
    inputs = {name: np.array([[0, 1]], np.int32) for name in ("tokens", "positions")}
    return result.read(tiny.MODULE_PARAMS, result.init(1, 4, 2), inputs)[0]


of_tokens = functools.partial(
    use.loss, arguments=(tiny.PARAMS, DOCUMENT["tokens"].reshape(-1), things.KEY)
)
add("losses.next_token", losses.next_token, of_tokens, apply=tiny.decode)
add(
    "losses.masked_token",
    losses.masked_token,
    of_tokens,
    apply=tiny.decode,
    mask_id=1,
    ranges={"mask_id": -1, "mask_ratio": (-0.1, 15.0), "num_masks": 0},
)
add("readers.isolated", readers.isolated, chunk, apply=tiny.decode)
add("readers.recomputed", readers.recomputed, chunk, apply=tiny.decode, context=3)
add("methods.document_ttt", methods.document_ttt, document, **READ, **CHOSEN, ranges={"bos": -1})
add("methods.end_to_end", methods.end_to_end, document, **READ, **CHOSEN, ranges={"bos": -1})
add("methods.in_place", methods.in_place, document, **READ, **CHOSEN, ranges={"max_norm": -1.0})
add(
    "methods.in_place_targets",
    methods.in_place_targets,
    document,
    read=HIDDEN,
    targets=aims,
    select=tiny.DOWN,
    ranges={"rate": -1.0, "max_norm": -1.0, "bos": -1},
    kinds={"targets": "function"},
)
add(
    "models.hidden_reader",
    models.hidden_reader,
    of_decoder,
    module=tiny.MODULE,
    kinds={"module": "record"},
)
add(
    "methods.neighbors_ttt",
    methods.neighbors_ttt,
    document,
    **READ,
    **CHOSEN,
    k=2,
    ranges={"k": 0, "query_chunks": 2},
)
add(
    "methods.passages_adapter",
    methods.passages_adapter,
    many_passages,
    **READ,
    **CHOSEN,
    ranges={"num_epochs": 0},
)
add(
    "methods.merged_adapters",
    methods.merged_adapters,
    document,
    **READ,
    select=tiny.DOWN,
    adapters=ADAPTERS,
    centers=CENTERS,
    k=2,
    ranges={"k": (0, 4), "temperature": (0.0, -1.0)},
)
add("passages.token_counts", passages.token_counts, counted, size=64, ranges={"size": 1})
add(
    "passages.sift",
    passages.sift,
    features=BANK[0],
    bank=BANK,
    k=2,
    ranges={"k": 0, "noise": (0.0, -1.0), "candidates": 0},
    # Damaged rows come last, as in neighbors.nearest.
    allowed="features: nan, bank: nan",
)
add("passages.cluster", passages.cluster, bank=BANK, num_clusters=2, ranges={"num_clusters": 6})
add("passages.in_clusters", passages.in_clusters, pool=POOL, labels=LABELS, size=2)
add(
    "audit.score_before_update",
    audit.score_before_update,
    predictor=scored,
    params=tiny.PARAMS,
    x=DOCUMENT,
    key=things.KEY,
    places=[1, 2],
    ranges={"places": ([0], [8], [0.5])},
    kinds={"scores": "function"},
    only_refusals=True,
)
add(
    "audit.apart",
    audit.apart,
    documents=DOCUMENT["tokens"][None],
    corpus=POOL["tokens"],
    length=4,
    ranges={"length": 99},
    only_refusals=True,
)
NOTHING_TO_SLIP = ()
