"""The decoder of grids: packed or alone, taught or decoding, and what a token sees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ttt_jax import losses, models
from ttt_jax.data import grid_sequences as sequences

TASKS, LENGTH, MOST = 5, 96, 4
NET = models.GridDecoder(tasks=TASKS, width=32, depth=2, heads=2, mlp_width=48, attention="xla")


def pairs(count, seed=0, side=3):
    rng = np.random.default_rng(seed)
    for number in range(count):
        shape = rng.integers(1, side + 1, 2)
        made = rng.integers(0, 10, shape)
        yield number % TASKS, number % 8, made, (made + 1) % 10


def packed(count=6, rows=2):
    items = [
        sequences.Item(sequences.encode(before, after), task, view, number)
        for number, (task, view, before, after) in enumerate(pairs(count))
    ]
    [(batch, tags)] = sequences.pack(items, rows, LENGTH, MOST)
    return batch._asdict(), tags, items


@pytest.fixture(scope="module")
def params():
    made = jax.jit(NET.init)(jax.random.key(0), packed()[0])
    rng = np.random.default_rng(0)
    # What a layer adds begins at zero, which would hide everything.
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), made)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(NET.apply)


def test_a_packed_sequence_has_the_logits_of_one_alone(params, apply):
    batch, tags, items = packed()
    together = np.asarray(apply(params, batch))
    for row, place, tag in tags:
        [(alone, _)] = sequences.pack([items[tag]], 1, LENGTH, MOST)
        single = np.asarray(apply(params, alone._asdict()))
        span = batch["segment"][row] == place
        np.testing.assert_allclose(
            together[row, span], single[0, : span.sum()], rtol=1e-4, atol=1e-4
        )


def test_no_output_sees_what_comes_later(params, apply):
    batch, _, _ = packed(1, 1)
    before = np.asarray(apply(params, batch))
    outputs = np.flatnonzero(batch["part"][0] == sequences.OUTPUT)
    place = outputs[len(outputs) // 2]
    changed = {name: leaf.copy() for name, leaf in batch.items()}
    changed["token"][0, place] = (changed["token"][0, place] + 1) % 10
    after = np.asarray(apply(params, changed))
    moved = np.abs(after - before)[0].max(-1) > 1e-6
    assert not moved[:place].any() and moved[place]
    prefix = {name: leaf.copy() for name, leaf in batch.items()}
    last = outputs[0] - 2
    prefix["token"][0, last] = (prefix["token"][0, last] + 1) % 10
    assert (np.abs(np.asarray(apply(params, prefix)) - before)[0, : outputs[-1]].max(-1) > 0).all()


def inputs_of(task, view, grid, width):
    made = sequences.encode(grid)
    leaves = {name: getattr(made, name) for name in ("token", "row", "column", "part")}
    leaves = {name: np.pad(leaf, (0, width - len(leaf)))[None] for name, leaf in leaves.items()}
    return leaves | {
        "length": np.array([len(made.token)]),
        "task": np.array([task]),
        "view": np.array([view]),
    }


def test_decoding_with_a_cache_is_the_argmax_of_the_taught(params, apply):
    """The greedy output, given as the answer, is what every place predicts."""
    task, view, grid, _ = next(pairs(1, seed=3))
    inputs = inputs_of(task, view, grid, 40)
    made = jax.jit(lambda p, x: models.complete_grids(NET, p, x, slots=72, num_tokens=32))(
        params, inputs
    )
    tokens = np.asarray(made.tokens[0])
    size = int(np.argmax(tokens == sequences.END)) + 1 if (tokens == sequences.END).any() else 32
    batch, _, _ = packed(1, 1)
    batch = {name: leaf.copy() for name, leaf in batch.items()}
    [(prefix, _)] = sequences.pack(
        [sequences.Item(sequences.encode(grid), task, view)], 1, LENGTH, MOST
    )
    batch = {name: leaf.copy() for name, leaf in prefix._asdict().items()}
    begin, row, column = int(inputs["length"][0]), 0, 0
    for step in range(size):
        place = begin + step
        batch["token"][0, place] = sequences.BEGIN if step == 0 else tokens[step - 1]
        if step and tokens[step - 1] == sequences.NEWLINE:
            row, column = row + 1, 0
        elif step:
            column += 1
        batch["row"][0, place], batch["column"][0, place] = min(row, 31), min(column, 31)
        batch["part"][0, place], batch["segment"][0, place] = sequences.OUTPUT, 0
        batch["first"][0, place], batch["last"][0, place] = 0, place
    logs = np.asarray(jax.nn.log_softmax(apply(params, batch)))[0, begin : begin + size]
    np.testing.assert_array_equal(logs.argmax(-1), tokens[:size])
    assert float(made.log_prob[0]) == pytest.approx(logs.max(-1).sum(), abs=1e-3)


def test_an_output_does_not_depend_on_its_company(params):
    """A row without room is cut and has no end, alone and beside rows that go on."""
    width, slots = 40, 44
    run = jax.jit(lambda p, x: models.complete_grids(NET, p, x, slots=slots, num_tokens=24))
    cut = inputs_of(0, 0, np.ones((3, 5), int), width)
    long = inputs_of(1, 1, np.zeros((1, 1), int), width)
    both = {name: np.concatenate([cut[name], long[name]]) for name in cut}
    together = run(params, both)
    for row, inputs in enumerate((cut, long)):
        alone = run(params, inputs)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
    tokens = np.asarray(together.tokens[0])
    room = slots - int(cut["length"][0])
    if sequences.END not in tokens[:room]:
        assert not tokens[room:].any() and sequences.decode(tokens) is None


class Scripted(models.GridDecoder):
    """Says what its parameters have for each step, whatever it reads."""

    def apply(self, params, inputs, cache=None, keep=False):
        if keep:
            none = jnp.zeros((1, *inputs["token"].shape, 1, 1))
            return None, models.grid_decoder.GridCache(none, none)
        step = (inputs["slot"] - params["length"])[:, None]
        said = jnp.take_along_axis(params["said"], step, axis=1)
        return 9.0 * jax.nn.one_hot(said, sequences.CLASSES), cache


def test_an_output_that_can_spell_no_grid_is_cut():
    """Lines of two lengths, too many tokens; and a grid beside them, which is not."""
    line, end = sequences.NEWLINE, sequences.END
    said = [
        [1, 1, line, 2, line, 3, 3, end],
        [1, 1, line, 2, 2, line, 3, 3],
        [1, line, 2, line, end, 0, 0, 0],
    ]
    inputs = inputs_of(0, 0, np.ones((1, 1), int), 16)
    inputs = {name: np.concatenate([leaf] * 3) for name, leaf in inputs.items()}
    given = {"said": jnp.array(said), "length": inputs["length"]}
    net = Scripted(tasks=1)
    run = lambda **more: np.asarray(  # noqa: E731
        models.complete_grids(net, given, inputs | more, slots=32, num_tokens=8).tokens
    )
    whole = run()
    assert whole[0].tolist() == [*said[0][:5], 0, 0, 0] and whole[1].tolist() == said[1]
    assert sequences.decode(whole[0]) is None and sequences.decode(whole[2]).tolist() == [[1], [2]]
    short = run(most=np.array([8, 4, 8]))
    np.testing.assert_array_equal(short[[0, 2]], whole[[0, 2]])
    assert short[1].tolist() == [*said[1][:4], 0, 0, 0, 0]


def test_loops_of_several_decoders_that_end_as_one_copy_no_cache(params):
    """Mapped over parameters: the same tokens, and no cache chosen anew at every token."""
    rng = np.random.default_rng(1)
    several = jax.tree.map(
        lambda leaf: leaf[None] + 0.05 * rng.normal(size=(3, *leaf.shape)).astype(np.float32),
        params,
    )
    drawn = [inputs_of(*pair[:3], 40) for pair in pairs(3, seed=4)]
    inputs = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
    inputs["most"] = np.array([[5], [9], [14]])

    def completed(axis_name):
        def complete(params, inputs):
            sizes = {"slots": 72, "num_tokens": 24, "axis_name": axis_name}
            return models.complete_grids(NET, params, inputs, **sizes)

        run = jax.jit(jax.vmap(complete, axis_name=axis_name or "copies"))
        text = run.lower(several, inputs).as_text()
        # Decoders, layers, rows, slots, heads, size of a head.
        copies = [
            line for line in text.splitlines() if "select" in line and "3x2x1x72x2x16" in line
        ]
        return run(several, inputs), len(copies)

    (apart, copied), (together, kept) = completed(None), completed("copies")
    np.testing.assert_array_equal(apart.tokens, together.tokens)
    np.testing.assert_allclose(apart.log_prob, together.log_prob, rtol=1e-5)
    assert copied > kept == 0
    with pytest.raises(ValueError, match=r"mapped over; got 'rows': call it under jax.vmap"):
        models.complete_grids(NET, params, drawn[0], slots=72, num_tokens=24, axis_name="rows")


def test_it_learns_a_rule_and_completes_with_it():
    """Add one to every color: all of five tasks share it, on grids that were not trained on."""
    batches = [packed(6)[0] for _ in range(1)]
    params = jax.jit(NET.init)(jax.random.key(0), batches[0])
    loss = losses.packed_sequences(NET.apply, report=True)
    optimizer = optax.adam(1e-2)

    def train(params, batch):
        def step(carry, _):
            params, state = carry
            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, None)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (value, aux["exact"])

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)

    (params, _), (values, exact) = jax.jit(train)(params, batches[0])
    assert float(exact[0]) == 0 and float(exact[-1]) == 1 and values[-1] < values[0] / 10
    run = jax.jit(lambda p, x: models.complete_grids(NET, p, x, slots=72, num_tokens=32))
    for task, view, before, after in list(pairs(6))[:3]:
        made = run(params, inputs_of(task, view, before, 40))
        np.testing.assert_array_equal(sequences.decode(np.asarray(made.tokens[0])), after)


def test_the_weights_of_sequences_lie_between_two_means(params):
    batch, tags, _ = packed()
    logits = NET.apply(params, batch)
    sums = jax.device_get(losses.sequence_sums(logits, batch))
    logs = np.asarray(jax.nn.log_softmax(logits))
    for row, place, _ in tags:
        inside = (batch["segment"][row] == place) & (batch["label"][row] >= 0)
        labels = batch["label"][row, inside]
        nats = -np.take_along_axis(logs[row, inside], labels[:, None].astype(int), 1).sum()
        assert sums.nats[row, place] == pytest.approx(nats, rel=1e-4)
        assert sums.labels[row, place] == inside.sum()
        assert sums.wrong[row, place] == (logs[row, inside].argmax(-1) != labels).sum()
    used = sums.labels > 0
    over = {
        power: float(losses.packed_sequences(NET.apply, power=power)(params, batch, None))
        for power in (0.0, 1.0)
    }
    assert over[0.0] == pytest.approx(sums.nats.sum() / sums.labels.sum(), rel=1e-5)
    assert over[1.0] == pytest.approx(np.mean(sums.nats[used] / sums.labels[used]), rel=1e-5)
    empty = {**batch, "label": np.full_like(batch["label"], -1)}
    value, grads = jax.value_and_grad(losses.packed_sequences(NET.apply))(params, empty, None)
    assert float(value) == 0 and not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_module_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="heads times a multiple of 16; got 40 for 2 heads"):
        models.GridDecoder(tasks=1, width=40, heads=2)
    with pytest.raises(ValueError, match="tasks of a GridDecoder"):
        models.GridDecoder(tasks=0)
    with pytest.raises(ValueError, match="at least the 40 tokens of an input; got 30"):
        inputs = inputs_of(0, 0, np.zeros((1, 1), int), 40)
        models.complete_grids(NET, {}, inputs, slots=30, num_tokens=4)
