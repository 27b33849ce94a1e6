"""The report of a sweep: what is read, how it is packed, what is printed."""

import configparser
import json
import pathlib
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import report
from experiments.reporting.rows import ReportError
from experiments.reporting.sweep import columns, gains, page, source, terminal
from experiments.sweeping import progress, state as state_lib
from experiments.sweeping.unit import Unit
from tests.experiments.report_pages import run_program
from tests.experiments.sweep_folders import failed, put, row


def read(folder):
    return source.read(folder)


def gain_of(*rows):
    table = {name: [one.get(name) for one in rows] for name in {n for one in rows for n in one}}
    return [None if g is None else round(g, 6) for g in gains.gains(table)]


def test_gain_is_against_the_source_row_of_the_same_model_images_and_seed():
    source_row = row("source", "fog", 0, 0.5)
    assert gain_of(source_row, row("memo", "fog", 0, 0.4)) == [0.0, 0.1]
    for other in (
        {"seed": 1},
        {"domain": "snow"},
        {"severity": 3},
        {"checkpoint": "other"},
        {"num_examples": 50},
        {"split_role": "validation"},
        {"dataset": "other"},
        {"sequence": "mixed"},
    ):
        assert gain_of(source_row, {**row("memo", "fog", 0, 0.4), **other}) == [0.0, None], other


def test_gain_prefers_source_to_joint_and_takes_the_mean_of_several():
    memo = row("memo", "fog", 0, 0.4)
    joint = row("joint", "fog", 0, 0.6)
    assert gain_of(joint, memo)[-1] == 0.2
    assert gain_of(joint, row("source", "fog", 0, 0.5), memo)[-1] == 0.1
    twice = [row("source", "fog", 0, error) for error in (0.5, 0.54)]
    assert gain_of(*twice, memo)[-1] == 0.12
    # A method that is called after a baseline but adapts is none.
    assert gain_of(row("source_tuned", "fog", 0, 0.9, steps=1), memo)[-1] is None
    assert gain_of(row("joint_online", "fog", 0, 0.9), memo)[-1] is None


def test_gain_without_a_baseline_is_what_was_turned_right_minus_turned_wrong():
    alone = row("memo", "fog", 0, 0.4, turned_right=0.07, turned_wrong=0.09)
    assert gain_of(alone) == [-0.02]
    assert gain_of(row("source", "fog", 0, 0.5), alone) == [0.0, 0.1]
    assert gain_of(row("memo", "fog", 0, None)) == [None]


def test_means_are_over_the_rows_of_each_seed_then_over_the_seeds(tmp_path):
    # Seed 0: (0.2 + 0.4 + 0.6) / 3 = 0.4, seed 1: 0.5. Mean 0.45; the standard error of two
    # values is half their distance, 0.05.
    rows = [row("memo", "fog", 0, e, rate=0.1, steps=1) for e in (0.2, 0.4, 0.6)]
    rows += [row("memo", "snow", 1, 0.5), row("source", "fog", 0, 0.7)]
    rows += [row("memo", "spatter", 0, 0.9, split_role="validation")]
    held = columns.plain(pa.Table.from_pylist([{"trial": "t", **plain(one)} for one in rows]))
    source_stats, memo = terminal.method_stats(held, columns.derived(held)["gain"], "reported")
    assert (source_stats.method, memo.method, memo.rows) == ("source", "memo", 4)
    assert memo.error.mean == pytest.approx(0.45) and memo.error.stderr == pytest.approx(0.05)
    # Of the gains only seed 0 has a source row, on fog: 0.7 - 0.4.
    assert memo.gain.mean == pytest.approx(0.3) and memo.gain.stderr is None
    (validation,) = terminal.method_stats(held, columns.derived(held)["gain"], "validation")
    assert validation.error.mean == pytest.approx(0.9)


def plain(one):
    return {**one, "settings": json.dumps(one["settings"])}


def decode(packed, count):
    if "raw" in packed:
        return packed["raw"]
    return [None if code < 0 else packed["values"][code] for code in packed["codes"][:count]]


