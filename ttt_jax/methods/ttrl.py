"""Test-time reinforcement learning: the majority answer is the label of a policy gradient."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, _checks, _trees, generation, inner, readers, rewards, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Adapter, Info, Key, Params, Predictor, Selection, StatefulLoss
from ttt_jax.generation import Generated
from ttt_jax.losses.policy import check_advantages, policy_gradient
from ttt_jax.readers import Reader

# The leaf of a prompt that holds the votes of earlier steps.
_EARLIER = "earlier_votes"


class Reinforced(NamedTuple):
    """Continuations before and after adapting, E of each prompt.

    Attributes:
      before: of the prompts that are learned from, leaves ``[P, E, T]``.
      after: the same prompts and keys, by the adapted weights.
      held_out_before: of ``x["held_out"]``, ``[H, E, T]``; None without.
      held_out_after: by the adapted weights.
    """

    before: Generated
    after: Generated
    held_out_before: Generated | None
    held_out_after: Generated | None


@_arguments.checked(
    read=readers.rule,
    num_tokens=_arguments.count(1),
    num_rollouts=_arguments.count(1),
    num_evaluated=_arguments.count(1),
    min_consensus=_arguments.number(0.0, 1.0),
    stop_ratio=_arguments.number(0.0),
)
def ttrl(
    read: Reader,
    answer: rewards.AnswerFunction,
    *,
    num_tokens: int,
    stop: Sequence[int] = (),
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    select: Selection = select.lora(),
    num_steps: int = 30,
    num_rollouts: int = 64,
    num_trained: int | None = 32,
    temperature: float | jax.Array = 1.0,
    min_consensus: float | jax.Array = 0.0,
    rare: float | jax.Array | None = None,
    held_out_votes: bool = False,
    keep_votes: bool = False,
    advantages: Literal["group", "centered", "fixed"] = "group",
    kl: float | jax.Array = 0.0,
    stop_ratio: float | jax.Array = 2.0,
    truth: Callable[[Any], jax.Array] | None = None,
    reward: rewards.RewardFunction | None = None,
    num_evaluated: int = 16,
    evaluation_sampler: generation.Sampler | None = None,
) -> Predictor:
    """A predictor that trains on its own test prompts, with votes in place of labels.

    An instance is a **set** of prompts, all of one task, and gets one private adapter. At every
    step each prompt is continued ``num_rollouts`` times by the weights as they are; the most
    frequent answer is its label, and the first ``num_trained`` rollouts are learned from with
    reward 1 where they agree with it (:func:`ttt_jax.rewards.majority`,
    :func:`ttt_jax.losses.policy_gradient`), averaged over the prompts that are learned from::

        y[p, g] ~ p(. | prompt p; w),   label[p] = most frequent answer,   r = (answer = label)
        w <- optimizer(w, grad of mean_p policy_gradient(p))

    Then all prompts are continued ``num_evaluated`` times, by the pristine weights and by the
    adapted ones with the same keys. Prompts under ``held_out`` are only continued: what was learned
    from its own test prompts and what carries over to others are two numbers.

    **Published:** 64 rollouts, 32 of them learned from, 8 prompts per step, all weights with AdamW
    5e-7, no divergence, rollouts at temperature 1, evaluation at 0.6 with top-p 0.95 and 16
    samples: Qwen2.5-Math-7B on AIME 2024 from 12.9 to 40.2. Here every step has all prompts, and
    low-rank leaves adapt, with a larger step size.

    **Fails** where the majority is wrong: it becomes more so. The majority ratio rises either way
    until all rollouts agree and nothing more is learned; accuracy may fall long before
    (``stop_ratio``). Labels that are made anew at each step follow the answers as these become
    alike, right or wrong; the votes of all steps (``keep_votes``) hold them to what the pristine
    weights answered, at no further rollout. What it gains is what a vote before it has already, or
    little more: compare with the vote of as many samples, with a label by held-out votes, and with
    random and format rewards.

    **Cost** of a step: ``P * num_rollouts`` continuations, and one forward and backward pass over
    ``P * num_trained`` of them. A prompt is read again for each of its continuations. With
    ``keep_votes`` each prompt compares all pairs of ``num_steps * num_rollouts`` answers at every
    step, which is little beside the continuations.

    Args:
      read: as for :func:`ttt_jax.generation.generate`.
      answer: ``answer(x, generated) -> rewards.Answers`` of G continuations ``[G, T]`` of one
        prompt.
      num_tokens: T at most, static.
      stop: tokens that end a continuation.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: S, static; 0 is the control.
      num_rollouts: drawn per prompt and step, static.
      num_trained: how many of them are learned from; None for all.
      temperature: of the rollouts.
      min_consensus: of the votes; below it a prompt has no label.
      rare: see :func:`ttt_jax.rewards.majority`; with ``advantages="fixed"``.
      held_out_votes: whether only those that are not learned from vote.
      keep_votes: whether the rollouts of all steps so far vote, and not those of this step alone:
        the labels of Laine and Aila's temporal ensembling, counted. ``min_consensus``, ``rare`` and
        the majority ratio are then shares of all votes so far, and the leaf ``earlier_votes`` of a
        prompt is the method's.
      advantages: see :func:`ttt_jax.losses.policy_gradient`.
      kl: weight of the divergence from the pristine weights.
      stop_ratio: no step is taken once the share of a step's rollouts that give the label, a mean
        over the prompts, has reached it; the default is never reached. May be traced.
      truth: ``truth(x) -> value`` of the right answer of a prompt, for the report alone.
      reward: another reward, in place of the vote; the arguments of the vote then do nothing.
      num_evaluated: E, static.
      evaluation_sampler: None for the published one.

    Returns:
      A :class:`~ttt_jax.Predictor` over ``x``: a mapping of ``tokens`` int ``[P, L]``, where wanted
      ``mask`` ``[P, L]`` and what ``answer`` and ``truth`` read, each with a leading axis P; and
      where wanted ``held_out``, such a mapping of other prompts. Output :class:`Reinforced`.
      ``Info.aux``, each ``[S]``, means over the prompts: ``reward``, ``used`` (whether a prompt is
      learned from), ``majority_ratio``, ``agreement``, ``labelled``, ``stopped``; with ``truth``
      also ``label_right``, ``accuracy``, ``right_to_wrong`` and ``wrong_to_right``, the shares of
      prompts whose label was right, or wrong, at the first step and is the other now: one that has
      no label, then or now, is in neither. An instance
      with a step that is not finite returns the pristine continuations in both places, ``ok``
      False.

    Raises:
      TypeError: ``read`` is no reader.
      ValueError: an argument out of range, or no rollout left to vote; when called: ``x`` without
        ``tokens`` ``[P, L]``.

    References:
      Zuo et al., `TTRL <https://arxiv.org/abs/2504.16084>`_, 2025, Section 3 (github.com/
      PRIME-RL/TTRL); Laine and Aila, `Temporal Ensembling <https://arxiv.org/abs/1610.02242>`_,
      2017, for ``keep_votes``.
    """
    inner.check_num_steps(num_steps)
    if num_trained is not None:
        _checks.check_count("num_trained, unless None,", num_trained)
    _check_negatives(advantages, rare)
    trained = num_rollouts if num_trained is None else min(num_trained, num_rollouts)
    if held_out_votes and trained == num_rollouts:
        raise ValueError(
            f"held_out_votes needs rollouts that are not learned from; got num_trained={trained} "
            f"of num_rollouts={num_rollouts}."
        )
    vote = reward or rewards.majority(
        answer,
        first_voter=trained if held_out_votes else 0,
        min_consensus=min_consensus,
        rare=rare,
        earlier=(lambda x: x[_EARLIER]) if keep_votes else None,
        truth=truth,
    )
    draw = generation.generate(
        read, num_tokens=num_tokens, sampler=generation.sample(temperature), stop=stop
    )
    evaluate = generation.generate(
        read,
        num_tokens=num_tokens,
        sampler=evaluation_sampler or generation.sample(0.6, 0.95),
        stop=stop,
    )
    score = generation.log_probs(read)

    def log_prob(params: Params, x: Any, generated: Generated) -> Any:
        return score(params, x, generated), generated.mask

    roll = generation.several(draw, num_rollouts)
    policy = functools.partial(
        policy_gradient,
        roll,
        log_prob,
        vote,
        num_trained=trained,
        advantages=advantages,
        kl=kl,
        report=True,
    )

    keeps = keep_votes and reward is None
    voters = num_rollouts - (trained if held_out_votes else 0)
    no_votes = _no_votes(answer, roll, num_steps * voters) if keeps else lambda *given: ()

    def adapter_of(*given: Any) -> Adapter:
        loss = _over_prompts(policy(pristine=given[0]), stop_ratio, no_votes(*given))
        return gradient_adapter(loss, optimizer, select=select, has_aux=True)

    return _before_and_after(adapter_of, num_steps, generation.several(evaluate, num_evaluated))


def _check_negatives(advantages: Any, rare: Any) -> None:
    """Refuses unknown advantages, and those under which a prompt without a label makes no step."""
    check_advantages(advantages)
    if rare is not None and advantages in ("group", "centered"):
        raise ValueError(
            "rare needs advantages='fixed', as the wrong answers of a prompt without a label are "
            f"all of reward 0, which others make no step of; got rare={rare} and advantages="
            f"{advantages!r}."
        )


def _before_and_after(
    adapter_of: Callable[[Params, Any, Key], Adapter],
    num_steps: int,
    evaluate: Callable[..., Generated],
) -> Predictor:
    """Adapts to the prompts, and continues them and the others by both weights."""
    many = _each_prompt(evaluate)

    def predict(params: Params, x: Any, key: Key) -> tuple[Reinforced, Info]:
        prompts, held_out = _prompts(x)
        train_key, evaluation_key = jax.random.split(key)
        adapter = adapter_of(params, prompts, train_key)
        state = adapter.init(params)
        steps, infos = inner.inner_loop(adapter, num_steps)(params, state, prompts, train_key)
        ok = infos.finite.all()
        adapted = adapter.merge(params, _trees.where(ok, steps, state))

        def pair(part: Any, place: int) -> tuple[Any, Any]:
            place_key = jax.random.fold_in(evaluation_key, place)
            return many(params, part, place_key), many(adapted, part, place_key)

        before, after = pair(prompts, 0)
        others = (None, None) if held_out is None else pair(held_out, 1)
        updated = ok & (steps.count > 0)
        aux = _of_all_prompts(infos.aux)
        info = Info(infos.loss, infos.grad_norm, ok, updated, aux)
        return Reinforced(before, after, *others), info

    return predict


def _each_prompt(call: Callable[[Params, Any, Key], Any]) -> Callable[[Params, Any, Key], Any]:
    """``call`` over the leading axis of the prompts; a prompt's key follows its place."""

    def run(params: Params, prompts: Any, key: Key) -> Any:
        places = jnp.arange(len(prompts["tokens"]))
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
        return jax.vmap(call, (None, 0, 0))(params, prompts, keys)

    return run


