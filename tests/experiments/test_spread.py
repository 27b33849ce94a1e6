"""The work of a run spread over devices and shared by processes: same rows, logits, failures."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest

from experiments import adapt, launch, outcome, runner, shares, spread, train
from tests.experiments import pair, tiny_config, tiny_model
from tests.experiments.test_programs import assert_equal_rows, rows_of
from ttt_jax import audit, data
from ttt_jax.data.streams import Plan

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        jax.local_device_count() < 4,
        reason="needs four devices (CPU: --xla_force_host_platform_device_count)",
    ),
]

PART = adapt.Part(domains=("clean", "fog", "contrast", "saturate"))


@pytest.fixture(autouse=True)
def dense(monkeypatch):
    tiny_model.install(monkeypatch)


def every_scope():
    """50 images in batches of 20: nothing divides by the number of devices or processes."""
    rotation = {"copies": 2, "learning_rate": 0.01, "select": "all"}
    tent = {"learning_rate": 0.05, "optimizer": "sgd"}
    return tiny_config.with_methods(
        tiny_config.get_batch_norm_config(),
        source={},
        rotation={**rotation, "num_steps": 2, "learning_rate": (0.01, 0.03)},
        rotation_online={**rotation, "num_steps": 1},
        bn_adapt={},
        tent=tent,
        tent_online={**tent, "predict": "before"},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.install(patch)
        train.run(every_scope(), str(folder))
    return folder


class Adapted:
    """What a run left, and the logits of each of its outcomes."""

    def __init__(self, folder, config, monkeypatch, **options):
        made = {}

        def keep(method, settings, trial, found, *rest):
            made[method.scope, str(settings), trial.cells] = found.logits
            return make_rows(method, settings, trial, found, *rest)

        make_rows = adapt.rows_lib.make_rows
        with monkeypatch.context() as patch:
            patch.setattr(adapt.rows_lib, "make_rows", keep)
            self.status = adapt.run(config, str(folder), part=PART, **options)
        self.rows, self.logits = rows_of(folder), made
        self.selection = json.loads((folder / "selection.json").read_text())


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """One process, one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.install(patch)
        return Adapted(folder, every_scope(), patch, devices=1)


def assert_same(found, alone):
    assert found.status == 0
    assert_equal_rows(found.rows, alone.rows)
    assert found.logits.keys() == alone.logits.keys()
    for key, logits in alone.logits.items():
        num_steps = len(logits) if key[0] == "stream" else 2
        audit.require_close(found.logits[key], logits, num_steps=num_steps)
    assert found.selection["chosen"] == alone.selection["chosen"]