@pytest.mark.parametrize(
    "values",
    [
        [0.5, None, 0.25, 0.125, 0.1],
        [1, 1, 1, None, 2, 2, 1, 1, 1, 1],
        ["b", "a", None, "b"],
        [None, None],
        ["0.1", 0.25, None],
    ],
)
def test_packed_columns_hold_every_value(values):
    texts = any(isinstance(value, str) for value in values)
    expected = [str(v) if texts and v is not None else v for v in values]
    packed = columns.encode(values)
    assert decode(packed, len(values)) == expected
    assert packed["kind"] == ("text" if texts else "number")
    # The page sorts a text column by its codes.
    assert packed.get("values", []) == sorted(packed.get("values", []))


def test_derived_columns_are_worked_out_by_hand():
    rows = [
        row("memo", "fog", 0, 0.4, rate=0.01, steps=4, seconds=0.5),
        row("memo", "fog", 1, 0.4, rate=0.1, steps=4, seconds=None),
        row("source", "fog", 0, 0.4, forwards_per_sample=None),
    ]
    rows[0]["settings"] |= {"views": 8, "select": "all"}
    rows[1]["settings"] |= {"views": 8, "select": "norm"}
    rows[0]["settings"]["seed"] = 1
    rows[1]["settings"]["seed"] = 2
    held = columns.plain(pa.Table.from_pylist([{"trial": "t", **plain(one)} for one in rows]))
    more = columns.derived(held)
    # 1 + 4 forwards and 4 backwards, each worth two; 0.5 s for 100 images.
    assert more["cost"] == [13, 13, None]
    assert more["milliseconds"] == [5.0, None, 20.0]
    assert more["learning_rate"] == [0.01, 0.1, None]
    assert more["select"] == ["all", "norm", None]
    # What no row changes is no column; a setting that is called like a column keeps apart.
    assert "views" not in more and "seed" not in more and "num_steps" not in more
    assert more["settings.seed"] == [1, 2, None]


def test_settings_are_the_same_across_seeds_and_domains():
    labels = [
        "seeds=0 model.width=8 domains=fog",
        "seeds=1 model.width=8 domains=snow,fog",
        "seeds=0 model.width=16 domains=fog",
    ]
    first, second, third = columns.setting_ids({"label": labels, "settings": ["{}"] * 3})
    assert first == second != third


def test_a_failed_trial_has_what_its_label_names(tmp_path):
    put(
        tmp_path,
        {
            "seeds=2 methods=memo domains=fog": [],
            "seeds=3 methods.memo.num_steps=2 domains=fog,snow": [],
        },
        states={
            "seeds=2 methods=memo domains=fog": failed("out of memory"),
            "seeds=3 methods.memo.num_steps=2 domains=fog,snow": failed("too slow"),
        },
    )
    sweep = read(tmp_path)
    assert sweep.counts == {"done": 0, "failed": 2, "running": 0, "waiting": 0}
    held = columns.plain(sweep.table)
    assert held["method"] == ["memo", None] and held["domain"] == ["fog", None]
    assert held["seed"] == [2, 3] and held["message"] == ["out of memory", "too slow"]
    assert "2 failed" in terminal.render(sweep) and "out of memory" in terminal.render(sweep)
    page.render(sweep, name="all failed")


def test_messages_that_differ_in_numbers_stand_together():
    held = {
        "status": ["failed", "ok", "failed", "failed"],
        "message": ["ended after 12 s", None, "full disk", "ended after 345 s"],
    }
    assert terminal.messages(held) == [("ended after 12 s", 2), ("full disk", 1)]


def test_an_unfinished_sweep_is_read_from_its_trials_and_nothing_is_written(tmp_path):
    put(
        tmp_path,
        {"seeds=0": [row("memo", "fog", 0, 0.4)], "seeds=1": [row("memo", "fog", 1, 0.6)]},
    )
    # Run again with more trials: the table is of the two, the third is at work.
    units = [*progress.load(tmp_path), Unit("trial", "t2", "", None, "seeds=2")]
    progress.save(tmp_path, [*units, Unit("trial", "t3", "", None, "seeds=3")])
    at_work = units[-1].folder(tmp_path)
    state_lib.write(at_work, state_lib.State("running"))
    text = json.dumps(row("memo", "fog", 2, 0.8)) + '\n{"method": "mem'
    (at_work / "results.jsonl").write_text(text)
    path, shown = report.write_sweep(tmp_path)
    assert (at_work / "results.jsonl").read_text() == text
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 2
    sweep = read(tmp_path)
    assert sweep.counts == {"done": 2, "failed": 0, "running": 1, "waiting": 1}
    assert not sweep.finished and sweep.trials == 4
    assert sweep.table["error"].to_pylist() == [0.4, 0.6, 0.8]
    note = "The sweep is not finished: 2 done, 0 failed, 1 running, 1 waiting."
    assert note in shown and note in path.read_text() and "not finished</span>" in path.read_text()


