"""Joint and outer training side by side, for :mod:`benchmarks.meta_learning`."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ttt_jax as ttt
from benchmarks.meta_images import Images, Net, floating, masked


class Run(NamedTuple):
    """What is trained side by side in one program, a leading axis for each.

    Attributes:
      mask: of what adapts, see :func:`meta_images.mask_of`.
      trained: the same of what the outer training changes: factors only where they adapt.
      rate: float32, of the inner steps.
      seed: int32.
    """

    mask: Any
    trained: Any
    rate: Any
    seed: Any


class Place(NamedTuple):
    """Which run it is."""

    selection: str
    seed: int
    rate: float


def runs_of(net: Net, places: list[Place]) -> Run:
    """The runs of some places."""
    factors = net.masks["low rank"]

    def each(place: Place) -> Run:
        mask = net.masks[place.selection]
        trained = jax.tree.map(lambda own, factor: own | ~factor, mask, factors)
        return Run(mask, trained, jnp.float32(place.rate), jnp.int32(place.seed))

    return stacked([each(place) for place in places])


def stacked(trees: list[Any]) -> Any:
    """Trees of one form as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def taken(tree: Any, places: Any) -> Any:
    """Some of those of a leading axis, in another order."""
    return jax.tree.map(lambda leaf: leaf[np.asarray(places)], tree)


def adapter_of(net: Net, aux: str, mask: Any, rate: Any) -> ttt.Adapter:
    """Plain steps on the auxiliary loss of an image."""
    loss = net.losses[aux]
    return ttt.gradient_adapter(
        lambda params, x, key: loss(params, x["image"], key),
        optax.sgd(rate),
        select=masked(mask),
    )


def outer_loss(net: Net, aux: str, training: str, num_steps: int, run: Run) -> Any:
    """The loss of an image and its label: cross entropy, adapted or not, and the auxiliary loss."""

    def main(params: Any, x: Any, key: Any) -> jax.Array:
        del key
        logits = net.classify(params, x["image"][None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, x["label"])

    adapted = ttt.meta.adapted_loss(
        adapter_of(net, aux, run.mask, run.rate),
        main,
        num_steps=0 if training == "joint" else num_steps,
        first_order=training == "first",
    )

    def loss(params: Any, x: Any, key: Any) -> jax.Array:
        first, second = jax.random.split(key)
        value = adapted(params, x, first)
        if weight := net.weights[aux]:
            value += weight * net.losses[aux](params, x["image"], second)
        return value

    return loss


def optimizer_of(settings: Any, steps: int) -> optax.GradientTransformation:
    """Of the outer training."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.outer_rate, min(100, steps // 4), max(steps, 1)
    )
    return optax.adamw(rate, b2=0.95, weight_decay=0.05)


def trainer(net: Net, aux: str, training: str, settings: Any, steps: int) -> Any:
    """A compiled block of outer steps of all runs.

    ``(states [R], runs [R], images, places [R, K, B], first) -> (states, mean losses [R])``.
    """
    optimizer = optimizer_of(settings, steps)

    def step(run: Run, images: Images, state: Any, turn: Any) -> Any:
        params, opt_state = state
        places, number = turn
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        view_key, key = jax.random.split(key)
        keys = jax.random.split(view_key, places.shape[0])
        views = jax.vmap(net.view)(floating(images.image[places]), keys)
        outer = outer_loss(net, aux, training, settings.num_steps, run)
        value, gradients = ttt.meta.value_and_grad(outer, chunk_size=settings.outer_chunk or None)(
            params,
            {"image": views, "label": images.label[places]},
            jax.random.split(key, places.shape[0]),
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        updates = jax.tree.map(lambda leaf, kept: kept * leaf, updates, run.trained)
        return (optax.apply_updates(params, updates), opt_state), value

    def block(state: Any, run: Run, images: Images, places: Any, first: Any) -> Any:
        numbers = first + jnp.arange(places.shape[0])
        state, values = jax.lax.scan(functools.partial(step, run, images), state, (places, numbers))
        return state, values.mean()

    return jax.jit(jax.vmap(block, (0, 0, None, 0, None)), donate_argnums=0)


def trained(net: Net, aux: str, images: Images, settings: Any) -> dict[str, Any]:
    """Places, runs and parameters of every training, and how many steps there was time for."""
    began = time.perf_counter()
    seeds, rates = range(settings.seeds), tuple(map(float, settings.train_rates))
    alone = [Place("norms", seed, 0.0) for seed in seeds]
    many = [Place(name, s, rate) for name in settings.selections for s in seeds for rate in rates]
    params = jax.vmap(net.init)(jnp.stack([jax.random.key(seed) for seed in seeds]))
    device = Images(images.image, images.label, None)

    def late(stage: int) -> bool:
        share = settings.seconds * (1.0 if stage else 0.4)
        return bool(settings.seconds) and time.perf_counter() - began > share

    def turns(places: list[Place], stage: int, first: int, count: int) -> Any:
        """The same images for every run of a seed."""
        each = {
            seed: np.random.default_rng((seed, stage, first)).integers(
                len(images.label), size=(count, settings.batch)
            )
            for seed in seeds
        }
        return jnp.asarray(np.stack([each[place.seed] for place in places]))

    def go(stage: int, total: int, parts: dict[str, Any]) -> int:
        """Blocks of all trainings in turn, so that all have as many steps when time is over."""
        programs = {name: trainer(net, aux, name, settings, total) for name in parts}
        first = 0
        while first < total and not (first and late(stage)):
            count = min(settings.block, total - first)
            for name, part in parts.items():
                given = turns(part["places"], stage, first, count)
                part["state"], part["loss"] = programs[name](
                    part["state"], part["runs"], device, given, jnp.int32(first + stage * 1000000)
                )
            jax.block_until_ready([part["loss"] for part in parts.values()])
            first += count
        return first

    def part(places: list[Place], params: Any, total: int) -> dict[str, Any]:
        state = params, jax.vmap(optimizer_of(settings, total).init)(params)
        # Runs of one training must not give away the parameters of another one.
        state = jax.tree.map(jnp.copy, state)
        return {"places": places, "runs": runs_of(net, places), "state": state}

    start = {"joint": part(alone, params, settings.pretrain_steps)}
    before = go(0, settings.pretrain_steps, start)
    params = start["joint"]["state"][0]
    print(
        f"{aux}: trained jointly, {before} steps, {time.perf_counter() - began:.0f} s", flush=True
    )
    parts = {}
    for name in settings.trainings:
        places = alone if name == "joint" else many
        own = taken(params, [place.seed for place in places])
        parts[name] = part(places, own, settings.steps)
    after = go(1, settings.steps, parts)
    print(f"{aux}: and {after} more, {time.perf_counter() - began:.0f} s", flush=True)
    return {
        "steps": (before, after),
        "seconds": time.perf_counter() - began,
        "parts": {
            name: (each["places"], each["state"][0], np.asarray(each["loss"]).tolist())
            for name, each in parts.items()
        },
    }
