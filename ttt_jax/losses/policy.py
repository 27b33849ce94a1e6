"""The policy gradient: a reward in place of a label, on rollouts that the loss draws."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from ttt_jax import _arguments, _checks, _contract, _varying
from ttt_jax.base import AuxLoss, Key, Params
from ttt_jax.rewards import Reward, RewardFunction

ADVANTAGES = ("group", "centered", "fixed")
"""How rewards become advantages."""

# Of the logarithm of beta, from -7 to 7.
_HALVINGS = 24


AdvantageFunction: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""``(rewards[G], used[G]) -> advantages[G]``."""


@_arguments.checked(budget=_arguments.number(0.0, above=True))
def entropic_advantages(budget: float | jax.Array = 0.6931471805599453) -> AdvantageFunction:
    """Advantages of ``log E[exp(beta r)]``, which rewards the best rollouts and not the mean.

    ``A[g] = exp(beta r[g]) / mean_g exp(beta r[g]) - 1`` with the largest beta at which the tilted
    weights are no further than ``budget`` from equal ones, in nats. Equal rewards have advantages
    of zero.

    Args:
      budget: of the divergence; log 2 is the published one. May be traced.

    References:
      `Learning to Discover at Test Time <https://arxiv.org/abs/2601.16175>`_, 2026.
    """

    def advantages(value: jax.Array, used: jax.Array) -> jax.Array:
        count = jnp.maximum(used.sum(dtype=jnp.float32), 1.0)
        top = jnp.where(used, value, -jnp.inf).max()
        spread = top - jnp.where(used, value, jnp.inf).min()
        below = jnp.where(used, (value - top) / jnp.where(spread > 0, spread, 1.0), 0.0)

        def tilted(beta: jax.Array) -> tuple[jax.Array, jax.Array]:
            weights = jnp.where(used, jnp.exp(beta * below), 0.0)
            weights = weights / weights.sum()
            logs = jnp.where(
                weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0) * count), 0.0
            )
            return weights, (weights * logs).sum()

        def halve(ends: Any, _: Any) -> Any:
            low, high = ends
            middle = (low + high) / 2
            within = tilted(jnp.exp(middle))[1] <= budget
            return (jnp.where(within, middle, low), jnp.where(within, high, middle)), None

        ends = (jnp.float32(-7.0), jnp.float32(7.0))
        (low, _), _ = _varying.scan(halve, ends, jnp.arange(_HALVINGS))
        made = tilted(jnp.exp(low))[0] * count - 1.0
        return jnp.where(used & (spread > 0), made, 0.0)

    return advantages


