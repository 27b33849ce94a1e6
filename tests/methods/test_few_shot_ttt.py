"""Test-time training on demonstrations: apart, guarded, forgotten; a model by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from ttt_jax import methods, select
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.data.grid_sequences import CLASSES, OUTPUT
from ttt_jax.views import grid_arrays

COLORS = 4
STEPS, EVERY = 12, 4
ROWS = {"rows": 3, "length": 96, "most": 4, "keep_colors": range(10)}


def task(number, demonstrations=3):
    """Grids of one cell: color c becomes ``c + number``."""
    pairs = [Example(np.array([[c]]), np.array([[(c + number) % COLORS]])) for c in range(COLORS)]
    return FewShotTask(f"add {number}", tuple(pairs[:demonstrations]), (pairs[-1],))


def arrays(task, number=0):
    rng = np.random.default_rng(number)
    return {"demonstrations": grid_arrays.demonstrations(task, rng, **ROWS), "query": np.arange(4)}


def stacked(tasks):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(arrays(task) for task in tasks))


def logits(params, batch):
    """A table by the input's cell, for the first token of the output alone."""
    tokens, part = jnp.asarray(batch["token"], jnp.int32), batch["part"]
    # Legend 9, then the cell, newline and end, then the output: its begin stands 3 after the cell.
    cell = jnp.roll(tokens, 3, 1)
    scores = params["table"][jnp.clip(cell, 0, COLORS - 1)]
    first = (part == OUTPUT) & (tokens == 12)
    return jnp.where(first[..., None], scores, 0.0)


def answer(params, x):
    return params["table"][x["query"]].argmax(-1).astype(jnp.int32)


PARAMS = {"table": jnp.zeros((COLORS, CLASSES))}
SETTINGS = {"optimizer": optax.sgd(1.0), "select": select.everything(), "num_steps": STEPS}
SETTINGS |= {"rows": 2, "every": EVERY}
TASKS = [task(number) for number in range(3)]
XS = stacked(TASKS)
KEYS = ttt.sample_keys(jax.random.key(0), np.arange(3))


