import itertools
import json

import numpy as np
import pytest

from ttt_jax import data
from ttt_jax.data import corruptions, streams


@pytest.fixture(scope="module")
def plan(digits):
    parts = [
        streams.shuffled(digits, seed=0),
        streams.shuffled(digits, seed=1, domain="gaussian_noise", severity=5),
        streams.shuffled(digits, seed=1, domain="contrast", severity=2),
    ]
    rows = [data.streams.Plan(*(column[:30] for column in part)) for part in parts]
    return streams.mixed(rows, seed=2)


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def join(batches):
    return data.DomainBatch(*(np.concatenate(c) for c in zip(*batches, strict=True)))


def test_carries_out_the_plan(digits, plan):
    loader = data.Loader(digits, plan, batch_size=32, seed=7)
    batches = list(loader)
    assert len(loader) == len(batches) == 3 and loader.split == "test"
    assert [len(b.id) for b in batches] == [32, 32, 26]
    assert batches[0].image.dtype == np.float32 and batches[0].severity.dtype == np.int32
    whole = join(batches)
    np.testing.assert_array_equal(whole.id, plan.index)
    np.testing.assert_array_equal(whole.label, digits.labels()[plan.index])
    np.testing.assert_array_equal(whole.domain, plan.domain)
    np.testing.assert_array_equal(whole.severity, plan.severity)
    clean = digits.take(plan.index).image
    for row, (domain, severity) in enumerate(zip(plan.domain, plan.severity, strict=True)):
        expected = clean[row]
        if domain != "clean":
            seed = (7, int(whole.id[row]))
            expected = corruptions.corrupt(expected, str(domain), int(severity), seed=seed)
        np.testing.assert_array_equal(whole.image[row], expected)


def test_a_corrupted_example_does_not_depend_on_the_batching(digits, plan):
    one = join(data.Loader(digits, plan, batch_size=1))
    same(one, join(data.Loader(digits, plan, batch_size=90)))
    back = streams.Plan(*(column[::-1] for column in plan))
    same(one, [column[::-1] for column in join(data.Loader(digits, back, batch_size=7))])
    other = join(data.Loader(digits, plan, batch_size=90, seed=1))
    assert (other.image != one.image).any()


def test_workers_give_the_same_batches(digits, plan):
    here = data.Loader(digits, plan, batch_size=32)
    there = data.Loader(digits, plan, batch_size=32, num_workers=1)
    position = iter(here)
    next(position)
    iterator = iter(there)
    iterator.set_state(position.get_state())
    same(join(iterator), join(position))


def test_resumes_from_every_position(digits, plan):
    loader = data.Loader(digits, plan, batch_size=25)
    batches = list(loader)
    iterator = iter(loader)
    states = [json.loads(json.dumps(iterator.get_state()))]
    for _ in batches:
        next(iterator)
        states.append(json.loads(json.dumps(iterator.get_state())))
    for position, state in enumerate(states):
        again = iter(data.Loader(digits, plan, batch_size=25))
        again.set_state(state)
        rest = list(again)
        assert len(rest) == len(batches) - position
        for a, b in zip(rest, batches[position:], strict=True):
            same(a, b)
    with pytest.raises(StopIteration):
        next(iterator)


def test_a_position_of_another_stream_is_refused(digits, plan):
    state = iter(data.Loader(digits, plan, batch_size=25)).get_state()
    for loader in (
        data.Loader(digits, plan, batch_size=24),
        data.Loader(digits, plan, batch_size=25, seed=1),
        data.Loader(digits, streams.shuffled(digits, seed=0), batch_size=25),
    ):
        with pytest.raises(ValueError, match="fits the stream it came from"):
            iter(loader).set_state(state)
    with pytest.raises(ValueError, match="between 0 and 4"):
        iter(data.Loader(digits, plan, batch_size=25)).set_state({**state, "next_batch": 5})


def test_bad_loaders(digits, plan):
    row = streams.Plan(np.array([0]), np.array(["fog"]), np.array([3]))
    for bad, message in (
        (row._replace(index=np.array([360])), "has 360"),
        (row._replace(domain=np.array(["fgo"])), "fog"),
        (row._replace(severity=np.array([0])), "from 1"),
        (row._replace(severity=np.array([1, 2])), "one length"),
        (streams.Plan(*(column[:0] for column in row)), "at least one row"),
    ):
        with pytest.raises(ValueError, match=message):
            data.Loader(digits, bad, batch_size=1)
    with pytest.raises(ValueError, match="batch_size"):
        data.Loader(digits, plan, batch_size=0)
    with pytest.raises(ValueError, match="negative"):
        data.Loader(digits, plan, batch_size=1, seed=-1)


def test_training_batches_shuffle_each_epoch_and_drop_the_remainder(digits):
    steps = list(itertools.islice(data.training_batches(digits, batch_size=100, seed=0), 6))
    assert all(batch.image.shape == (100, 8, 8, 1) for batch in steps)
    for epoch in (steps[:3], steps[3:]):
        assert len(set(np.concatenate([batch.id for batch in epoch]))) == 300
    assert (steps[0].id != steps[3].id).any()
    np.testing.assert_array_equal(steps[0].label, digits.labels()[steps[0].id])
    other = next(data.training_batches(digits, batch_size=100, seed=1))
    assert (other.id != steps[0].id).any()


def noisy(image, rng):
    return image + rng.normal(size=image.shape)


def test_training_places(digits):
    per_epoch = len(digits) // 100
    options = {"batch_size": 100, "seed": 3}
    steps = list(itertools.islice(data.training_places(digits, **options), 2 * per_epoch))
    first, second = (np.concatenate(steps[k * per_epoch :][:per_epoch]) for k in (0, 1))
    assert len(np.unique(first)) == len(np.unique(second)) == 100 * per_epoch
    assert max(first) < len(digits) and not np.array_equal(first, second)
    for start in (1, per_epoch, per_epoch + 1):
        later = next(data.training_places(digits, **options, start_step=start))
        np.testing.assert_array_equal(later, steps[start])
    other = next(data.training_places(digits, batch_size=100, seed=4))
    assert not np.array_equal(other, steps[0])
    with pytest.raises(ValueError, match="batch_size must lie between 1 and"):
        data.training_places(digits, batch_size=0, seed=0)


def test_training_batches_resume_from_a_step(digits):
    def run(start, count):
        return list(
            itertools.islice(
                data.training_batches(
                    digits, batch_size=150, seed=4, augment=noisy, start_step=start
                ),
                count,
            )
        )

    whole = run(0, 5)
    assert (whole[0].image[0] != digits[int(whole[0].id[0])].image).any()
    for start in (1, 3):
        for a, b in zip(run(start, 5 - start), whole[start:], strict=True):
            same(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 361}, "360 examples"),
        ({"batch_size": 0}, "between 1"),
        ({"seed": -1}, "seed"),
        ({"start_step": -1}, "start_step"),
    ],
)
def test_bad_training_batches(digits, options, message):
    with pytest.raises(ValueError, match=message):
        data.training_batches(digits, **{"batch_size": 10, "seed": 0, **options})