def check_advantages(advantages: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what is neither a name of them nor a function."""
    if not isinstance(advantages, str):
        form = f"(rewards[G], used[G]) -> [G], or one of {ADVANTAGES}"
        _contract.require_function("advantages", advantages, form)
    elif advantages not in ADVANTAGES:
        raise ValueError(f"advantages must be one of {ADVANTAGES}; got {advantages!r}.")


def advantages_of(reward: Reward, kind: str | AdvantageFunction) -> jax.Array:
    """Advantages ``[G]``, 0 for what is not used.

    Args:
      reward: of the G rollouts.
      kind: one of ``ADVANTAGES``, or a function.
    """
    used, value = reward.used, reward.value
    if not isinstance(kind, str):
        return jnp.where(used, kind(value, used), 0.0)
    count = jnp.maximum(used.sum(dtype=jnp.float32), 1.0)
    if kind == "fixed":
        return jnp.where(used, 2.0 * value - 1.0, 0.0)
    mean = jnp.where(used, value, 0.0).sum() / count
    centered = jnp.where(used, value - mean, 0.0)
    # Equal rewards say nothing; a mean that is rounded would leave a remainder, and 0 / 0 a NaN.
    unequal = jnp.where(used, value, -jnp.inf).max() > jnp.where(used, value, jnp.inf).min()
    centered = jnp.where(unequal, centered, 0.0)
    if kind == "centered":
        return centered
    deviation = jnp.sqrt(jnp.square(centered).sum() / count)
    return jnp.where(unequal, centered / jnp.where(unequal, deviation, 1.0), 0.0)


@_arguments.checked(kl=_arguments.number(0.0))
def policy_gradient(
    sample: Callable[[Params, Any, Key], Any],
    log_prob: Callable[[Params, Any, Any], Any],
    reward: RewardFunction,
    *,
    num_trained: int | None = None,
    advantages: Literal["group", "centered", "fixed"] | AdvantageFunction = "group",
    kl: float | jax.Array = 0.0,
    pristine: Params | None = None,
    report: bool = False,
) -> AuxLoss:
    """A loss whose gradient is that of the expected reward, by rollouts drawn with its key.

    For G rollouts ``y[g]`` drawn from the parameters as they are, with rewards r and advantages A::

        loss = -1/n sum_g A[g] log_prob(y[g]) + kl * 1/n sum_g (exp(d[g]) - d[g] - 1)
        A[g] = (r[g] - mean r) / std r      "group";   without the division "centered"
        A[g] = 2 r[g] - 1                   "fixed", for rewards in [0, 1]
        d[g] = log_prob of the pristine parameters - log_prob

    over the n rollouts that the reward uses. Rollouts, rewards and advantages are constants of the
    gradient; every step draws new ones, so there is no ratio to an older policy and no clip. For
    rollouts of several tokens ``log_prob`` and the divergence are means over the tokens of each.
    Where the rewards are all equal, or none is used, loss and gradient are exactly zero, the
    divergence's too, and :func:`~ttt_jax.gradient_adapter` makes no step ("fixed" knows no equal
    rewards: it learns from any). A reward that is not finite makes the loss NaN.

    **Fails** with few rollouts: a group of equal rewards teaches nothing. ``"group"`` weighs rare
    rewards most, right or wrong (DDRL); ``"fixed"`` does not.

    Args:
      sample: ``sample(params, x, key) -> rollouts``, every leaf with a leading axis G.
      log_prob: ``log_prob(params, x, rollouts) -> [G]``, or the pair of log-probabilities
        ``[G, T]`` and the mask ``[G, T]`` of the rollouts' tokens; differentiable.
      reward: of :mod:`ttt_jax.rewards`, or a function of your own.
      num_trained: the first so many rollouts are learned from; the others only take part in the
        reward (TTRL: 32 of 64). None for all.
      advantages: see above; or a function ``(rewards[G], used[G]) -> [G]``, such as
        ``losses.entropic_advantages()``.
      kl: weight of the divergence from the pristine parameters (the estimator that is never
        negative); may be traced. Needs ``pristine`` unless it is the number 0.
      pristine: parameters that the divergence is measured from: the ``params`` of a predictor.
      report: whether the loss returns ``(scalar, aux)``, for an adapter with ``has_aux=True``;
        ``aux`` has ``reward``, the mean value, ``used``, whether a rollout is learned from, and
        what the reward reports.

    Returns:
      An ``AuxLoss`` over one instance.

    Raises:
      ValueError: an argument out of range, or ``kl`` without ``pristine``; when called: a log-
        probability of another shape, or more rollouts to learn from than were drawn.

    References:
      Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, 2024, Eq. 3 and 4 (GRPO, with
      one update per group); Liu et al., `Understanding R1-Zero-Like Training
      <https://arxiv.org/abs/2503.20783>`_, 2025, for "centered"; `DDRL
      <https://arxiv.org/abs/2604.21327>`_, 2026, for "fixed".
    """
    _contract.require_function("sample", sample, "(params, x, key) -> rollouts")
    _contract.require_function("log_prob", log_prob, "(params, x, rollouts) -> [G]")
    _contract.require_function("reward", reward, "(x, rollouts, key) -> rewards.Reward")
    check_advantages(advantages)
    if num_trained is not None:
        _checks.check_count("num_trained, unless None,", num_trained)
    regularized = not (isinstance(kl, int | float) and kl == 0)
    if regularized and pristine is None:
        raise ValueError(
            f"policy_gradient with kl={kl} needs pristine, the parameters that the divergence is "
            "measured from; got None: pass the params of the predictor, or leave kl out."
        )

    def loss(params: Params, x: Any, key: Key) -> Any:
        sample_key, reward_key = jax.random.split(key)
        rollouts = jax.lax.stop_gradient(sample(params, x, sample_key))
        count = _checks.leading_size("losses.policy_gradient", rollouts)
        kept = count if num_trained is None else num_trained
        if kept > count:
            raise ValueError(
                f"num_trained must be at most the {count} rollouts that sample draws; got {kept}."
            )
        full = jax.tree.map(jax.lax.stop_gradient, reward(x, rollouts, reward_key))
        made = Reward(full.value[:kept], full.used[:kept], full.aux)
        weights = advantages_of(made, advantages)
        trained = jax.tree.map(lambda leaf: leaf[:kept], rollouts)
        log_probs, mask = _pair(log_prob(params, x, trained), made.used)
        terms = -weights[:, None] * log_probs
        if regularized:
            reference, _ = _pair(log_prob(pristine, x, trained), made.used)
            d = jax.lax.stop_gradient(reference) - log_probs
            terms = terms + kl * (jnp.exp(d) - d - 1.0)
        means = terms.sum(1) / jnp.maximum(mask.sum(1, dtype=jnp.float32), 1.0)
        value = means.sum() / jnp.maximum(made.used.sum(dtype=jnp.float32), 1.0)
        value = jnp.where((weights != 0).any(), value, 0.0)
        # No step for want of a difference, and a reward that is not finite, are two things.
        known = jnp.isfinite(jnp.where(made.used, made.value, 0.0)).all()
        value = jnp.where(known, value, jnp.nan)
        if not report:
            return value
        used = made.used.any().astype(jnp.float32)
        return value, {"reward": full.value.mean(), "used": used, **full.aux}

    return loss


def _pair(made: Any, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities ``[G, T]``, 0 outside the mask, and the mask: tokens of used rollouts."""
    count = len(used)
    if isinstance(made, tuple):
        log_probs, mask = made
    else:
        log_probs, mask = made[..., None], jnp.ones((count, 1), bool)
    if log_probs.ndim != 2 or len(log_probs) != count or mask.shape != log_probs.shape:
        raise ValueError(
            f"losses.policy_gradient needs log_prob(params, x, rollouts) to return [{count}], or "
            f"log-probabilities and mask [{count}, T]; got shapes {log_probs.shape} and "
            f"{mask.shape}."
        )
    mask = mask & used[:, None]
    # Before they are multiplied: what is outside may be anything, and 0 * inf is NaN.
    return jnp.where(mask, log_probs, 0.0), mask
