"""Reinforcement by votes on a reader of one layer, whose first token is the answer."""

import collections
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core import small_reader
from ttt_jax import generation, methods, rewards

MODULE = sys.modules["ttt_jax.methods.ttrl"]
READ, STOP, PROMPTS, GROUPS = small_reader.READER, 0, 3, 3
STEPS = 6


def answer(x, generated):
    """The first token; the stop token is no answer."""
    first = generated.tokens[:, 0]
    return rewards.Answers(first, first != STOP)


@functools.cache
def params():
    """Embeddings small enough that every token has a chance."""
    drawn = small_reader.draw_params()
    return jax.tree.map(lambda leaf: 0.5 * leaf, drawn)


def groups(count=GROUPS, seed=0):
    """So many sets of prompts, of unequal length."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, small_reader.VOCABULARY, (count, PROMPTS, 4)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[:, 1, :2] = False
    mask[:, 2, 3:] = False
    truth = rng.integers(1, small_reader.VOCABULARY, (count, PROMPTS)).astype(np.int32)
    return {"tokens": tokens, "mask": mask, "truth": truth}


def predictor(**arguments):
    settings = {
        "num_tokens": 2,
        "stop": (STOP,),
        "optimizer": optax.adam(0.1),
        "num_steps": STEPS,
        "num_rollouts": 16,
        "num_trained": 8,
        "num_evaluated": 16,
        "truth": lambda x: x["truth"],
    }
    return methods.ttrl(READ, answer, **settings | arguments)


@functools.cache
def run_of(**arguments):
    return jax.jit(ttt.batched(predictor(**arguments)))


KEYS = ttt.sample_keys(jax.random.key(0), np.arange(GROUPS))


@functools.cache
def trained():
    return jax.device_get(run_of()(params(), groups(), KEYS))


def test_the_vote_becomes_sharper_and_answers_follow():
    output, info = trained()
    ratio = info.aux["majority_ratio"]
    assert ratio.shape == (GROUPS, STEPS)
    assert ratio[:, -1].mean() > ratio[:, 0].mean() + 0.1
    agree = []
    for generated in (output.before, output.after):
        first = generated.tokens[..., 0]
        counts = [np.bincount(row).max() for row in first.reshape(-1, first.shape[-1])]
        agree.append(np.mean(counts) / first.shape[-1])
    assert agree[1] > agree[0] + 0.1
    assert info.ok.all() and info.updated.all()


@functools.cache
def _draw():
    draw = generation.generate(READ, num_tokens=2, sampler=generation.sample(1.0), stop=(STOP,))
    return jax.jit(jax.vmap(draw, (None, None, 0)))


def drawn_answers(group, step, place):
    """The answers of the 16 rollouts of a step by the pristine weights, drawn again."""
    x = groups()
    prompt = {name: x[name][group, place] for name in ("tokens", "mask")}
    key = jax.random.fold_in(jax.random.split(KEYS[group])[0], step)
    key = jax.random.split(jax.random.fold_in(key, place))[0]
    keys = jax.vmap(lambda g: jax.random.fold_in(key, g))(jnp.arange(16))
    return np.asarray(_draw()(params(), prompt, keys)[0].tokens)[:, 0].tolist()


def label_of(answers):
    """The most frequent answer, the first among equals, and its votes."""
    counts = collections.Counter(t for t in answers if t != STOP)
    most = max(counts.values())
    return next(t for t in answers if counts.get(t) == most), most


def test_the_report_counts_the_labels_of_the_rollouts():
    _, info = trained()
    group = 1
    right, ratios, accuracy = [], [], []
    for place in range(PROMPTS):
        answers, truth = drawn_answers(group, 0, place), groups()["truth"][group, place]
        label, votes = label_of(answers)
        right.append(label == truth)
        ratios.append(votes / 16)
        accuracy.append(np.mean(np.equal(answers, truth)))
    for name, values in (
        ("label_right", right),
        ("majority_ratio", ratios),
        ("accuracy", accuracy),
    ):
        assert info.aux[name][group, 0] == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize("first_voter", [0, 8])
def test_the_votes_of_all_steps_so_far_make_the_label(first_voter):
    """Steps of size zero draw from the pristine weights, so that every vote is drawn again here."""
    arguments = {"keep_votes": True, "optimizer": optax.sgd(0.0), "num_steps": 3}
    _, info = run_of(held_out_votes=first_voter > 0, **arguments)(params(), groups(), KEYS)
    for group in range(GROUPS):
        ratios, right = np.zeros((2, 3))
        for place in range(PROMPTS):
            votes = []
            for step in range(3):
                votes += drawn_answers(group, step, place)[first_voter:]
                label, most = label_of(votes)
                ratios[step] += most / len(votes) / PROMPTS
                right[step] += (label == groups()["truth"][group, place]) / PROMPTS
        np.testing.assert_allclose(info.aux["majority_ratio"][group], ratios, atol=1e-6)
        np.testing.assert_allclose(info.aux["label_right"][group], right, atol=1e-6)


def test_kept_votes_change_nothing_at_the_first_step_and_the_labels_later():
    plain, kept = trained()[1], run_of(keep_votes=True)(params(), groups(), KEYS)[1]
    for name, leaf in plain.aux.items():
        if name != "stopped":
            np.testing.assert_array_equal(leaf[:, 0], kept.aux[name][:, 0])
    assert (np.asarray(plain.loss[:, 1:]) != np.asarray(kept.loss[:, 1:])).any()
    settings = {"reward": rewards.chance(), "num_steps": 2}
    both = [run_of(keep_votes=kept, **settings)(params(), groups(), KEYS) for kept in (False, True)]
    for leaf, wanted in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(leaf, wanted)


def test_a_vote_of_the_users_own_may_have_earlier_ones():
    """Twenty for one token: it is the label at every step, and nothing else is reported."""
    token = 5
    cast = jnp.ones(20, bool)
    earlier = rewards.Earlier(rewards.Answers(jnp.full(20, token), cast), cast)
    truth = lambda x: jnp.int32(token)  # noqa: E731
    own = rewards.majority(answer, earlier=lambda x: earlier, truth=truth)
    _, info = run_of(reward=own, num_steps=2)(params(), groups(), KEYS)
    np.testing.assert_array_equal(info.aux["label_right"], 1)
    assert set(info.aux) == set(trained()[1].aux)


def test_wrong_answers_alone_are_learned_from_below_the_consensus():
    """The mean is over prompts that are learned from, with a label or without."""

    def loss(params, x, key):
        used = (x["weight"] > 0).astype(jnp.float32)
        return x["weight"] * params, {"used": used, "labelled": jnp.zeros(())}

    mean = MODULE._over_prompts(loss, 2.0)
    x = {"tokens": np.zeros((4, 1), np.int32), "weight": np.array([3.0, 0.0, 1.0, 0.0])}
    (value, aux), _ = mean.value(jnp.float32(1.0), mean.init(None), x, KEYS[0])
    assert float(value) == 2.0 and aux["stopped"].shape == (4,)
    strict = {"min_consensus": 0.99, "rare": 0.2, "advantages": "fixed"}
    _, info = run_of(**strict)(params(), groups(), KEYS)
    assert not info.aux["labelled"][:, 0].any() and (info.aux["used"][:, 0] > 0).all()
    assert info.updated.all()


def test_groups_at_once_equal_one_after_another_in_any_order():
    output, info = trained()
    order = np.array([2, 0, 1])
    shuffled = jax.tree.map(lambda leaf: leaf[order], groups())
    others = run_of()(params(), shuffled, KEYS[order])
    alone = jax.jit(ttt.batched(predictor(), chunk_size=1))(params(), groups(), KEYS)
    for leaf, mixed, single in zip(
        jax.tree.leaves((output, info)),
        jax.tree.leaves(others),
        jax.tree.leaves(alone),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf[order], mixed)
        np.testing.assert_allclose(leaf, single, atol=2e-4)


def test_no_steps_leave_the_continuations_as_they_were():
    output, info = run_of(num_steps=0)(params(), groups(), KEYS)
    for before, after in zip(
        jax.tree.leaves(output.before), jax.tree.leaves(output.after), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    assert not info.updated.any() and output.held_out_before is None
    for wanted, leaf in zip(
        jax.tree.leaves(trained()[0].before), jax.tree.leaves(output.before), strict=True
    ):
        np.testing.assert_array_equal(wanted, leaf)


@pytest.mark.parametrize(
    ("arguments", "labelled"),
    [
        ({"answer": lambda x, g: rewards.Answers(g.tokens[:, 0], g.tokens[:, 0] < 0)}, 0.0),
        ({"reward": rewards.verifier(lambda x, g: jnp.ones(len(g.tokens)))}, None),
    ],
)
def test_without_an_answer_or_with_equal_rewards_nothing_moves(arguments, labelled):
    """No parsable answer makes no label (L16), equal rewards no step (L17)."""
    given = dict(arguments)
    predict = methods.ttrl(
        READ,
        given.pop("answer", answer),
        num_tokens=2,
        optimizer=optax.adamw(0.1, weight_decay=0.1),
        num_steps=2,
        num_rollouts=4,
        num_trained=None,
        num_evaluated=4,
        **given,
    )
    output, info = jax.jit(ttt.batched(predict))(params(), groups(), KEYS)
    assert info.ok.all() and not info.updated.any() and not info.loss.any()
    for before, after in zip(
        jax.tree.leaves(output.before), jax.tree.leaves(output.after), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    if labelled is not None:
        np.testing.assert_array_equal(info.aux["labelled"], labelled)


def test_held_out_prompts_are_continued_and_not_learned_from():
    """Transductive and held-out continuations stand apart (L18)."""
    others = groups(seed=1)
    x = groups() | {"held_out": others}
    output, _ = run_of()(params(), x, KEYS)
    plain = trained()[0]
    for name in ("before", "after"):
        for leaf, wanted in zip(
            jax.tree.leaves(getattr(output, name)),
            jax.tree.leaves(getattr(plain, name)),
            strict=True,
        ):
            np.testing.assert_array_equal(leaf, wanted)
    assert output.held_out_after.tokens.shape == (GROUPS, PROMPTS, 16, 2)
    assert (output.held_out_after.tokens != output.held_out_before.tokens).any()


def test_the_rule_stops_for_good():
    """At the agreement of a step's own rollouts, whichever votes make the label."""
    agreement = trained()[1].aux["agreement"]
    np.testing.assert_array_equal(agreement, trained()[1].aux["majority_ratio"])
    limit = float(np.median(agreement))
    for keeps in (False, True):
        check_stops(limit, keeps)


