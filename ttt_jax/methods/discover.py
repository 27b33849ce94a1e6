"""Discovery at test time: search and reinforcement for the best solution of one problem."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax import _arguments, generation, inner, readers, rewards, select
from ttt_jax.adapters import gradient_adapter
from ttt_jax.base import Info, Key, Params, Predictor, Selection, StatefulLoss
from ttt_jax.generation import Generated
from ttt_jax.losses.policy import AdvantageFunction, entropic_advantages, policy_gradient
from ttt_jax.readers import Reader

# Of a solution that the program could not score, and of a free place. Finite, as a state in which a
# number that was finite is no more counts as a step that failed.
_NONE = float(jnp.finfo(jnp.float32).min)


class Discovery(NamedTuple):
    """What was found.

    Attributes:
      solution: int ``[A]``, the best one, the start among them.
      score: float32 scalar, of it; -inf where nothing could be scored.
      first: float32 scalar, of the best start.
    """

    solution: jax.Array
    score: jax.Array
    first: jax.Array


class _Pool(NamedTuple):
    """Solutions to go on from, B of them, distinct.

    Attributes:
      states: int32 ``[B, A]``.
      scores: float32 ``[B]``; ``_NONE`` in a free place.
      best: float32 ``[B]``, the best score among what each led to; ``_NONE`` before.
      visits: float32 ``[B]``.
    """

    states: jax.Array
    scores: jax.Array
    best: jax.Array
    visits: jax.Array


class _Search(NamedTuple):
    """Where a search stands.

    Attributes:
      pool: solutions to go on from.
      state: int32 ``[A]``, the best so far.
      score: of it.
    """

    pool: _Pool
    state: jax.Array
    score: jax.Array


@_arguments.checked(
    read=readers.rule,
    num_tokens=_arguments.count(1),
    num_rollouts=_arguments.count(2),
    num_starts=_arguments.count(1),
    pool_size=_arguments.count(1),
    exploration=_arguments.number(0.0),
)
def discover(
    read: Reader,
    starts: Callable[[Any], jax.Array],
    prompt: Callable[[Any, jax.Array], Any],
    solution: Callable[[Any, Generated], jax.Array],
    score: Callable[[Any, jax.Array], jax.Array],
    *,
    num_tokens: int,
    stop: Sequence[int] = (),
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    select: Selection = select.lora(),
    num_steps: int = 50,
    num_starts: int = 8,
    num_rollouts: int = 64,
    pool_size: int = 64,
    exploration: float | jax.Array = 1.0,
    reuse: bool = True,
    advantages: AdvantageFunction | None = None,
    temperature: float | jax.Array = 1.0,
    kl: float | jax.Array = 0.0,
) -> Predictor:
    """A predictor that searches for the best solution of one problem and learns while it does.

    At every step the most promising solutions of a pool are written into prompts, each is
    continued ``num_rollouts`` times, and a program scores what comes out. The private adapter
    learns from the scores, with weights that reward the **best** rollouts of a group and not their
    mean, and the best distinct solutions stay in the pool::

        worth[b] = best score that b led to + c * spread * prior[b] * sqrt(1 + visits) / (1 + n[b])
        w <- optimizer(w, grad of the mean over starts of policy_gradient, entropic advantages)

    with a prior that falls linearly with the rank of b's own score (PUCT). What counts is the best
    solution found; the weights are forgotten.

    **Published:** 50 steps of 8 starts and 64 rollouts, a divergence of log 2, a model of 120
    billion weights with low-rank factors and a penalty on the divergence from the pristine model.

    **Fails** where scores hardly differ within a group, or where the pristine model never writes a
    solution that can be scored: there is nothing to learn from. Compare with the best of as many
    samples, ``reuse=False`` and ``optimizer=optax.sgd(0.0)``, which is this function without its
    two ideas, and with each of them alone.

    **Cost** of a step: ``num_starts * num_rollouts`` continuations, and a forward and backward pass
    over them.

    Args:
      read: as for :func:`ttt_jax.generation.generate`.
      starts: ``starts(x) -> int [M, A]``, solutions to begin with, M at most ``pool_size``.
      prompt: ``prompt(x, state[A]) -> tokens [P]``, or a mapping of ``tokens`` and ``mask``: what
        is asked for, given one solution.
      solution: ``solution(x, generated) -> int [G, A]``, what continuations ``[G, T]`` propose.
      score: ``score(x, solutions[G, A]) -> [G]``, larger is better; what is not finite cannot be
        scored, is rewarded as the worst of its group, and never kept.
      num_tokens: T at most, static.
      stop: tokens that end a continuation.
      optimizer: an optax transformation.
      select: the parameters that adapt.
      num_steps: S, static.
      num_starts: solutions that each step goes on from, at most ``pool_size``, static.
      num_rollouts: G, of each, static.
      pool_size: B, static.
      exploration: c; may be traced.
      reuse: whether solutions that were found enter the pool; else all steps go on from ``starts``.
      advantages: of the rewards; None for :func:`ttt_jax.losses.entropic_advantages`.
      temperature: of the rollouts.
      kl: weight of the divergence from the pristine weights.

    Returns:
      A :class:`~ttt_jax.Predictor` over one problem ``x``, with output :class:`Discovery`.
      ``Info.aux``, each ``[S]``: ``best``, the best score so far, ``mean`` and ``scored``, the mean
      score and the share of the step's rollouts that could be scored. ``ok`` is False where a step
      was not finite: it is not taken, and what was found stays.

    Raises:
      TypeError: ``read`` is no reader.
      ValueError: an argument out of range; when called: a function that returns another shape.

    References:
      `Learning to Discover at Test Time <https://arxiv.org/abs/2601.16175>`_, 2026
      (github.com/test-time-training/discover).
    """
    inner.check_num_steps(num_steps)
    if num_starts > pool_size:
        raise ValueError(f"num_starts must be at most pool_size; got {num_starts} and {pool_size}.")
    draw = generation.generate(
        read, num_tokens=num_tokens, sampler=generation.sample(temperature), stop=stop
    )
    log_probs, rollouts = generation.log_probs(read), generation.several(draw, num_rollouts)
    policy = functools.partial(
        policy_gradient,
        lambda params, x, key: rollouts(params, x["prompt"], key),
        lambda params, x, made: (log_probs(params, x["prompt"], made), made.mask),
        _reward(solution, score, num_rollouts),
        advantages=advantages or entropic_advantages(),
        kl=kl,
        report=True,
    )
    adapter_of = functools.partial(
        gradient_adapter, optimizer=optimizer, select=select, has_aux=True
    )
    plan = _Plan(starts, prompt, score, num_starts, pool_size, exploration, reuse)
    return _searching(plan, policy, adapter_of, num_steps)


class _Plan(NamedTuple):
    """Arguments of :func:`discover` that say how it searches."""

    starts: Callable[[Any], jax.Array]
    prompt: Callable[[Any, jax.Array], Any]
    score: Callable[[Any, jax.Array], jax.Array]
    num_starts: int
    pool_size: int
    exploration: float | jax.Array
    reuse: bool


def _reward(
    solution: Callable[..., jax.Array], score: Callable[..., jax.Array], count: int
) -> rewards.RewardFunction:
    """The scores of what continuations propose, with the proposals in ``aux``."""

    def reward(x: Any, generated: Generated, key: Key) -> rewards.Reward:
        states = solution(x["problem"], generated).astype(jnp.int32)
        values = score(x["problem"], states).astype(jnp.float32)
        if states.ndim != 2 or values.shape != (count,) or len(states) != count:
            raise ValueError(
                f"methods.discover needs solutions [{count}, A] and a score for each; got shapes "
                f"{states.shape} and {values.shape}."
            )
        finite = jnp.isfinite(values)
        worst = jnp.where(finite, values, jnp.inf).min()
        value = jnp.where(finite, values, jnp.where(jnp.isfinite(worst), worst, 0.0))
        aux = {"states": states, "scores": jnp.where(finite, values, _NONE)}
        return rewards.Reward(value, jnp.ones_like(finite), aux)

    return reward


def _searching(
    plan: _Plan, policy: Callable[..., Any], adapter_of: Callable[..., Any], num_steps: int
) -> Predictor:
    def predict(params: Params, x: Any, key: Key) -> tuple[Discovery, Info]:
        start = _begun(plan.starts(x), lambda states: plan.score(x, states), plan.pool_size)
        value = _step_of(plan, policy(pristine=params))
        loss = StatefulLoss(lambda params: start, value, lambda adapted, search: search)
        adapter = inner.guarded(adapter_of(loss))
        state, infos = inner.inner_loop(adapter, num_steps)(params, adapter.init(params), x, key)
        found = Discovery(state.memory.state, _shown(state.memory.score), _shown(start.score))
        ok, updated = infos.finite.all(), state.count > 0
        aux = dict(infos.aux)
        if "best" in aux:
            aux["best"] = _shown(aux["best"])
        return found, Info(infos.loss, infos.grad_norm, ok, updated, aux)

    return predict


def _step_of(plan: _Plan, policy: Any) -> Callable[[Params, _Search, Any, Key], Any]:
    """The loss over the starts of a step, and where the search stands after it."""

    def value(params: Params, search: _Search, problem: Any, key: Key) -> Any:
        chosen = _promising(search.pool, plan.num_starts, plan.exploration)
        prompts = jax.vmap(lambda state: plan.prompt(problem, state))(search.pool.states[chosen])
        places = jnp.arange(plan.num_starts)
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)

        def each(prompt: Any, key: Key) -> Any:
            return policy(params, {"problem": problem, "prompt": prompt}, key)

        losses, aux = jax.vmap(each)(prompts, keys)
        scores = aux["scores"]
        after = _after(search, chosen, aux["states"], scores, plan.reuse)
        scored = scores > _NONE
        mean = jnp.where(scored, scores, 0.0).sum()
        mean = mean / jnp.maximum(scored.sum(dtype=jnp.float32), 1.0)
        share = scored.mean(dtype=jnp.float32)
        return (losses.mean(), {"best": after.score, "mean": mean, "scored": share}), after

    return value


def _shown(score: jax.Array) -> jax.Array:
    return jnp.where(score > _NONE, score, -jnp.inf)


def _begun(states: jax.Array, score: Callable[[jax.Array], jax.Array], size: int) -> _Search:
    """A search with the solutions to begin with."""
    states = jnp.asarray(states).astype(jnp.int32)
    if states.ndim != 2 or not 0 < len(states) <= size:
        raise ValueError(
            f"methods.discover needs starts(x) to return 1 to {size} solutions [M, A]; got shape "
            f"{states.shape}."
        )
    scores = jnp.asarray(score(states)).astype(jnp.float32)
    free = size - len(states)
    pool = _Pool(
        jnp.pad(states, ((0, free), (0, 0))),
        jnp.pad(jnp.where(jnp.isfinite(scores), scores, _NONE), (0, free), constant_values=_NONE),
        jnp.full(size, _NONE),
        jnp.zeros(size),
    )
    place = jnp.argmax(pool.scores)
    return _Search(pool, pool.states[place], pool.scores[place])


def _promising(pool: _Pool, count: int, exploration: float | jax.Array) -> jax.Array:
    """Places of the solutions that a step goes on from, the most promising first."""
    held = pool.scores > _NONE
    worth = jnp.maximum(pool.best, pool.scores)
    top = jnp.where(held, worth, -jnp.inf).max()
    spread = top - jnp.where(held, worth, jnp.inf).min()
    spread = jnp.where(jnp.isfinite(spread) & (spread > 0), spread, 1.0)
    rank = jnp.argsort(jnp.argsort(-pool.scores)).astype(jnp.float32)
    prior = jnp.where(held, pool.scores.size - rank, 0.0)
    prior = prior / jnp.maximum(prior.sum(), 1.0)
    bonus = exploration * spread * prior * jnp.sqrt(1.0 + pool.visits.sum()) / (1.0 + pool.visits)
    # A free place is never gone on from: where there are too few, the best are taken again.
    order = jnp.argsort(-jnp.where(held, worth + bonus, -jnp.inf))
    return order[jnp.arange(count) % jnp.maximum(held.sum(), 1)]


def _after(
    search: _Search, chosen: jax.Array, states: jax.Array, scores: jax.Array, reuse: bool
) -> _Search:
    """The search with what was found: ``states [C, G, A]`` with ``scores [C, G]``."""
    pool = search.pool
    pool = pool._replace(
        best=pool.best.at[chosen].max(scores.max(1)), visits=pool.visits.at[chosen].add(1.0)
    )
    states, scores = states.reshape(-1, states.shape[-1]), scores.reshape(-1)
    place = jnp.argmax(scores)
    better = scores[place] > search.score
    state = jnp.where(better, states[place], search.state)
    score = jnp.where(better, scores[place], search.score)
    return _Search(_grown(pool, states, scores) if reuse else pool, state, score)


def _grown(pool: _Pool, states: jax.Array, scores: jax.Array) -> _Pool:
    """The best distinct solutions of the pool and of those that were found."""
    everything = jnp.concatenate([pool.states, states])
    values = jnp.concatenate([pool.scores, scores])
    order = jnp.arange(len(everything))
    same = (everything[:, None] == everything[None]).all(-1) & (order[None] < order[:, None])
    # A solution is kept once, in the place that it had; a free place repeats none.
    values = jnp.where((same & (values > _NONE)[None]).any(1), _NONE, values)
    best = jnp.concatenate([pool.best, jnp.full(len(states), _NONE)])
    visits = jnp.concatenate([pool.visits, jnp.zeros(len(states))])
    kept = jax.lax.top_k(values, len(pool.scores))[1]
    return _Pool(everything[kept], values[kept], best[kept], visits[kept])
