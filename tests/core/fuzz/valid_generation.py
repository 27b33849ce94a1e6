"""Right calls of generation, of documents that are continued, and of adapters side by side."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from tests.core import small_reader
from tests.core.fuzz import things
from tests.core.fuzz.calls import Table
from tests.models import small_decoder
from ttt_jax import (
    checkpoint,
    generation,
    losses,
    methods,
    models,
    optimizers,
    rewards,
    select,
    serving,
)

TABLE = Table()
add = TABLE.add
READ, PARAMS = small_reader.READER, small_reader.draw_params()
FAST, BASE = select.lora().split(PARAMS)
PROMPT = np.array([1, 2, 3])
DOCUMENT = {"tokens": np.array([[1, 2], [3, 4]]), "prompt": PROMPT}
DRAW = generation.greedy()
KINDS = {"read": "record", "sampler": "function", "stop": "record"}
STOP = (["a"], [-1], [0.5], 3)


def predict(result):
    return result(PARAMS, PROMPT, things.KEY)


def of_document(result):
    return result(PARAMS, DOCUMENT, things.KEY)


def of_learning(result):
    return result(PARAMS, DOCUMENT["tokens"], things.KEY)


def draw(result):
    return result(things.LOGITS[0], things.KEY)


def served(result):
    """The signature alone: a server compiles its own programs."""
    assert callable(result)
    return things.LOGITS


add(
    "generation.generate",
    generation.generate,
    predict,
    read=READ,
    num_tokens=2,
    sampler=DRAW,
    stop=(5,),
    chunk=2,
    kinds=KINDS,
    ranges={"num_tokens": 0, "chunk": 0, "stop": STOP},
)
CONTINUED = generation.Generated(
    np.array([[1, 2], [3, 5]]), np.ones((2, 2), bool), np.zeros((2, 2), np.float32)
)
add(
    "generation.log_probs",
    generation.log_probs,
    lambda result: result(PARAMS, PROMPT, CONTINUED),
    read=READ,
    kinds=KINDS,
)


def first_token(x, generated):
    return rewards.Answers(generated.tokens[:, 0], generated.tokens[:, 0] > 0)


add(
    "methods.ttrl",
    methods.ttrl,
    lambda result: result(PARAMS, {"tokens": np.array([[1, 2], [3, 4]])}, things.KEY),
    read=READ,
    answer=first_token,
    num_tokens=1,
    stop=(5,),
    optimizer=things.SGD,
    num_steps=1,
    num_rollouts=4,
    num_trained=2,
    temperature=1.0,
    min_consensus=0.1,
    rare=0.1,
    keep_votes=True,
    advantages="fixed",
    kl=0.1,
    stop_ratio=2.0,
    num_evaluated=1,
    evaluation_sampler=DRAW,
    kinds=KINDS | {"rare": "number", "kl": "number", "evaluation_sampler": "function"},
    ranges={
        "num_tokens": 0,
        "num_steps": -1,
        "num_rollouts": 0,
        "num_trained": 0,
        "temperature": -1.0,
        "min_consensus": 2.0,
        "rare": 2.0,
        "advantages": "none",
        "kl": -1.0,
        "stop_ratio": -1.0,
        "num_evaluated": 0,
        "stop": STOP,
    },
)
add(
    "methods.discover",
    methods.discover,
    lambda result: result(PARAMS, {"target": np.array([1])}, things.KEY),
    read=READ,
    starts=lambda x: jnp.zeros((1, 1), jnp.int32),
    prompt=lambda x, state: jnp.concatenate([jnp.array([1], jnp.int32), state]),
    solution=lambda x, generated: generated.tokens,
    score=lambda x, states: -jnp.abs(states[:, 0] - x["target"][0]).astype(jnp.float32),
    num_tokens=1,
    stop=(5,),
    optimizer=things.SGD,
    num_steps=1,
    num_starts=1,
    num_rollouts=4,
    pool_size=2,
    exploration=1.0,
    reuse=False,
    advantages=losses.entropic_advantages(),
    temperature=1.0,
    kl=0.1,
    kinds=KINDS | {"exploration": "number", "kl": "number"},
    ranges={
        "num_tokens": 0,
        "num_steps": -1,
        "num_starts": (0, 3),
        "num_rollouts": 1,
        "pool_size": 0,
        "exploration": -1.0,
        "temperature": -1.0,
        "kl": -1.0,
        "stop": STOP,
    },
)
REWARDS, USED = np.array([0.1, 0.5, 1.0], np.float32), np.ones(3, bool)
add(
    "losses.entropic_advantages",
    losses.entropic_advantages,
    lambda result: result(REWARDS, USED),
    budget=0.3,
    kinds={"budget": "number"},
    ranges={"budget": 0.0},
)
ROLLOUTS = np.array([1, 0, 1, 2])


def of_rollouts(result):
    return result(None, ROLLOUTS, things.KEY)


def numbers(x, rollouts):
    return rewards.Answers(rollouts, rollouts > 0)


def earlier(x):
    cast = np.array([True, False])
    return rewards.Earlier(rewards.Answers(np.array([1, 2]), cast), cast)


add(
    "rewards.majority",
    rewards.majority,
    of_rollouts,
    answer=numbers,
    first_voter=1,
    min_consensus=0.1,
    rare=0.1,
    earlier=earlier,
    kinds={"min_consensus": "number", "rare": "number"},
    ranges={"first_voter": (-1, 4), "min_consensus": 2.0, "rare": -0.5},
)
add(
    "rewards.verifier",
    rewards.verifier,
    of_rollouts,
    score=lambda x, rollouts: rollouts > 1,
    invalid=-1.0,
    kinds={"invalid": "number"},
)
add("rewards.answered", rewards.answered, of_rollouts, answer=numbers)
add("rewards.chance", rewards.chance, of_rollouts, p=0.5, ranges={"p": 2.0})
LOGITS = np.array([0.1, 0.2, 0.3], np.float32)
add(
    "losses.policy_gradient",
    losses.policy_gradient,
    lambda result: result({"logits": LOGITS}, None, things.KEY),
    sample=lambda params, x, key: jax.random.categorical(key, params["logits"], shape=(4,)),
    log_prob=lambda params, x, arms: jax.nn.log_softmax(params["logits"])[arms],
    reward=rewards.verifier(lambda x, arms: arms == 1),
    num_trained=3,
    advantages="centered",
    kl=0.1,
    pristine={"logits": LOGITS},
    kinds={"kl": "number", "pristine": "params"},
    ranges={"num_trained": (0, 5), "advantages": "none", "kl": -1.0},
)
add(
    "generation.sample",
    generation.sample,
    draw,
    temperature=0.5,
    top_p=0.9,
    kinds={"temperature": "number", "top_p": "number"},
    ranges={"temperature": -1.0, "top_p": (0.0, 90.0)},
)
add(
    "serving.server",
    serving.server,
    served,
    read=READ,
    rows=2,
    context=8,
    chunk=2,
    tokens_per_call=2,
    sampler=DRAW,
    stop=(5,),
    select=select.lora(),
    kinds=KINDS,
    ranges={"rows": 0, "context": 1, "chunk": 0, "tokens_per_call": 0, "stop": STOP},
)
add(
    "methods.document_adapter",
    methods.document_adapter,
    of_learning,
    read=READ,
    num_steps=1,
    bos=1,
    kinds=KINDS,
    ranges={"num_steps": 0, "bos": -1},
)
add(
    "methods.continue_document",
    methods.continue_document,
    of_document,
    read=READ,
    num_tokens=2,
    sampler=DRAW,
    stop=(5,),
    cache="kept",
    num_steps=1,
    bos=1,
    kinds=KINDS,
    ranges={"num_tokens": 0, "cache": "stale", "num_steps": -1, "bos": -1, "stop": STOP},
)
add(
    "adapted",
    ttt.adapted,
    lambda result: result(PARAMS, (FAST, PROMPT), things.KEY),
    predictor=generation.generate(READ, num_tokens=1),
    select=select.lora(),
    # Functions of three arguments.
    allowed="predictor: model function",
)
add(
    "optimizers.chosen",
    optimizers.chosen,
    lambda optimizer: optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2)),
    index=1,
    optimizers=(things.SGD, optax.adam(0.1)),
    kinds={"index": "count", "optimizers": "optimizer"},
    ranges={"index": 2, "optimizers": ((),)},
)
add(
    "models.pad_rank",
    models.pad_rank,
    params=FAST,
    rank=3,
    like=FAST,
    ranges={"params": (BASE,), "rank": 1, "like": (BASE,)},
)
TOKENS = np.array([[1, 2]])
add(
    "models.low_rank",
    models.low_rank,
    lambda made: made[0].apply(made[1], TOKENS),
    module=small_decoder.NET,
    params=small_decoder.base(),
    key=things.KEY,
    inputs=TOKENS,
    rank=2,
    alpha=4.0,
    paths=".*/query",
    kinds={"paths": "text", "inputs": None},
    ranges={"paths": ("nothing", []), "rank": 0, "alpha": -1.0, "inputs": "text"},
    # Another module is right, and so is a list of expressions.
    allowed="module: module, paths: list",
)
add(
    "models.reader",
    models.reader,
    lambda read: read.read(
        small_decoder.base(),
        read.init(1, 2, 2),
        {"tokens": TOKENS, "positions": np.array([[0, 1]])},
    ),
    module=small_decoder.NET,
)
add(
    "models.decoder_function",
    models.decoder_function,
    lambda apply: apply(small_decoder.base(), TOKENS),
    module=small_decoder.NET,
)
FOLDER = pathlib.Path(tempfile.mkdtemp())
checkpoint.save_adapter(FOLDER / "adapter", FAST, base=BASE)
add(
    "checkpoint.save_adapter",
    checkpoint.save_adapter,
    path=FOLDER / "new",
    adapter=FAST,
    base=BASE,
    metadata={"alpha": 1},
    only_refusals=True,
    kinds={"adapter": "params"},
    allowed="adapter: not called",
    ranges={"metadata": ({"base": "other"},), "base": "no fingerprint"},
)
add(
    "checkpoint.load_adapter",
    checkpoint.load_adapter,
    path=FOLDER / "adapter",
    base=BASE,
    like=FAST,
    only_refusals=True,
    kinds={"like": None},
    ranges={"base": ("no fingerprint", PARAMS), "like": {"b": things.LOGITS}},
)
NOTHING_TO_SLIP = ("generation.greedy",)