def test_trials_of_a_model_that_failed_do_not_wait_for_ever(tmp_path):
    model = Unit("model", "m", "", None, "model, seed 0")
    state_lib.write(model.folder(tmp_path), failed("no such data"))
    progress.save(tmp_path, [model, Unit("trial", "t0", "", "m", "seeds=0")])
    sweep = read(tmp_path)
    assert sweep.finished and sweep.counts["failed"] == 1
    assert sweep.table["message"].to_pylist() == ["its model failed: no such data"]


def test_without_a_table_or_a_plan_the_rows_are_those_of_the_trials(tmp_path):
    trials = {"seeds=0": [row("memo", "fog", 0, 0.4)], "seeds=1": [row("memo", "fog", 1, 0.6)]}
    put(tmp_path, trials, table=False)
    sweep = read(tmp_path)
    assert sweep.finished and sweep.table["label"].to_pylist() == ["seeds=0", "seeds=1"]
    assert any("no results.parquet yet" in note for note in sweep.notes)
    (tmp_path / "plan.json").write_text("{")
    sweep = read(tmp_path)
    assert sweep.table["trial"].to_pylist() == ["t0", "t1"] and not sweep.planned
    assert any("plan.json could not be read" in note for note in sweep.notes)
    (tmp_path / "plan.json").unlink()
    assert any("no plan.json" in note for note in read(tmp_path).notes)


def test_a_table_of_another_plan_is_not_taken(tmp_path):
    put(tmp_path, {"seeds=0": [row("memo", "fog", 0, 0.4)]})
    unit = Unit("trial", "new", "", None, "seeds=0")
    state_lib.write(unit.folder(tmp_path), state_lib.State("done"))
    (unit.folder(tmp_path) / "results.jsonl").write_text(json.dumps(row("memo", "fog", 0, 0.3)))
    text = json.dumps(row("memo", "fog", 0, 0.3)) + "\n"
    (unit.folder(tmp_path) / "results.jsonl").write_text(text)
    progress.save(tmp_path, [unit])
    sweep = read(tmp_path)
    assert sweep.table["error"].to_pylist() == [0.3]
    assert any("not that of the present plan" in note for note in sweep.notes)


def one_sentence(folder, *words):
    with pytest.raises(ReportError) as caught:
        report.write_sweep(folder)
    text = str(caught.value)
    assert "\n" not in text and not (folder / "report.html").exists()
    for word in words:
        assert word in text, text


