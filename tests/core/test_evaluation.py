"""The loop over a task: rows, sums, scopes, keys, programs; against direct calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from tests.core.models import CLASSES, classify, make_images, make_params, snapshot, turn
from ttt_jax import evaluation, losses, metrics, resets, select, training, tuning
from ttt_jax.task import Examples, Task, in_batches, take

PARAMS = make_params()
COUNT = 10


def examples(seed, name):
    rng = np.random.default_rng(seed)
    ids = np.arange(100 * seed, 100 * seed + COUNT)
    labels = rng.integers(CLASSES, size=COUNT).astype(np.int32)
    half = np.where(np.arange(COUNT) < 6, "first", "second")
    tags = {"domain": np.full(COUNT, name), "half": half}
    return Examples(ids, np.asarray(make_images(COUNT, seed=seed)), labels, tags)


def task_of(**changes):
    def streams(role, seed):
        names = ("a", "b") if role == "reported" else ("v",)
        return {
            name: list(in_batches([examples(seed + number, name)], 4))
            for number, name in enumerate(names)
        }

    made = Task(
        name="toy",
        init=lambda key: make_params(),
        heads=lambda: {"classify": classify, "rotation": turn},
        augment=None,
        loss=lambda params, examples, key: classify(params, examples.x).sum(),
        training=lambda seed: [examples(7, "t")],
        streams=streams,
        metrics={
            "error": metrics.error(),
            "harmed": metrics.harmed(),
            "agreement": metrics.agreement(),
        },
        chooses="error",
    )
    return made._replace(**changes)


def adapter(rate=0.5):
    return ttt.gradient_adapter(losses.rotation(turn), optax.sgd(rate), select=select.norm_affine())


def episodic(rate=0.5):
    return ttt.episodic(adapter(rate), ttt.unbatched(classify), num_steps=1)


def online():
    return ttt.online(adapter(), ttt.unbatched(classify), reset=resets.never())


def entropy_stream():
    tent = ttt.gradient_adapter(
        losses.entropy(classify, batch=True), optax.sgd(0.5), select=select.norm_affine()
    )
    return ttt.online(tent, classify, reset=resets.never())


def rows_of(methods, task=None, **options):
    options = {"role": "reported", "seed": 0, "chunk_size": 2} | options
    return list(evaluation.evaluate(task or task_of(), methods, PARAMS, **options))


@functools.cache
def usual_rows(make):
    return rows_of({"method": make()})


def test_rows_of_a_predictor_are_those_of_direct_calls():
    before = snapshot(PARAMS)
    rows = rows_of({"ttt": episodic()})
    assert [(row.stream, row.tags["half"], row.num_examples) for row in rows] == [
        ("a", "first", 6), ("a", "second", 4), ("b", "first", 6), ("b", "second", 4)
    ]  # fmt: skip
    for number, name in enumerate("ab"):
        data = examples(number, name)
        keys = ttt.sample_keys(jax.random.key(0), data.id)
        logits, _ = jax.jit(ttt.batched(episodic()))(PARAMS, data.x, keys)
        wrong = np.asarray(logits).argmax(-1) != data.y
        plain = np.asarray(classify(PARAMS, data.x)).argmax(-1)
        for row, part in zip(rows[2 * number :], (slice(6), slice(6, None)), strict=False):
            assert row.values["error"] == wrong[part].mean()
            assert row.values["harmed"] == ((plain == data.y) & wrong)[part].mean()
            assert row.id.tolist() == data.id[part].tolist()
            assert row.counts["updated"] == row.num_examples and row.counts["non_finite"] == 0
    assert snapshot(PARAMS) == before


def test_sums_of_parts_are_sums_of_all():
    split = usual_rows(episodic)
    task = task_of()
    joined = task._replace(
        streams=lambda role, seed: {
            name: [batch._replace(tags={}) for batch in batches]
            for name, batches in task.streams(role, seed).items()
        }
    )
    for row in rows_of({"method": episodic()}, joined):
        parts = [part.sums["error"] for part in split if part.stream == row.stream]
        total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
        assert metrics.error().value(total) == row.values["error"]
        assert row.tags == {} and row.num_examples == COUNT


@pytest.mark.parametrize(
    ("make", "scope"),
    [
        (episodic, "per_sample"),
        (online, "stream"),
        (lambda: evaluation.InBatches(ttt.episode(entropy_stream()), 4), "batch"),
        (lambda: evaluation.InBatches(entropy_stream(), 4), "stream"),
    ],
)
def test_scopes(make, scope):
    method = make()
    assert evaluation.scope_of(method) == scope
    rows = usual_rows(make)
    assert len(rows) == 4 and all(0 <= row.values["error"] <= 1 for row in rows)
    assert ("drift" in rows[0].values) == (scope == "stream")


def test_streams_side_by_side_are_streams_one_by_one():
    task = task_of()
    run = evaluation.Evaluation(task, PARAMS, role="reported", seed=0)
    together = usual_rows(online)
    alone = [row for name in "ab" for row in run.rows("method", online(), [name])]
    for row, same in zip(together, alone, strict=True):
        assert (row.stream, row.tags) == (same.stream, same.tags)
        assert same.values["error"] == row.values["error"]
        assert same.values["drift"] == pytest.approx(row.values["drift"], rel=1e-4)


def test_a_batch_method_sees_batches_of_its_size_and_never_more():
    sizes = []

    def classify_batch(params, images):
        sizes.append(images.shape[0])
        return classify(params, images)

    method = evaluation.InBatches(ttt.source(classify_batch), 3)
    rows_of({"method": method})
    assert set(sizes) == {3, 1, 2}  # batches of 4, 4 and 2 are cut, never joined


def test_candidates_of_one_key_share_a_program():
    built = []

    def build(values):
        built.append(values)
        return episodic(values["rate"])

    run = evaluation.Evaluation(task_of(), PARAMS, role="reported", seed=0)
    for rate in (0.1, 0.5):
        method = evaluation.Parametric(build, {"rate": jnp.float32(rate)}, "same")
        rows = run.rows("ttt", method, ["a"])
        direct = rows_of({"ttt": episodic(rate)}) if rate != 0.5 else usual_rows(episodic)
        assert rows[0].values["error"] == direct[0].values["error"]
    assert len([key for key in run.programs if key != "source" and key[0] == "same"]) == 1


@jax.tree_util.register_pytree_node_class
class CallableTree(dict):
    """Parameters that are a tree and can be called, as modules of other libraries are."""

    def __call__(self):
        raise AssertionError("parameters were called")

    def tree_flatten(self):
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, names, values):
        return cls(zip(names, values, strict=True))


def test_parameters_that_can_be_called_are_parameters():
    run = evaluation.Evaluation(task_of(), CallableTree(PARAMS), role="reported", seed=0)
    expected = rows_of({"source": ttt.source(ttt.unbatched(classify))})
    rows = run.rows("source", ttt.source(ttt.unbatched(classify)), ["a"])
    assert [row.values for row in rows] == [row.values for row in expected[:2]]
    calls = []
    run = evaluation.Evaluation(
        task_of(), lambda: calls.append(1) or PARAMS, role="reported", seed=0
    )
    run.rows("source", ttt.source(ttt.unbatched(classify)), ["a"])
    assert calls


def test_source_statistics_come_from_the_training_split():
    method = ttt.FromSource(
        measure=lambda params, x: x.mean(), reduce="mean", build=lambda mean: episodic()
    )
    mean = evaluation.measured(method, PARAMS, task_of(), seed=0, size=3, count=None)
    np.testing.assert_allclose(mean, examples(7, "t").x.mean(), rtol=1e-5)
    first = evaluation.measured(method, PARAMS, task_of(), seed=0, size=3, count=2)
    np.testing.assert_allclose(first, examples(7, "t").x[:2].mean(), rtol=1e-5)


def test_choosing_takes_the_lowest_then_the_first():
    run = evaluation.Evaluation(task_of(), PARAMS, role="validation", seed=0)
    trial = tuning.tried(run, task_of(), "ttt", episodic())
    rows = rows_of({"ttt": episodic()}, role="validation", chunk_size=None)
    assert trial.scores == {"error": np.mean([row.values["error"] for row in rows])}
    trials = [tuning.Trial({"error": value}) for value in (0.5, 0.2, 0.2)]
    assert tuning.best(trials) == 1
    assert tuning.best([tuning.Trial({}, "failed"), tuning.Trial({"error": 0.9})]) == 1
    assert tuning.best([tuning.Trial({"error": np.nan}), tuning.Trial({"error": 0.9})]) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows_of({}, role="test"), "role must be 'validation' or 'reported', got 'test'"),
        (lambda: rows_of({}, task_of(streams=lambda role, seed: {})), "has no reported stream"),
        (lambda: tuning.best([]), "at least one trial"),
        (lambda: tuning.score(task_of(), []), "at least one validation row"),
        (lambda: list(in_batches([], 0)), "size and count must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def linear_task():
    """Least squares with a known solution, to see that training trains and resumes."""

    class Data:
        def __iter__(self):
            return iter([next(self.steps(0))])

        def steps(self, start):
            step = start
            while True:
                x = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
                yield Examples(np.arange(8), x, x @ np.array([1.0, -2.0, 0.5], np.float32), {})
                step += 1

    return task_of(
        init=lambda key: {"params": {"w": jnp.zeros(3)}},
        loss=lambda params, e, key: jnp.mean((e.x @ params["params"]["w"] - e.y) ** 2),
        training=lambda seed: Data(),
    )


def trained(total, *, start=0, state=None, steps_per_call=1, auxiliary=None):
    task, optimizer = linear_task(), optax.sgd(0.1)
    params = task.init(jax.random.key(0))
    state = state or (params, optimizer.init(training.learned(params)))
    step = training.make_step(task, optimizer, auxiliary=auxiliary)
    options = {"key": jax.random.key(0), "start": start, "total": total}
    blocks = training.blocks(
        step, state, task.training(0), **options, steps_per_call=steps_per_call, stops=(10,)
    )
    *_, last = blocks
    return last


def test_training_learns_resumes_and_may_make_many_steps_per_call():
    done, (params, _), parts = trained(100)
    assert done == 100 and float(parts["main"]) < 1e-3
    np.testing.assert_allclose(params["params"]["w"], [1.0, -2.0, 0.5], atol=0.02)
    _, half, _ = trained(40)
    _, (resumed, _), _ = trained(100, start=40, state=half)
    assert (resumed["params"]["w"] == params["params"]["w"]).all()
    _, (many, _), _ = trained(100, steps_per_call=5)
    np.testing.assert_allclose(many["params"]["w"], params["params"]["w"], rtol=1e-5)


def test_the_auxiliary_loss_counts_by_its_weight():
    auxiliary = training.Auxiliary(
        "small", lambda params, x, key: jnp.sum(params["params"]["w"] ** 2), 3.0
    )
    _, (params, _), parts = trained(100, auxiliary=auxiliary)
    assert np.abs(params["params"]["w"]).max() < 0.8 and set(parts) == {"main", "small"}


def test_plain_batches_are_read_again_and_again():
    batches = [take(examples(0, "a"), slice(2)), take(examples(0, "a"), slice(2, 4))]
    stream = training.batches_from(batches, 3)
    assert [next(stream).id[0] for _ in range(3)] == [2, 0, 2]
    with pytest.raises(ValueError, match="at least one batch"):
        next(training.batches_from([], 0))


def test_batches_of_other_shapes_follow_each_other():
    """Longer instances have calls of their own, and rows are those of either batch alone."""

    def batch(first, count, length):
        draw = np.random.default_rng(first).normal(size=(count, length)).astype(np.float32)
        ids = np.arange(first, first + count)
        return Examples(ids, draw, np.zeros(count, np.int64), {"length": np.full(count, length)})

    batches = [batch(0, 3, 2), batch(3, 2, 2), batch(5, 2, 7)]
    task = Task(
        name="lengths",
        init=lambda key: {"w": jnp.ones(())},
        heads=lambda: {"scores": lambda params, x: params["w"] * x},
        augment=None,
        loss=lambda params, examples, key: params["w"],
        training=lambda seed: [],
        streams=lambda role, seed: {"all": batches},
        metrics={"sum": metrics.mean(lambda output, source, examples: output.sum(-1))},
        chooses="sum",
    )

    def shifted(params, x, key):
        return params["w"] * x + 1.0, ttt.source(lambda params, x: x)(params, x, key)[1]

    within = evaluation.InBatches(shifted, 2)
    methods = {"apart": shifted, "batch": within}
    rows = evaluation.evaluate(task, methods, task.init(None), role="reported", seed=0)
    for row in rows:
        length = row.tags["length"]
        due = np.concatenate([b.x for b in batches if b.x.shape[1] == length]) + 1.0
        assert row.num_examples == len(due)
        np.testing.assert_allclose(row.values["sum"], due.sum(-1).mean(), rtol=1e-6)