def predictor(**changes):
    return methods.few_shot_ttt(answer, logits, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def plain():
    """Tasks side by side, without the guard."""
    return jax.jit(ttt.batched(predictor()))


@pytest.fixture(scope="module")
def guarded():
    return jax.jit(ttt.batched(predictor(held_out=3)))


def test_a_copy_learns_its_own_demonstrations_and_no_others(plain):
    output, info = plain(PARAMS, XS, KEYS)
    for number in range(3):
        assert output[number, :3].tolist() == [(c + number) % COLORS for c in range(3)]
    assert info.ok.all() and info.updated.all() and (info.loss[:, -1] < info.loss[:, 0]).all()
    # Uniform over all classes, as the table is zero.
    np.testing.assert_allclose(info.loss[:, 0], np.log(CLASSES), rtol=1e-6)


@pytest.mark.parametrize("name", ["plain", "guarded"])
def test_tasks_at_once_are_tasks_one_at_a_time(name, request):
    run = request.getfixturevalue(name)
    output, info = jax.device_get(run(PARAMS, XS, KEYS))
    turned = jax.device_get(run(PARAMS, jax.tree.map(lambda leaf: leaf[::-1], XS), KEYS[::-1]))
    for mine, other in zip(jax.tree.leaves((output, info)), jax.tree.leaves(turned), strict=True):
        np.testing.assert_array_equal(mine, other[::-1])
    # The same task three times is three times that task alone.
    alone = jax.tree.map(lambda leaf: np.stack([leaf[1]] * 3), XS)
    same, told = run(PARAMS, alone, KEYS[np.array([1, 1, 1])])
    np.testing.assert_array_equal(same[2], output[1])
    np.testing.assert_array_equal(told.loss[2], info.loss[1])


def test_what_was_learned_answers_as_the_copy_does(plain):
    settings = {name: value for name, value in SETTINGS.items()}
    fast, learned = jax.jit(ttt.batched(methods.few_shot_adapter(logits, **settings)))(
        PARAMS, {"demonstrations": XS["demonstrations"]}, KEYS
    )
    own = ttt.adapted(ttt.source(ttt.unbatched(answer)), select=select.everything())
    output, _ = ttt.batched(own)(PARAMS, (fast, XS), KEYS)
    due, info = plain(PARAMS, XS, KEYS)
    np.testing.assert_array_equal(output, due)
    np.testing.assert_array_equal(learned.loss, info.loss)


def test_the_guard_keeps_the_source_where_nothing_carries_over(guarded):
    """Cells are apart in the table, so that no demonstration teaches anything of another one."""
    output, info = guarded(PARAMS, XS, KEYS)
    assert not info.aux["taken"].any() and not info.updated.any() and info.ok.all()
    assert (output == 0).all()


def shared(params, batch):
    """The same scores for all cells: what one demonstration teaches holds for the others."""
    return logits({"table": jnp.broadcast_to(params["table"].mean(0), (COLORS, CLASSES))}, batch)


def test_the_guard_takes_the_steps_that_help():
    constant = [Example(np.array([[c]]), np.array([[3]])) for c in range(3)]
    x = arrays(FewShotTask("three", tuple(constant), ()))
    predict = methods.few_shot_ttt(answer, shared, **{**SETTINGS, "held_out": 2})
    output, info = jax.jit(predict)(PARAMS, x, KEYS[0])
    assert info.aux["taken"].all() and (output == 3).all() and info.updated
    held_out = info.aux["held_out"]
    assert held_out.shape == (1 + STEPS // EVERY,) and held_out.argmin() == STEPS // EVERY
    # Pristine scores are equal, so that a label of the output costs log CLASSES where scores count,
    # and no label costs more.
    assert 0 < held_out[-1] < held_out[0] <= np.log(CLASSES) + 1e-5


def test_a_task_with_one_demonstration_stays_as_it_is(guarded):
    x = stacked([task(number, demonstrations=1) for number in range(3)])
    output, info = guarded(PARAMS, x, KEYS)
    assert not info.updated.any() and info.ok.all() and (output == 0).all()


def test_a_copy_that_diverges_harms_no_other(plain):
    rows = {name: np.array(leaf) for name, leaf in XS["demonstrations"].items()}
    spoiled = {**XS, "demonstrations": rows}

    def sick(params, batch):
        known = jnp.asarray(batch["task"]).max() == 0
        return logits(params, batch) * jnp.where(known, 1.0, jnp.nan)

    rows["task"][1] = 1
    run = jax.jit(ttt.batched(methods.few_shot_ttt(answer, sick, **SETTINGS)))
    before = jax.tree.map(np.array, PARAMS)
    output, info = run(PARAMS, spoiled, KEYS)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(PARAMS))
    well, _ = plain(PARAMS, XS, KEYS)
    assert info.ok.tolist() == [True, False, True] and (output[1] == 0).all()
    np.testing.assert_array_equal(np.asarray(output)[[0, 2]], np.asarray(well)[[0, 2]])


def all_answers(params, x):
    return jax.vmap(answer, in_axes=(None, 0))(params, x)


def shared_copy(**changes):
    kept = {name: value for name, value in SETTINGS.items() if name != "every"}
    return jax.jit(methods.few_shot_shared(all_answers, logits, **{**kept, **changes}))


def test_of_one_task_the_shared_copy_is_its_own(plain):
    due, told = plain(PARAMS, XS, KEYS)
    for place in range(3):
        alone = jax.tree.map(lambda leaf, place=place: leaf[place : place + 1], XS)
        output, info = shared_copy()(PARAMS, alone, KEYS[place])
        np.testing.assert_array_equal(output[0], due[place])
        np.testing.assert_allclose(info.loss, told.loss[place], rtol=1e-5)


def test_a_shared_copy_learns_from_every_task_in_every_step():
    """Rules that contradict each other: the copy that shares them learns neither, in any order."""
    key = KEYS[0]
    _, info = shared_copy(rows=3)(PARAMS, XS, key)
    _, turned = shared_copy(rows=3)(PARAMS, jax.tree.map(lambda leaf: leaf[::-1], XS), key)
    np.testing.assert_allclose(info.loss, turned.loss, rtol=1e-4)
    _, single = shared_copy(rows=3)(PARAMS, jax.tree.map(lambda leaf: leaf[:1], XS), key)
    assert single.loss[-1] < info.loss[-1] - 0.1
    seen = []

    def watched(params, batch):
        seen.append(batch["task"].shape[0])
        return logits(params, batch)

    methods.few_shot_shared(all_answers, watched, rows=2, num_steps=1, select=SETTINGS["select"])(
        PARAMS, XS, key
    )
    assert set(seen) == {6}


def test_no_step_of_the_shared_copy_is_the_source():
    output, info = shared_copy(num_steps=0)(PARAMS, XS, KEYS[0])
    np.testing.assert_array_equal(output, all_answers(PARAMS, XS))
    assert not info.updated


def test_every_step_is_shown(plain):
    x = jax.tree.map(lambda leaf: leaf[1], XS)
    traced, _ = jax.jit(predictor(trace=True))(PARAMS, x, KEYS[1])
    assert traced.shape == (STEPS + 1, 4) and (traced[0] == 0).all()
    np.testing.assert_array_equal(traced[-1], plain(PARAMS, XS, KEYS)[0][1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: predictor(held_out=1, every=5), "after every 5 steps.* multiple of it; got 12"),
        (lambda x: predictor(rows=4)(PARAMS, x, KEYS[0]), "rows must be at most the 3 rows"),
        (lambda x: shared_copy(rows=4)(PARAMS, XS, KEYS[0]), "at most the 3 rows of a task's"),
        (lambda x: shared_copy(batch=False), "batch of methods.few_shot_shared must be True"),
        (
            lambda x: predictor()(PARAMS, {"query": x["query"]}, KEYS[0]),
            r"needs a task x with 'demonstrations', .* got \['query'\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(arrays(TASKS[0]))