def test_all_devices_of_a_process_equal_one(trained, alone, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    used = []
    load = adapt.problem_lib.load_checkpoint

    def loaded(*args, **options):
        pristine = load(*args, **options)
        used.extend(leaf.sharding.device_set for leaf in jax.tree.leaves(pristine.params))
        return pristine

    monkeypatch.setattr(adapt.problem_lib, "load_checkpoint", loaded)
    found = Adapted(tmp_path / "run", every_scope(), monkeypatch)
    assert_same(found, alone)
    # The default is all of them, and the checkpoint was restored onto them.
    assert used and all(devices == set(jax.local_devices()) for devices in used)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["devices"] == len(jax.devices())


def test_two_processes_of_two_devices_equal_one_of_one(trained, alone, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")

    def work(team):
        if team.index == 0:
            return Adapted(tmp_path / "run", every_scope(), monkeypatch, devices=2, team=team)
        other = adapt.run(every_scope(), str(tmp_path / "run"), part=PART, devices=2, team=team)
        return other

    first, second = pair.run(work)
    assert_same(first, alone)
    assert second == 0
    # Run again, both find all rows and do nothing.
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    again = pair.run(
        lambda team: adapt.run(every_scope(), str(tmp_path / "run"), part=PART, team=team)
    )
    assert again == [0, 0] and (tmp_path / "run" / "results.jsonl").read_bytes() == before


def test_a_process_reads_its_own_images_alone(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    part = PART._replace(methods=("source", "rotation"))
    read = {}
    get = data.Source.__getitem__

    def note(self, index):
        who = threading.current_thread().name.partition("-")[0]
        read.setdefault((self.split, who), set()).add(index)
        return get(self, index)

    def work(team):
        threading.current_thread().name = f"process{team.index}"
        return adapt.run(every_scope(), str(tmp_path / "run"), part=part, team=team)

    monkeypatch.setattr(data.Source, "__getitem__", note)
    monkeypatch.setattr(data.Source, "in_memory", lambda self: pytest.fail("reads all images"))
    # Reading ahead has a thread of its own, which must not hide who reads.
    monkeypatch.setattr(runner, "ahead", lambda make, items: map(make, items))
    assert pair.run(work) == [0, 0]
    for split, size in (("test[:50]", 50), ("train[1257:1277]", 20)):
        one, two = (read[split, f"process{index}"] for index in range(2))
        assert one & two == set()
        assert len(one) == len(two) == size // 2


def test_a_failing_share_is_a_failed_row_and_holds_no_one_up(trained, alone, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    one = runner.Runner._one

    def fail(self, name, method, settings, batches):
        if self.team.index == 1 and name == "tent" and batches[0].domain[0] == "fog":
            raise ValueError("fog is too thick")
        return one(self, name, method, settings, batches)

    def work(team):
        return adapt.run(every_scope(), str(tmp_path / "run"), part=PART, devices=1, team=team)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Runner, "_one", fail)
        assert pair.run(work) == [1, 1]
    rows = rows_of(tmp_path / "run")
    failed = [row for row in rows if row["status"] == "failed"]
    assert [(row["method"], row["domain"]) for row in failed] == [("tent", "fog")]
    assert failed[0]["message"] == "ShareError: process 1: ValueError: fog is too thick"
    assert len(rows) == len(alone.rows)
    assert pair.run(work) == [0, 0]
    assert_equal_rows(rows_of(tmp_path / "run"), alone.rows)


def test_more_processes_than_images():
    config = tiny_config.get_config()
    plans = (plan_of(0, 2),)
    parts = [shares.of_images(plans, index, 3) for index in range(3)]
    assert [len(part) for part in parts] == [0, 1, 1]
    assert [shares.of_batches(plans, config.adapt.batch_size, i, 3) for i in range(2)] == [(), ()]


def plan_of(first, last):
    count = last - first
    return Plan(np.arange(first, last), np.full(count, "fog"), np.full(count, 5))


def rows(part):
    return [plan.index.tolist() for plan in part]


def test_a_share_of_images_is_a_range_of_all_plans():
    plans = (plan_of(0, 5), plan_of(5, 7))
    assert rows(shares.of_images(plans, 0, 2)) == [[0, 1, 2]]
    assert rows(shares.of_images(plans, 1, 2)) == [[3, 4], [5, 6]]
    parts = [shares.of_images(plans, index, 4) for index in range(4)]
    assert [i for part in parts for plan in rows(part) for i in plan] == list(range(7))


def test_a_share_of_batches_cuts_none():
    plans = (plan_of(0, 5), plan_of(5, 7))
    # The batches are 0 1, 2 3, 4 and 5 6: none spans two plans.
    assert rows(shares.of_batches(plans, 2, 0, 2)) == [[0, 1, 2, 3]]
    assert rows(shares.of_batches(plans, 2, 1, 2)) == [[4], [5, 6]]
    assert rows(shares.of_batches(plans, 2, 0, 3)) == [[0, 1]]


def batch_of(first, last):
    ids = np.arange(first, last)
    one = np.ones(len(ids), np.int32)
    return data.DomainBatch(ids, ids[:, None, None, None] * 1.0, one, one.astype(str), one)


@pytest.mark.parametrize(
    ("count", "fixed", "sizes", "counts"),
    [
        (1, True, [20, 20, 20], [20, 20, 9]),
        (1, False, [17, 17, 17], [17, 17, 15]),
        (2, False, [26, 26], [26, 23]),
        (4, False, [52], [49]),
    ],
)
def test_calls_of_images_have_one_size_and_little_padding(count, fixed, sizes, counts):
    batches = [batch_of(0, 20), batch_of(20, 25), batch_of(25, 45), batch_of(45, 49)]
    calls = list(spread.calls_of_images(batches, 20, spread.local(count), fixed=fixed))
    assert [len(call.id) for call in calls] == sizes
    assert [call.counts[0] for call in calls] == counts
    kept = np.concatenate([call.id[: call.counts[0]] for call in calls])
    assert kept.tolist() == list(range(49))
    for call in calls:
        assert call.image[:, 0, 0, 0].tolist() == call.id.tolist()
        assert set(call.id[call.counts[0] :].tolist()) <= {call.id[call.counts[0] - 1]}


def test_calls_of_batches_pad_none():
    batches = [batch_of(0, 4), batch_of(4, 8), batch_of(8, 12), batch_of(12, 14)]
    calls = list(spread.calls_of_batches(batches, spread.local(2)))
    assert [call.id.tolist() for call in calls] == [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[8, 9, 10, 11], [8, 9, 10, 11]],
        [[12, 13], [12, 13]],
    ]
    assert [call.counts for call in calls] == [(4, 4), (4,), (2,)]


def test_each_device_differentiates_its_own_part():
    """Inside shard_map a gradient of what all devices share may be summed over them."""
    devices = spread.local(4)

    def gradients(weight, xs):
        return jax.vmap(jax.grad(lambda w, x: (w * x) ** 2), in_axes=(None, 0))(weight, xs)

    weight = jax.device_put(np.float32(3), devices.copied)
    xs = devices.put(np.arange(8, dtype=np.float32))
    run = jax.jit(devices.each(gradients, 1))
    np.testing.assert_allclose(run(weight, xs), 6 * np.arange(8.0) ** 2)
    text = run.lower(weight, xs).compile().as_text()
    assert [word for word in ("all-reduce", "all-gather", "collective") if word in text] == []


def test_outcomes_survive_the_way_to_another_process():
    made = outcome.Outcome(
        logits=np.asarray([[0.1, np.nan], [np.inf, -2.0]], np.float32),
        aux=None,
        ok=np.asarray([True, False]),
        reset=np.asarray([False, True]),
        label=np.asarray([1, 0], np.int32),
        domain=np.asarray(["fog", "clean"]),
        severity=np.asarray([5, 0], np.int32),
        seconds=0.1,
        compile_seconds=1 / 3,
    )
    back = outcome.unpack(outcome.pack([None, made._asdict()]))
    assert back[0] == {}
    found = outcome.from_arrays(back[1])
    for name in outcome.Outcome._fields:
        left, right = getattr(found, name), getattr(made, name)
        np.testing.assert_array_equal(left, right, strict=isinstance(left, np.ndarray))


def test_a_number_of_devices():
    assert spread.local(1).mesh is None
    assert spread.local(3).mesh.size == 3
    assert spread.local().mesh.size == jax.local_device_count()
    for count in (-1, 99):
        with pytest.raises(launch.UserError, match=rf"--devices must lie .* got {count}\."):
            spread.local(count)