def test_a_damaged_table_is_one_sentence_with_the_way_out(tmp_path):
    put(tmp_path, {"seeds=0": [row("memo", "fog", 0, 0.4)]})
    data = (tmp_path / "results.parquet").read_bytes()
    for broken in (b"", b"no table", data[: len(data) // 2]):
        (tmp_path / "results.parquet").write_bytes(broken)
        one_sentence(tmp_path, "results.parquet is damaged", "remove it")
    (tmp_path / "results.parquet").unlink()
    report.write_sweep(tmp_path)


def test_what_is_no_table_of_a_sweep_is_refused_by_name(tmp_path):
    def put_table(**values):
        pq.write_table(pa.table(values), tmp_path / "results.parquet")

    put_table(city=["Oslo"], status=["ok"])
    one_sentence(tmp_path, "lacks `trial` among city, status")
    put_table(trial=["t"], status=["ok"], error=["high"])
    one_sentence(tmp_path, "`error` must hold numbers, got string")
    put_table(trial=["t"], status=["ok"], method=[3])
    one_sentence(tmp_path, "`method` must hold text, got int64")
    put_table(trial=["t"], status=["ok"], error=[40.0])
    one_sentence(tmp_path, "`error` must be a fraction in [0, 1], got 40.0 in trial t")
    put_table(trial=["t"], status=["ok"], error=[0.4], settings=["{"])
    one_sentence(tmp_path, "`settings` must be a JSON object, got '{'")
    put_table(trial=pa.array([], pa.string()), status=pa.array([], pa.string()))
    one_sentence(tmp_path, "no trial has a row yet", "--status=")


def test_damaged_states_and_rows_are_named(tmp_path):
    put(tmp_path, {"seeds=0": [row("memo", "fog", 0, 0.4)]}, table=False)
    (tmp_path / "trials" / "t0" / "results.jsonl").write_text('{"half": 1}\n')
    one_sentence(tmp_path, "results.jsonl, line 1: not a result row")
    (tmp_path / "trials" / "t0" / "state.json").write_text("{")
    one_sentence(tmp_path, "state.json is damaged", "remove it")


def test_missing_and_non_finite_numbers_are_gaps(tmp_path):
    rows = [
        row("memo", "fog", 0, 0.4, seconds=float("nan")),
        row("memo", "fog", 1, 0.4, seconds=float("inf"), num_examples=None),
    ]
    put(tmp_path, {"seeds=0": rows})
    text = report.write_sweep(tmp_path)[0].read_text()
    packed = data_of(text)["columns"]
    assert decode(packed["seconds"], 2) == decode(packed["milliseconds"], 2) == [None, None]


def data_of(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found)


def test_labels_and_messages_cannot_end_the_data(tmp_path):
    label = "seeds=0 note=</script><script>alert(1)</script><!--"
    folder = put(tmp_path / "<b>sweep", {label: []}, states={label: failed("</SCRIPT> & <i>")})
    text = report.write_sweep(folder)[0].read_text()
    assert text.count("<script") == 2 and text.lower().count("</script") == 2
    packed = data_of(text)["columns"]
    assert packed["label"]["values"] == [label]
    assert packed["message"]["values"] == ["</SCRIPT> & <i>"]
    assert "<b>sweep" not in text and "<!--" not in text and "&lt;b&gt;sweep" in text


def test_the_page_holds_all_it_needs(tmp_path):
    put(tmp_path, {"seeds=0": [row("memo", "fog", 0, 0.4)]})
    record = {"command": "python -m experiments.trial", "commit": "0123abcd", "config": {"x": 1}}
    (tmp_path / "trials" / "t0" / "run.json").write_text(json.dumps(record))
    text = report.write_sweep(tmp_path)[0].read_text()
    assert not re.search(r"(?i)https?:|//\w|@import|url\(|\bsrc=|\bhref=", text)
    assert "0123abcd" in text and "<noscript>" in text
    # No folder of the machine stands in it.
    assert str(tmp_path.parent) not in text


def test_every_script_is_in_the_page_and_in_the_package():
    folder = pathlib.Path(page.__file__).parent
    assert {*page.SCRIPTS, page.MAIN} == {path.name for path in folder.glob("*.js")}
    setup = configparser.ConfigParser()
    setup.read(folder.parent.parent.parent / "setup.cfg")
    patterns = setup["options.package_data"]["experiments.reporting.sweep"].split(",")
    kept = {path.name for pattern in patterns for path in folder.glob(pattern.strip())}
    assert kept == {path.name for path in folder.iterdir() if path.suffix in (".js", ".css")}


def test_program_tells_a_sweep_from_a_run(tmp_path):
    rows = [row("source", "fog", 0, 0.5), row("memo", "fog", 0, 0.4)]
    put(tmp_path, {"seeds=0": rows})
    done = run_program(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 trials: 1 done; 2 rows" in done.stdout
    assert re.search(r"^memo +1 +40\.0 +\+10\.0$", done.stdout, re.M)
    assert (tmp_path / "report.html").exists() and not list(tmp_path.glob(".report*"))
    kept = run_program(tmp_path, "--export=kept.json")
    assert kept.returncode == 2 and "results.parquet" in kept.stderr
    (tmp_path / "results.parquet").write_bytes(b"")
    broken = run_program(tmp_path)
    assert broken.returncode == 2 and broken.stderr.count("\n") == 1
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert "missing `method`" in run_program(tmp_path).stderr
