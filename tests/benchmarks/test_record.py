"""A benchmark that was cut goes on with its file, and refuses one that was made otherwise."""

import json

import jax
import pytest

from benchmarks import vision
from experiments import launch, provenance
from tests.benchmarks.test_vision import restore_environment, settings

BOTH = {"works": ("rotation", "rotation_norm_only"), "dtypes": ("bfloat16",)}


@pytest.fixture
def timed(monkeypatch):
    """The cases that were timed, at a speed that their number makes, on a clean tree."""
    restore_environment(monkeypatch)
    monkeypatch.setattr(provenance, "_commit", lambda: "abc")
    cases = []

    def time_jax(case, *_):
        cases.append(case.work)
        return vision.Timing(1.0 / len(cases), 1.0, None, vision.jax_precision(case.dtype))

    monkeypatch.setattr(vision, "time_jax", time_jax)
    return cases


def fail_on(monkeypatch, work, error):
    """Makes the cases of a work fail."""
    working = vision.time_jax

    def time_jax(case, *rest):
        if case.work == work:
            raise error
        return working(case, *rest)

    monkeypatch.setattr(vision, "time_jax", time_jax)


def read(path):
    return json.loads(path.read_text())


def test_a_cut_run_goes_on_with_its_file(tmp_path, timed, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    with monkeypatch.context() as cut:
        fail_on(cut, "rotation_norm_only", KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            vision.run(path, settings(**BOTH))
    before = read(path)
    assert [row["work"] for row in before["rows"]] == timed == ["rotation"]
    monkeypatch.setattr("sys.argv", ["vision.py", "--again"])
    after = vision.run(path, settings(**BOTH))
    assert timed == [*BOTH["works"]] and read(path) == json.loads(json.dumps(after))
    assert after["rows"][:1] == before["rows"] and after["rows"][1]["work"] == "rotation_norm_only"
    # Both shares are of one measured rate; the record is of the call that began it.
    assert after["matmul"] == before["matmul"]
    assert [after[name] for name in ("command", "started")] == [
        before[name] for name in ("command", "started")
    ]
    assert before["runs"] == [provenance.origin(before)]
    assert [run["command"].endswith("--again") for run in after["runs"]] == [False, True]
    assert "1 of 2 rows are in" in capsys.readouterr().out
    text = path.read_text()
    vision.run(path, settings(**BOTH))
    assert timed == [*BOTH["works"]] and path.read_text() == text


def test_other_rows_are_added(tmp_path, timed, monkeypatch):
    """Rows are told apart by all that chooses them."""
    path = tmp_path / "bench.json"
    first = settings(works=("rotation",), dtypes=("bfloat16",))
    vision.run(path, first)
    rates = read(path)["matmul"]["tflops"]
    assert list(rates) == ["bfloat16"]
    vision.run(path, settings(works=("rotation",)))
    record = read(path)
    assert [row["compute_dtype"] for row in record["rows"]] == ["bfloat16", "float32"]
    assert record["matmul"]["tflops"]["bfloat16"] == rates["bfloat16"]
    assert set(record["matmul"]["tflops"]) == {"bfloat16", "float32"}
    assert record["config"]["dtypes"] == []
    work = vision.WORKS["rotation"]._replace(num_steps=(2,))
    with monkeypatch.context() as patch:
        patch.setitem(vision.WORKS, "rotation", work)
        vision.run(path, first)
    vision.run(path, settings(works=("rotation",), dtypes=("bfloat16",), devices=(1, 2)))
    rows = [(row["num_steps"], row["samples"], row["devices"]) for row in read(path)["rows"]]
    assert rows == [(1, 2, 1), (1, 2, 1), (2, 2, 1), (1, 4, 2)] and len(timed) == 4


def test_a_failed_row_runs_again(tmp_path, timed, monkeypatch):
    path = tmp_path / "bench.json"
    with monkeypatch.context() as broken:
        fail_on(broken, "rotation", RuntimeError("out of memory"))
        record = vision.run(path, settings(**BOTH))
    assert [(one["work"], one["message"]) for one in record["failed"]] == [
        ("rotation", "out of memory")
    ]
    # It is kept by a call that is about something else.
    vision.run(path, settings(works=("tent_batch",)))
    assert read(path)["failed"] == record["failed"]
    vision.run(path, settings(**BOTH))
    assert read(path)["failed"] == [] and len(read(path)["rows"]) == 3
    assert timed == ["rotation_norm_only", "tent_batch", "rotation"]


def test_forms_of_attention_that_are_one_here_are_one_row(tmp_path, timed):
    record = vision.run(tmp_path / "bench.json", settings(attention=("fused", "xla")))
    assert [row["attention"] for row in record["rows"]] == ["xla"] and timed == ["ttt_mae"]


@pytest.mark.parametrize(
    ("changed", "edit", "message"),
    [
        ({"repeats": 5}, {}, "config.repeats was 3, now 5. Choose another --out."),
        ({"compiler_options": ("a=b",)}, {}, r"config.compiler_options was \[\], now \['a=b'\]"),
        ({"trace": "T"}, {}, "config.trace was '', now 'T'"),
        ({}, {"commit": "def"}, "commit was 'def', now 'abc'. Choose another --out, in runs/, "),
        ({}, {"commit": "abc-dirty"}, "commit was 'abc-dirty', now 'abc'"),
        ({}, {"device": "H100"}, "device was 'H100', now '"),
        ({}, {"device_count": 99}, "device_count was 99, now "),
        ({}, {"versions": {"jax": "0.1"}}, r"versions\.jax was '0\.1', now"),
    ],
)
def test_a_file_made_otherwise_is_refused(tmp_path, timed, changed, edit, message):
    path = tmp_path / "bench.json"
    vision.run(path, settings())
    path.write_text(json.dumps(read(path) | edit))
    text = path.read_text()
    with pytest.raises(launch.UserError, match=f"has rows made otherwise: {message}"):
        vision.run(path, settings(**{"works": ("rotation",)} | changed))
    assert path.read_text() == text and timed == ["ttt_mae"]


def test_another_precision_of_float32_is_refused(tmp_path, timed, monkeypatch):
    path = tmp_path / "bench.json"
    vision.run(path, settings())
    monkeypatch.setattr(vision, "jax_precision", lambda dtype: "tf32")
    with pytest.raises(launch.UserError, match=r"matmul\.precision was 'ieee', now 'tf32'"):
        vision.run(path, settings())


def test_a_package_that_one_call_needs_is_no_difference(tmp_path, timed):
    path = tmp_path / "bench.json"
    vision.run(path, settings())
    old = read(path)
    old["versions"]["torch"] = "2.9"
    path.write_text(json.dumps(old))
    record = vision.run(path, settings(**BOTH))
    assert record["versions"]["torch"] == "2.9" and record["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}]}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, timed, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(launch.UserError, match=r"no record that can be gone on with"):
        vision.run(path, settings())
    assert path.read_text() == text and not timed


def test_two_calls_at_a_time_are_refused(tmp_path, timed):
    with launch.locked(tmp_path), pytest.raises(launch.BusyError, match="an --out in another"):
        vision.run(tmp_path / "bench.json", settings())
    assert not timed and not (tmp_path / "bench.json").exists()
