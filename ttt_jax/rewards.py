"""Rewards of several rollouts of one instance: a vote, a verifier, and the controls of both.

A reward is a function ``(x, rollouts, key) -> Reward``; every leaf of ``rollouts`` has a leading
axis over the G rollouts. :func:`ttt_jax.losses.policy_gradient` takes one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract
from ttt_jax.base import Key

__all__ = [
    "Answers",
    "Earlier",
    "Reward",
    "RewardFunction",
    "answered",
    "chance",
    "majority",
    "verifier",
]


class Answers(NamedTuple):
    """What rollouts answer.

    Attributes:
      values: integers ``[G]``, or ``[G, A]`` for answers of A numbers; equal answers are equal.
      valid: bool ``[G]``, False where a rollout has no answer.
    """

    values: jax.Array
    valid: jax.Array


class Earlier(NamedTuple):
    """Votes that were cast before.

    Attributes:
      answers: of E earlier rollouts, values ``[E]`` or ``[E, A]``.
      cast: bool ``[E]``, False for a place that has no rollout yet.
    """

    answers: Answers
    cast: jax.Array


class Reward(NamedTuple):
    """The reward of G rollouts.

    Attributes:
      value: float32 ``[G]``.
      used: bool ``[G]``, which rollouts are learned from.
      aux: named scalars for the report of a step, and what a method keeps from step to step.
    """

    value: jax.Array
    used: jax.Array
    aux: dict[str, Any]


RewardFunction: TypeAlias = Callable[[Any, Any, Key], Reward]
AnswerFunction: TypeAlias = Callable[[Any, Any], Answers]


def answers_of(place: str, answer: AnswerFunction, x: Any, rollouts: Any) -> Answers:
    """What G rollouts answer, values ``[G, A]``; ``place`` is named where it is no answer."""
    made = answer(x, rollouts)
    count = _checks.leading_size(place, rollouts)
    fits = isinstance(made, Answers) and jnp.shape(made.valid) == (count,)
    if not fits or jnp.ndim(made.values) not in (1, 2) or len(made.values) != count:
        raise ValueError(
            f"{place} needs answer(x, rollouts) to return rewards.Answers with values [{count}] or "
            f"[{count}, A] and valid [{count}]; got {_contract.described(made)}."
        )
    values = jnp.asarray(made.values)
    return Answers(values.reshape(count, -1), jnp.asarray(made.valid, bool))


def _earlier(made: Any, answers: Answers) -> Earlier:
    """Votes cast before, in the form of the answers that they are counted with."""
    numbers = answers.values.shape[1]
    fits = isinstance(made, Earlier) and isinstance(made.answers, Answers)
    if fits:
        shape = jnp.shape(made.cast)
        forms = [(*shape, numbers), *([shape] if numbers == 1 else [])]
        fits = len(shape) == 1 and jnp.shape(made.answers.valid) == shape
        fits = fits and jnp.shape(made.answers.values) in forms
    if not fits:
        raise ValueError(
            f"rewards.majority needs earlier(x) to return rewards.Earlier with answers of {numbers}"
            f" numbers, values [E, {numbers}], valid [E] and cast [E]; got "
            f"{_contract.described(made)}."
        )
    values = jnp.asarray(made.answers.values).reshape(-1, numbers)
    cast = jnp.asarray(made.cast, bool)
    return Earlier(Answers(values, jnp.asarray(made.answers.valid, bool) & cast), cast)


def agreement(answers: Answers) -> jax.Array:
    """Bool ``[G, G]``: which rollouts have the same answer; none has that of one without."""
    same = (answers.values[:, None] == answers.values[None]).all(-1)
    return same & answers.valid[:, None] & answers.valid[None]


@_arguments.checked(
    first_voter=_arguments.count(0),
    min_consensus=_arguments.number(0.0, 1.0),
    rare=_arguments.number(0.0, 1.0),
)
def majority(
    answer: AnswerFunction,
    *,
    first_voter: int = 0,
    min_consensus: float | jax.Array = 0.0,
    rare: float | jax.Array | None = None,
    earlier: Callable[[Any], Earlier] | None = None,
    truth: Callable[[Any], jax.Array] | None = None,
) -> RewardFunction:
    """Agreement with the most frequent answer, which stands for the unknown right one.

    ``value[g] = 1`` where answer g equals the label, else 0. "No answer" is no class of the vote:
    a rollout without one never votes and has reward 0, and where none has an answer there is no
    label and nothing is learned. Of equally frequent answers the one that came first is the label.

    **Fails** where the most frequent answer is wrong: every step then makes it more frequent. The
    ratio rises in either case, so it is no measure of success; report the label's accuracy.

    Args:
      answer: ``answer(x, rollouts) -> Answers``.
      first_voter: rollouts before it do not vote; with as many as are learned from, labels come
        from a half of its own (a control of self-agreement).
      min_consensus: the least share of the voters, those without an answer counted, that makes a
        label; may be traced.
      rare: without a label, answers of at most this share are learned from as wrong ones (value
        0), and the others not at all: give ``advantages="fixed"`` with it. None for no such step.
      earlier: ``earlier(x) -> Earlier``, votes that count with those of the rollouts and come
        before them; they have no reward of their own. None for none.
      truth: ``truth(x) -> value`` of an answer, ``[]`` or ``[A]``; for the report alone.

    Returns:
      A reward with aux ``majority_ratio`` (votes of the most frequent answer over voters),
      ``agreement`` (the same of these rollouts alone: another number where ``earlier`` ones vote)
      and ``labelled`` (1 or 0); with ``truth`` also ``label_right``, whether the label is the
      truth, and ``accuracy``, the share of right rollouts; with ``earlier`` also ``votes``, the
      :class:`Answers` of the rollouts that vote, to be kept for later ones.

    Raises:
      ValueError: an argument out of range; when called: ``answer`` or ``earlier`` returns another
        thing, or nobody votes.

    References:
      Zuo et al., `TTRL <https://arxiv.org/abs/2504.16084>`_, 2025, Eq. 3 and 4; `SCRL
      <https://arxiv.org/abs/2603.19880>`_, 2026, for the least consensus and negative labels.
    """
    _contract.require_function("answer", answer, "(x, rollouts) -> rewards.Answers")

    def reward(x: Any, rollouts: Any, key: Key) -> Reward:
        answers = answers_of("rewards.majority", answer, x, rollouts)
        count = len(answers.valid)
        if first_voter >= count:
            raise ValueError(
                f"rewards.majority needs a voter; first_voter is {first_voter} of {count} "
                "rollouts: draw more, or let more of them vote."
            )
        voters = jnp.arange(count) >= first_voter
        aux: dict[str, Any] = {}
        if earlier is not None:
            aux["votes"] = jax.tree.map(lambda leaf: leaf[first_voter:], answers)
            before = _earlier(earlier(x), answers)
            answers = jax.tree.map(lambda *parts: jnp.concatenate(parts), before.answers, answers)
            voters = jnp.concatenate([before.cast, voters])
        same = agreement(answers)
        votes = (same & voters[None]).sum(1, dtype=jnp.float32)
        winner = jnp.argmax(jnp.where(voters, votes, -1.0))
        shares = votes / voters.sum(dtype=jnp.float32)
        ratio = shares[winner]
        labelled = answers.valid[winner] & (ratio >= min_consensus)
        used = jnp.broadcast_to(labelled, answers.valid.shape)
        if rare is not None:
            used = jnp.where(labelled, used, answers.valid & (shares <= rare))
        value = (same[winner] & labelled).astype(jnp.float32)
        own, with_label = voters[-count:], same[winner][-count:]
        aux |= {
            "majority_ratio": ratio,
            "agreement": (with_label & own).sum(dtype=jnp.float32) / own.sum(dtype=jnp.float32),
            "labelled": labelled.astype(jnp.float32),
        }
        if truth is not None:
            right = answers.valid & (answers.values == jnp.atleast_1d(truth(x))[None]).all(-1)
            aux["label_right"] = (labelled & right[winner]).astype(jnp.float32)
            aux["accuracy"] = right[-count:].mean(dtype=jnp.float32)
        return Reward(value[-count:], used[-count:], aux)

    return reward


@_arguments.checked(invalid=_arguments.number())
def verifier(
    score: Callable[[Any, Any], jax.Array], *, invalid: float | jax.Array = 0.0
) -> RewardFunction:
    """A score of every rollout that a program computes: a check of 0 and 1, or a measure.

    Args:
      score: ``score(x, rollouts) -> [G]``, numbers or bools.
      invalid: the reward of a rollout whose score is not finite.

    Returns:
      A reward with aux ``best`` and ``accuracy``, the largest and the mean value.

    Raises:
      ValueError: when called: a score of another shape.
    """
    _contract.require_function("score", score, "(x, rollouts) -> [G]")

    def reward(x: Any, rollouts: Any, key: Key) -> Reward:
        count = _checks.leading_size("rewards.verifier", rollouts)
        value = jnp.asarray(score(x, rollouts)).astype(jnp.float32)
        if value.shape != (count,):
            raise ValueError(
                f"rewards.verifier needs score(x, rollouts) to return a number for each of the "
                f"{count} rollouts; got shape {value.shape}."
            )
        value = jnp.where(jnp.isfinite(value), value, invalid)
        aux = {"best": value.max(), "accuracy": value.mean()}
        return Reward(value, jnp.ones(count, bool), aux)

    return reward


@_arguments.checked()
def answered(answer: AnswerFunction) -> RewardFunction:
    """1 for a rollout that has an answer, right or wrong: the control of format alone.

    Args:
      answer: as for :func:`majority`.
    """
    _contract.require_function("answer", answer, "(x, rollouts) -> rewards.Answers")

    def reward(x: Any, rollouts: Any, key: Key) -> Reward:
        valid = answers_of("rewards.answered", answer, x, rollouts).valid
        value = valid.astype(jnp.float32)
        return Reward(value, jnp.ones_like(valid), {"accuracy": value.mean()})

    return reward


@_arguments.checked(p=_arguments.number(0.0, 1.0))
def chance(p: float | jax.Array = 0.5) -> RewardFunction:
    """1 with probability p, whatever the rollout: the control without any signal.

    Args:
      p: may be traced.

    References:
      Shao et al., `Spurious Rewards <https://arxiv.org/abs/2506.10947>`_, 2025.
    """

    def reward(x: Any, rollouts: Any, key: Key) -> Reward:
        count = _checks.leading_size("rewards.chance", rollouts)
        value = jax.random.bernoulli(key, p, (count,)).astype(jnp.float32)
        return Reward(value, jnp.ones(count, bool), {"accuracy": value.mean()})

    return reward