def _prompts(x: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The prompts that are learned from, and those that are held out."""
    leaves = dict(x) if isinstance(x, Mapping) else {"tokens": x}
    held_out = leaves.pop("held_out", None)
    for name, part in (("x", leaves), ("x['held_out']", held_out)):
        if part is None:
            continue
        tokens = part.get("tokens", 0) if isinstance(part, Mapping) else 0
        if jnp.ndim(tokens) != 2:
            raise ValueError(
                f"methods.ttrl needs {name} with the tokens of P prompts, [P, L]; got "
                f"{jnp.shape(tokens)}: an instance is a set of prompts, padded to one length and "
                "with a mask."
            )
        _checks.leading_size(f"methods.ttrl, {name}", part)
    return leaves, held_out


def _no_votes(
    answer: rewards.AnswerFunction, roll: Callable[..., Generated], count: int
) -> Callable[[Params, Any, Key], rewards.Earlier]:
    """``(params, prompts, key) ->`` places for ``count`` votes of each prompt."""

    def answers(params: Params, x: Any, key: Key) -> rewards.Answers:
        return rewards.answers_of("methods.ttrl", answer, x, roll(params, x, key))

    def places(params: Params, prompts: Any, key: Key) -> rewards.Earlier:
        made = jax.eval_shape(_each_prompt(answers), params, prompts, key).values
        cast = jnp.zeros((made.shape[0], count), bool)
        values = jnp.zeros((*cast.shape, made.shape[-1]), made.dtype)
        return rewards.Earlier(rewards.Answers(values, cast), cast)

    return places


def _cast(votes: rewards.Earlier, made: rewards.Answers, step: jax.Array) -> rewards.Earlier:
    """The votes of all prompts with those of this step."""
    first = step * made.valid.shape[1]

    def put(places: jax.Array, leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(places, leaf, first, axis=1)

    cast = put(votes.cast, jnp.ones_like(made.valid))
    return rewards.Earlier(jax.tree.map(put, votes.answers, made), cast)


def _over_prompts(loss: Any, stop_ratio: float | jax.Array, votes: Any = ()) -> StatefulLoss:
    """The mean over prompts that are learned from, zero for good once the vote is as one.

    ``votes`` are the places of those that are kept, :func:`_no_votes`; without any, none is.
    """
    each = _each_prompt(loss)

    def value(params: Params, memory: Any, prompts: Any, key: Key) -> Any:
        stopped, votes, step = memory
        if isinstance(votes, rewards.Earlier):
            prompts = prompts | {_EARLIER: votes}
        values, aux = each(params, prompts, key)
        aux = dict(aux)
        # No number of a report: a vote with earlier ones names those of its own.
        made: Any = aux.pop("votes") if isinstance(aux.get("votes"), rewards.Answers) else None
        if isinstance(votes, rewards.Earlier):
            votes = _cast(votes, made, step)
        if "agreement" in aux:
            stopped = stopped | (aux["agreement"].mean() >= stop_ratio)
        mean = values.sum() / jnp.maximum(aux["used"].sum(), 1.0)
        aux = aux | {"stopped": jnp.broadcast_to(stopped.astype(jnp.float32), values.shape)}
        return (jnp.where(stopped, 0.0, mean), aux), (stopped, votes, step + 1)

    return StatefulLoss(
        init=lambda params: (jnp.zeros((), bool), votes, jnp.zeros((), jnp.int32)),
        value=value,
        after=lambda adapted, memory: memory,
    )


def _of_all_prompts(aux: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Means over the prompts ``[S]``, and how many labels changed sides since the first step."""
    means = {name: leaf.mean(1) for name, leaf in aux.items()}
    if "label_right" in aux and len(aux["label_right"]):
        right = aux["label_right"] > 0
        # A reward of the caller's may give every prompt a label.
        wrong = (aux.get("labelled", jnp.ones(right.shape)) > 0) & ~right
        means["right_to_wrong"] = (right[:1] & wrong).mean(1, dtype=jnp.float32)
        means["wrong_to_right"] = (wrong[:1] & right).mean(1, dtype=jnp.float32)
    return means
