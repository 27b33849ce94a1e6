"""Rewards against counts in plain Python."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import rewards

KEY = jax.random.key(0)


def answer(x, rollouts):
    """The rollouts are the answers; -1 is none."""
    return rewards.Answers(rollouts, jnp.atleast_2d(rollouts.T).T[:, 0] >= 0)


def label_by_counting(answers, voters):
    """The most frequent answer, the first among equals, and its votes; None without an answer."""
    votes = collections.Counter(a for a in answers[voters:] if a >= 0)
    if not votes:
        return None, 0
    most = max(votes.values())
    return next(a for a in answers[voters:] if votes.get(a, 0) == most), most


@pytest.mark.parametrize("voters", [0, 4])
def test_the_most_frequent_answer_is_the_label(voters):
    rng = np.random.default_rng(0)
    groups = rng.integers(-1, 3, (200, 9))
    reward = rewards.majority(answer, first_voter=voters, truth=lambda x: jnp.int32(1))
    made = jax.jit(jax.vmap(lambda group: reward(None, group, KEY)))(groups)
    for row, group in enumerate(groups):
        label, votes = label_by_counting(group, voters)
        assert made.used[row].all() == (label is not None) == made.used[row].any()
        wanted = [label is not None and a == label for a in group]
        np.testing.assert_array_equal(made.value[row], wanted)
        aux = {name: float(leaf[row]) for name, leaf in made.aux.items()}
        assert aux["majority_ratio"] == pytest.approx(votes / (9 - voters))
        assert aux["labelled"] == (label is not None)
        assert aux["label_right"] == (label == 1)
        assert aux["accuracy"] == pytest.approx((group == 1).mean())


@pytest.mark.parametrize("voters", [0, 4])
def test_earlier_votes_count_with_those_of_the_rollouts(voters):
    """A place without a rollout is no voter, an earlier one without an answer is."""
    rng = np.random.default_rng(1)
    groups, past = rng.integers(-1, 4, (200, 9)), rng.integers(-1, 4, (200, 7))
    cast = rng.random((200, 7)) < 0.6
    earlier = lambda x: rewards.Earlier(rewards.Answers(x["past"], x["past"] >= 0), x["cast"])  # noqa: E731
    reward = rewards.majority(
        answer, first_voter=voters, earlier=earlier, truth=lambda x: jnp.int32(1)
    )
    x = {"past": past, "cast": cast}
    made = jax.jit(jax.vmap(lambda x, group: reward(x, group, KEY)))(x, groups)
    for row, group in enumerate(groups):
        voting = np.concatenate([past[row][cast[row]], group[voters:]])
        label, votes = label_by_counting(voting, 0)
        assert made.used[row].all() == (label is not None) == made.used[row].any()
        np.testing.assert_array_equal(made.value[row], (label is not None) & (group == label))
        aux = {name: leaf[row] for name, leaf in made.aux.items() if name != "votes"}
        assert aux["majority_ratio"] == pytest.approx(votes / len(voting))
        assert aux["label_right"] == (label == 1)
        assert aux["accuracy"] == pytest.approx((group == 1).mean())
    np.testing.assert_array_equal(made.aux["votes"].values[..., 0], groups[:, voters:])
    np.testing.assert_array_equal(made.aux["votes"].valid, groups[:, voters:] >= 0)


def test_no_answer_is_no_class_of_the_vote():
    group = jnp.array([-1, -1, -1, -1, 2])
    made = rewards.majority(answer)(None, group, KEY)
    np.testing.assert_array_equal(made.value, [0, 0, 0, 0, 1])
    assert float(made.aux["majority_ratio"]) == pytest.approx(0.2)
    none = rewards.majority(answer)(None, jnp.full(5, -1), KEY)
    assert not none.used.any() and not none.value.any()
    assert float(none.aux["labelled"]) == 0


def test_answers_of_several_numbers_agree_as_a_whole():
    group = jnp.array([[1, 2], [1, 3], [1, 2], [2, 1]])
    made = rewards.majority(answer, truth=lambda x: jnp.array([1, 2]))(None, group, KEY)
    np.testing.assert_array_equal(made.value, [1, 0, 1, 0])
    assert float(made.aux["accuracy"]) == 0.5


def test_without_consensus_rare_answers_are_wrong_ones():
    group = jnp.array([0, 0, 1, 1, 2, -1])
    strict = rewards.majority(answer, min_consensus=0.5)(None, group, KEY)
    assert not strict.used.any() and float(strict.aux["labelled"]) == 0
    negative = rewards.majority(answer, min_consensus=0.5, rare=0.2)(None, group, KEY)
    np.testing.assert_array_equal(negative.used, [0, 0, 0, 0, 1, 0])
    assert not negative.value.any()
    reached = rewards.majority(answer, min_consensus=1 / 3, rare=0.2)(None, group, KEY)
    assert reached.used.all()


def test_a_verifier_scores_every_rollout():
    score = lambda x, rollouts: x / rollouts  # noqa: E731
    made = rewards.verifier(score, invalid=-1.0)(1.0, jnp.array([0.5, 0.0, 2.0]), KEY)
    np.testing.assert_allclose(made.value, [2.0, -1.0, 0.5])
    assert float(made.aux["best"]) == 2.0 and made.used.all()
    with pytest.raises(ValueError, match="each of the 3 rollouts; got shape"):
        rewards.verifier(lambda x, rollouts: jnp.zeros(2))(1.0, jnp.zeros(3), KEY)


def test_the_controls_know_nothing_of_the_answer():
    group = jnp.array([3, -1, 1, 1])
    np.testing.assert_array_equal(rewards.answered(answer)(None, group, KEY).value, [1, 0, 1, 1])
    many = rewards.chance(0.3)(None, jnp.zeros(20_000), KEY)
    assert abs(float(many.value.mean()) - 0.3) < 0.02
    other = rewards.chance(0.3)(None, jnp.ones(20_000), KEY)
    np.testing.assert_array_equal(many.value, other.value)


def test_what_is_no_answer_is_refused():
    with pytest.raises(ValueError, match=r"rewards.Answers with values \[4\]"):
        rewards.majority(lambda x, rollouts: rollouts)(None, jnp.zeros(4), KEY)
    group = jnp.zeros((4, 2), jnp.int32)
    none = rewards.Answers(jnp.zeros(3, jnp.int32), jnp.ones(3, bool))
    for wrong in (none, rewards.Earlier(none, jnp.ones(3, bool))):
        with pytest.raises(ValueError, match=r"earlier\(x\) to return rewards.Earlier .* 2 num"):
            rewards.majority(answer, earlier=lambda x, wrong=wrong: wrong)(None, group, KEY)
    with pytest.raises(ValueError, match="first_voter is 4 of 4 rollouts"):
        rewards.majority(answer, first_voter=4)(None, jnp.zeros(4, jnp.int32), KEY)