def check_stops(limit, keeps):
    _output, info = run_of(stop_ratio=limit, keep_votes=keeps)(params(), groups(), KEYS)
    if keeps:
        assert (info.aux["agreement"] > info.aux["majority_ratio"] + 0.01)[:, 2:].any()
    stopped = np.asarray(info.aux["stopped"]) > 0
    for row in range(GROUPS):
        reached = np.flatnonzero(np.asarray(info.aux["agreement"][row]) >= limit)
        first = reached[0] if reached.size else STEPS
        np.testing.assert_array_equal(stopped[row], np.arange(STEPS) >= first)
        np.testing.assert_array_equal(np.asarray(info.loss)[row, first:], 0)
    assert stopped.any()


def test_a_group_that_diverges_harms_no_other():
    bad = 1

    def reward(x, rollouts, key):
        value = jnp.where(x["truth"] < 0, jnp.nan, rollouts.tokens[:, 0].astype(jnp.float32))
        return rewards.Reward(value, jnp.ones(value.shape, bool), {})

    run = run_of(reward=reward)
    clean = groups()
    spoiled = jax.tree.map(np.copy, clean)
    spoiled["truth"][bad] = -1
    before = jax.tree.map(np.array, params())
    (right, ok), (made, info) = (run(params(), x, KEYS) for x in (clean, spoiled))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params()))
    assert ok.ok.all()
    np.testing.assert_array_equal(info.ok, np.arange(GROUPS) != bad)
    rest = np.arange(GROUPS) != bad
    for wanted, leaf in zip(jax.tree.leaves(right), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(wanted[rest], leaf[rest])
    np.testing.assert_array_equal(made.after.tokens[bad], made.before.tokens[bad])


def test_labels_may_come_from_rollouts_that_are_not_learned_from():
    _, info = run_of(held_out_votes=True)(params(), groups(), KEYS)
    # Eight voters: the ratio is a multiple of an eighth for each of the three prompts.
    eighths = np.asarray(info.aux["majority_ratio"][:, 0]) * 8 * PROMPTS
    np.testing.assert_allclose(eighths, np.round(eighths), atol=1e-5)
    assert info.updated.all()
    with pytest.raises(ValueError, match="num_trained=16 of num_rollouts=16"):
        predictor(held_out_votes=True, num_trained=None)


def test_labels_change_sides_only_where_there_are_two():
    """By hand: a label that was not there, or is not, was neither right nor wrong."""
    labelled = np.array([[1, 1, 1, 0, 0, 1], [1, 1, 0, 1, 1, 1]], np.float32)
    right = np.array([[1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]], np.float32)
    aux = MODULE._of_all_prompts({"labelled": jnp.array(labelled), "label_right": jnp.array(right)})
    np.testing.assert_allclose(aux["right_to_wrong"], [0, 1 / 6])
    np.testing.assert_allclose(aux["wrong_to_right"], [0, 1 / 6])


def test_settings_that_would_make_no_step_are_refused():
    with pytest.raises(ValueError, match=r"rare needs advantages='fixed'.*rare=0.2 and advantages"):
        predictor(rare=0.2, min_consensus=0.99)
    with pytest.raises(ValueError, match=r"advantages must be one of .*; got 'foo'"):
        predictor(advantages="foo")
    assert run_of(rare=0.5, min_consensus=0.99, advantages="fixed")(params(), groups(), KEYS)[
        1
    ].updated.all()


def test_other_instances_are_refused():
    with pytest.raises(ValueError, match=r"the tokens of P prompts, \[P, L\]; got \(4,\)"):
        predictor()(params(), np.ones(4, np.int32), KEYS[0])
