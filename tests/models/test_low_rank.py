"""Low-rank leaves of a decoder: what they add, and ranks that are padded to stand together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import ttt_jax as ttt
from tests.models import small_decoder as small
from ttt_jax import losses, methods, models, select

pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")

TOKENS = small.draw_tokens(1, 7)
KEY = jax.random.key(0)
WIDE = 4


@pytest.fixture(scope="module")
def narrow():
    return small.with_factors()


@pytest.fixture(scope="module")
def wide():
    """Twice the rank with twice alpha: the same factor before ``a b``."""
    return small.with_factors(WIDE, small.ALPHA * WIDE / small.RANK)


def two_steps(net, params):
    optimizer = optax.adamw(0.02, weight_decay=0.1)
    adapter = ttt.gradient_adapter(losses.next_token(net.apply), optimizer, select=select.lora())

    step, state = jax.jit(adapter.step), adapter.init(params)
    for _ in range(2):
        state, info = step(params, state, TOKENS[0], KEY)
    return state.fast, info


def test_the_model_computes_what_it_did_until_its_leaves_move(narrow):
    net, params = narrow
    before = jax.jit(small.NET.apply)(small.base(), TOKENS)
    np.testing.assert_array_equal(jax.jit(net.apply)(params, TOKENS), before)
    base = {path: leaf for path, leaf in flat(params).items() if "_lora_" not in path}
    for path, leaf in flat(small.base()).items():
        assert base.pop(path) is leaf, "the base is shared, not copied"
    assert not base
    assert {path.rsplit("/", 2)[-2] for path in flat(params) if "_lora_" in path} == {
        "query",
        "down",
    }


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_documents_side_by_side_are_each_alone_and_share_the_base(narrow):
    net, params = narrow
    # As many as no axis of the model is long.
    documents = small.draw_tokens(5, 2, 4)
    keys = ttt.sample_keys(KEY, np.arange(5))
    learn = methods.document_adapter(models.reader(net), optimizer=optax.adam(0.02))
    found, info = jax.jit(ttt.batched(learn))(params, documents, keys)
    due, alone = jax.jit(learn)(params, documents[1], keys[1])
    ttt.audit.require_close(small.row_of(found, 1), due, num_steps=2)
    np.testing.assert_allclose(info.loss[1], alone.loss, rtol=1e-5)
    assert info.updated.all()
    assert ttt.audit.copied_frozen(learn, select.lora(), params, documents, keys) == []


def test_a_padded_rank_makes_the_same_updates(narrow, wide):
    due, info = two_steps(*narrow)
    found, infos = two_steps(wide[0], models.pad_rank(narrow[1], WIDE))
    np.testing.assert_allclose(info.loss, infos.loss, rtol=1e-6)
    for path, leaf in flat(models.pad_rank(due, WIDE)).items():
        if leaf is not None:
            np.testing.assert_allclose(flat(found)[path], leaf, rtol=1e-4, atol=1e-6)
            added = leaf[..., small.RANK :] if path.endswith("_a") else leaf[..., small.RANK :, :]
            assert added.size and (added == 0).all()
    # Under another factor the same adapter is another model.
    other = small.with_factors(WIDE, small.ALPHA)[0]
    full = select.lora().merge(found, select.lora().split(wide[1])[1])
    assert np.abs(other.apply(full, TOKENS) - wide[0].apply(full, TOKENS)).max() > 1e-3


def test_tasks_of_other_targets_and_ranks_stand_side_by_side(wide):
    """One adapts queries alone, rank 2, one all: each as if alone, and no more than its own.

    Weight decay and moments move what has no gradient no more than the gradient does.
    """
    net, params = wide
    own = small.with_factors(small.RANK, small.ALPHA, paths=".*/query")
    split = select.lora().split
    filled = models.pad_rank(split(own[1])[0], WIDE, like=split(params)[0])
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), split(params)[0], filled)
    documents, keys = small.draw_tokens(2, 2, 4), ttt.sample_keys(KEY, np.arange(2))

    def learn_of(module):
        optimizer = optax.adamw(0.05, weight_decay=0.1)
        return methods.document_adapter(models.reader(module), optimizer=optimizer)

    run = ttt.batched(ttt.adapted(learn_of(net), select=select.lora()))
    found, info = jax.jit(run)(params, (stacked, documents), keys)
    assert info.updated.all()
    for row, (module, variables) in enumerate(((net, params), (own[0], own[1]))):
        due, _ = jax.jit(learn_of(module))(variables, documents[row], keys[row])
        due = models.pad_rank(due, WIDE, like=split(params)[0])
        ttt.audit.require_close(small.row_of(found, row), due, num_steps=2)
    added = {p: leaf[1] for p, leaf in flat(found).items() if "/down/" in p and leaf is not None}
    assert len(added) == 2 and all((leaf == 0).all() for leaf in added.values())
    with pytest.raises(
        ValueError, match=r"like must have every leaf .* at 'params/layers/mlp/down"
    ):
        models.pad_rank(split(params)[0], WIDE, like=split(own[1])[0])
    with pytest.raises(ValueError, match="like of pad_rank must have leaves named"):
        models.pad_rank(split(params)[0], WIDE, like=small.base())


def test_a_rank_that_is_there_already_stays(narrow):
    same = models.pad_rank(narrow[1], small.RANK)
    jax.tree.map(np.testing.assert_array_equal, same, narrow[1])


def test_what_cannot_be_padded(narrow):
    fast = select.lora().split(narrow[1])[0]
    with pytest.raises(ValueError, match=r"got 1, and factors of shapes \(3, 16, 2\)"):
        models.pad_rank(fast, 1)
    with pytest.raises(ValueError, match="without: give the variables"):
        models.pad_rank(small.base(), WIDE)
    with pytest.raises(ValueError, match=r"shapes \(3, 2\) and None"):
        models.pad_rank({"kernel_lora_a": jnp.ones((3, 2))}, WIDE)
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        models.pad_rank(fast, 0)


def test_paths_that_match_no_module_are_named(narrow):
    with pytest.raises(ValueError, match=r"Modules: layers/attention/key, .*layers/mlp/up"):
        models.low_rank(
            small.NET, small.base(), KEY, TOKENS, rank=2, alpha=2.0, paths="no/such/module"
        )


def test_factors_beside_factors_are_refused(narrow):
    net, params = narrow
    with pytest.raises(ValueError, match=r"without low-rank leaves.*lora_a'?: name all paths"):
        models.low_rank(net, params, KEY, TOKENS, rank=2, alpha=2.0, paths=".*/up")


def test_fast_weights_have_no_factors_and_projections_beside_them_do():
    net = models.Decoder(vocabulary=9, width=8, depth=1, heads=2, mixer="ttt_linear", chunk_size=4)
    tokens = np.arange(6, dtype=np.int32)[None]
    params = jax.jit(net.init)(KEY, tokens)
    given = {"rank": 2, "alpha": 2.0}
    with pytest.raises(ValueError, match=r"outside of a loop; got \['\.\*'\].*'\.\*ttt/\.\*'"):
        models.low_rank(net, params, KEY, tokens, paths=[".*"], **given)
    wide, leaves = models.low_rank(net, params, KEY, tokens, paths=[".*ttt/.*"], **given)
    made = {path for path in traverse_util.flatten_dict(leaves, sep="/") if "_lora_a" in path}
    assert made and all("/ttt/" in path for path in made)
    logits = [jax.jit(each.apply)(p, tokens) for each, p in ((net, params), (wide, leaves))]
    np.testing.assert_array_equal(*logits)
