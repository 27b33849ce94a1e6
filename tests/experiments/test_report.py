"""The report: what is read, the numbers in its tables, what the page and the program hold."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.report import (
    __main__ as report,
    charts,
    intervals,
    notes,
    page,
    read,
    table,
    terminal,
)
from experiments.report.read import ReportError
from experiments.sweeping import progress, state as state_lib
from experiments.sweeping.unit import Unit
from tests.experiments import report_rows
from tests.experiments.report_rows import (
    failed,
    payload,
    put_instances,
    put_run,
    put_sweep,
    row,
)


def prepared(folder):
    return table.prepare(read.results(folder))


def of_rows(tmp_path, rows):
    return prepared(put_run(tmp_path, rows))


def lead_of(data):
    return " ".join(notes.lead(data))


def line_of(frame, method):
    return frame[frame["method"] == method].iloc[0]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = put_run(tmp_path_factory.mktemp("report") / "run", report_rows.table())
    (folder / "run.json").write_text(json.dumps({"command": "python -m x", "commit": "0123abcd"}))
    return folder


def test_a_mean_is_over_domains_then_seeds_and_its_interval_over_the_seeds(full):
    data = prepared(full)
    # Corruptions 0 to 14: 40 + 2 * 7 = 54 on seed 0, 55 on seed 1 ...; clean and spatter left out.
    source = line_of(table.means(data), "source")
    assert source["mean"] == pytest.approx(0.55) and source["rows"] == 45
    # The standard deviation of three values, one apart, is one; t of two degrees is 4.303.
    assert source["half"] == pytest.approx(4.303 * 0.01 / 3**0.5) and source["basis"] == "seeds"
    assert table.pivot(data).loc["rotation", "fog"] == pytest.approx(0.38 + 0.18 - 0.01)
    assert list(table.pivot(data).columns)[:2] == ["clean", "gaussian_noise"]
    means = table.means(data, role="validation").set_index("method")["mean"]
    assert means.to_dict() == pytest.approx(report_rows.VALIDATION)


def test_one_seed_without_instances_has_no_interval(tmp_path):
    data = of_rows(tmp_path, report_rows.table(seeds=(0,)))
    source = line_of(table.means(data), "source")
    assert np.isnan(source["half"]) and source["basis"] == ""
    assert "(paired, no interval: fewer than three seeds, and no instances)" in lead_of(data)


def test_bootstrap_over_instances_is_that_of_a_share_and_pairs_by_id(tmp_path):
    rows = report_rows.table(seeds=(0,))
    put_instances(put_run(tmp_path, rows), rows)
    data = prepared(tmp_path)
    fog = table.by_domain(data)
    source = line_of(fog[fog["domain"] == "fog"], "source")
    # The binomial standard error of 58 wrong images of 100, within what 100 replicates allow.
    assert source["basis"] == "instances"
    assert source["half"] == pytest.approx(1.96 * (0.58 * 0.42 / 100) ** 0.5, rel=0.25)
    # The same 36 + 2k images are wrong under both: the difference varies with 4 images alone.
    line = table.difference(data, "augmented", "source")
    assert line["mean"] == pytest.approx(-0.04) and line["basis"] == "instances"
    assert line["half"] < 0.6 * source["half"]


def test_incomplete_seeds_are_left_out_marked_and_never_lowest(tmp_path):
    rows = [r for r in report_rows.table() if (r["method"], r["seed"], r["domain"])
            != ("rotation_online", 1, "fog")]  # fmt: skip
    data = of_rows(tmp_path, rows)
    online = line_of(table.means(data), "rotation_online")
    assert online["partial"] and online["mean"] == pytest.approx(0.47) and online["seeds"] == 2
    assert "rotation_online" not in set(table.lowest(table.means(data))["method"])
    assert any("rotation_online lacks domains" in note for note in notes.notes(data))
    assert "47.0+" in terminal.error_table(data) and table.headline(data)["stream"].best is None
    assert "47.0 % (over fewer domains, severities or seeds than others)" in lead_of(data)


def test_the_headline_compares_with_the_best_method_without_a_gradient_step(full):
    head = table.headline(prepared(full))
    assert {kind: pick.method for kind, pick in head.items()} == {
        "plain": "augmented",
        "per_sample": "rotation",
        "stream": "rotation_online",
    }
    # Seed 0: 52 - 50; seed 1: 51 - 51; seed 2: 50 - 52.
    line = table.difference(prepared(full), "rotation", "augmented")
    assert line["mean"] == pytest.approx(0)
    text = lead_of(prepared(full))
    assert "51.0 ± 2.5 %, no difference seen from augmented (0.0 ± 5.0 points" in text
    assert "augmented, chosen on validation among 2 methods without a gradient step: 51.0" in text
    assert "source has 55.0 ± 2.5 %" in text


def test_a_gain_is_against_the_source_of_the_same_model_images_and_seed(tmp_path):
    def gain(**changes):
        rows = [row("source", "fog", 0, 0.5), row("rotation", "fog", 0, 0.4) | changes]
        return of_rows(tmp_path, rows).frame["gain"].iloc[1]

    assert gain() == pytest.approx(0.1)
    for change in ({"seed": 1}, {"domain": "snow"}, {"severity": 3}, {"checkpoint": "other"},
                   {"num_examples": 50}, {"split_role": "validation"}):  # fmt: skip
        assert np.isnan(gain(**change)), change
    # By definition the same: what turned right minus what turned wrong.
    assert gain(seed=1, turned_right=0.07, turned_wrong=0.09) == pytest.approx(-0.02)
    rows = [row("joint", "fog", 0, 0.6), row("source", "fog", 0, 0.5), row("memo", "fog", 0, 0.4)]
    assert of_rows(tmp_path, rows).frame["gain"].iloc[2] == pytest.approx(0.1)
    rows[1] = row("source_tuned", "fog", 0, 0.9, num_steps=1)
    assert of_rows(tmp_path, rows).frame["gain"].iloc[2] == pytest.approx(0.2)


def test_other_tasks_need_no_code(tmp_path):
    rows = [
        row("source", name, 0, 0.1, bits_per_byte=bits, source_kind=kind, chooses="bits_per_byte")
        for name, bits, kind in (("old", 2.5, "code"), ("new", 3.5, "prose"))
    ]
    adapted = [r | {"method": "next_token", "num_steps": 1, "bits_per_byte": 2.0} for r in rows]
    for one in (*rows, *adapted):
        del one["error"]
    data = of_rows(tmp_path, rows + adapted)
    assert data.results.primary == "bits_per_byte" and "source_kind" in data.results.tags
    assert line_of(table.means(data), "source")["mean"] == 3.0
    # What is no share has a share as its gain.
    gain = line_of(table.means(data, "gain"), "next_token")["mean"]
    assert gain == pytest.approx((1 - 2 / 2.5 + 1 - 2 / 3.5) / 2)
    text = page.render(data, name="documents")
    assert "bits per byte" in text and 'name="source_kind"' in text
    assert "2.000, 1.000 below source" in lead_of(data) and "%" not in lead_of(data)


def test_contradictions_collapses_and_failures_are_said(tmp_path):
    rows = report_rows.table(seeds=(0,))
    rows[1] |= {"turned_right": 0.5}
    rows[40] |= {"num_examples": 90, "non_finite": 2}
    rows[50] |= {"predicted_classes_before": 9.0, "predicted_classes_after": 1.5}
    rows += [
        row("memo", name, 0, None, status="failed", message=f"ended after {n} s")
        for n, name in enumerate(("fog", "snow"))
    ]
    data = of_rows(tmp_path, rows)
    said = " ".join(notes.notes(data))
    for words in ("on another number of examples", "do not add up", "predictions collapsed",
                  "non-finite inner step on 2 examples"):  # fmt: skip
        assert words in said, words
    ((reason, part),) = table.failures(data)
    assert reason == "ended after 0 s" and len(part) == 2
    assert "failed, 2 rows: ended after 0 s" in terminal.render(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": None}, "line 1: missing `method`"),
        ({"error": 40.0}, "`error` must be a fraction in [0, 1], got 40.0"),
        ({"error": "high"}, "`error` must hold numbers, got 'high'"),
        ({"split_role": "test"}, "must be one of reported, validation, got 'test'"),
        ({"scope": "all"}, "`scope` must be one of"),
        ({"num_examples": 0}, "`num_examples` must be positive, got 0"),
        ({"domain": 3}, "`domain` must hold text, got 3"),
    ],
)
def test_a_malformed_row_names_file_line_and_rule(tmp_path, changes, words):
    put_run(tmp_path, [row("source", "fog", 0, 0.5) | changes])
    with pytest.raises(ReportError) as caught:
        read.results(tmp_path)
    assert words in str(caught.value) and "results.jsonl" in str(caught.value)


def test_rows_that_differ_in_another_text_alone_are_all_kept(tmp_path):
    kinds = [row("source", "fog", 0, 0.5) | {"compute_dtype": kind} for kind in ("f32", "bf16")]
    put_run(tmp_path, kinds)
    assert read.results(tmp_path).frame["compute_dtype"].tolist() == ["f32", "bf16"]


def test_broken_files_are_one_sentence_or_a_note(tmp_path):
    with pytest.raises(ReportError, match=r"no results here\. Run"):
        read.results(tmp_path)
    one = row("source", "fog", 0, 0.5)
    put_run(tmp_path, [one, one])
    with pytest.raises(ReportError, match=r"written twice: .*domain=fog.* \(lines 1, 2\)"):
        read.results(tmp_path)
    put_run(tmp_path, [one], tail='{"method": "ro')
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "selection.json").write_text("[]")
    said = " ".join(read.results(tmp_path).notes)
    for words in ("cut off and was skipped", "run.json could not", "selection.json must hold"):
        assert words in said
    put_run(tmp_path, [], tail="{}\n{}\n")
    with pytest.raises(ReportError, match="line 1: missing"):
        read.results(tmp_path)


def test_the_page_is_whole_offline_and_lets_no_text_out(tmp_path):
    hostile = "</script><script>alert(1)</script><!-- <b>"
    rows = [row("source", "fog", 0, 0.5), row(hostile, "fog", 0, 0.4, num_steps=1)]
    rows.append(row("memo", "fog", 0, None, status="failed", message=hostile))
    path, data = report.write(put_run(tmp_path / "<i>run", rows))
    text = path.read_text()
    # The data and three scripts; nothing else ends one.
    assert text.lower().count("</script") == 4
    assert hostile not in text and "&lt;i&gt;run" in text and "<!--" not in text
    assert not re.search(r'(?i)(src|href)="(https?:)?//|@import', text)
    assert data.results.folder.name == "<i>run" and not list(path.parent.glob(".report*"))
    # Most of it are the kept libraries.
    assert len(text) < 2_500_000


def test_pictures_are_shown_where_there_are_any(full, tmp_path):
    folder = put_run(tmp_path, report_rows.table(seeds=(0,)))
    images = np.linspace(0, 1, 2 * 64).reshape(2, 8, 8, 1)
    texts = {"label": [3, 4], "before": [5, 4], "after": [3, 4], "domain": ["fog", "snow"]}
    np.savez(folder / "examples.npz", clean=images, shifted=images, **texts)
    text = page.render(prepared(folder), name="run")
    assert text.count('src="data:image/png;base64,') == 4 and "What adapting changes" in text
    assert "What adapting changes" not in page.render(prepared(full), name="run")
    np.savez(folder / "examples.npz", clean=images)
    with pytest.raises(ReportError, match="needs the arrays shifted"):
        report.write(folder)


def test_settings_and_headline_of_a_sweep_are_those_that_validation_chose(tmp_path):
    data = prepared(put_sweep(tmp_path, report_rows.grid()))
    kept = table.chosen(data)
    assert set(kept.frame.loc[kept.frame["method"] == "rotation", "learning_rate"]) == {0.1}
    assert "settings that validation rows chose. rotation, the only method" in lead_of(data)
    assert "15.0 points below source" in lead_of(data)
    assert data.results.trials == {"done": 41, "failed": 0, "running": 0, "waiting": 0}
    text = page.render(data, name="sweep")
    assert payload(text)["logs"]["t7"] == "trials/t7/log.txt" and "Two settings" in text


def test_a_sweep_names_what_failed_and_may_be_at_work(tmp_path):
    label = "seeds=1 methods=memo domains=fog"
    trials = {"seeds=0": [row("source", "fog", 0, 0.5)], label: [], "seeds=2": []}
    states = {label: failed("ended after 12 s"), "seeds=2": state_lib.State("running")}
    put_sweep(tmp_path, trials, states=states, collected=False)
    data = prepared(tmp_path)
    lost = data.frame[data.frame["status"] == "failed"].iloc[0]
    assert (lost["method"], lost["domain"], lost["seed"]) == ("memo", "fog", 1)
    assert data.results.trials == {"done": 1, "failed": 1, "running": 1, "waiting": 0}
    assert "not finished: 1 done, 1 failed, 1 running" in terminal.render(data)
    assert not (tmp_path / "results.parquet").exists()
    unit = Unit("trial", "new", "", None, "seeds=3")
    progress.save(tmp_path, [unit])
    with pytest.raises(ReportError, match="no trial has a row yet"):
        read.results(tmp_path)
    state_lib.write(unit.folder(tmp_path), state_lib.State("done"))
    put_run(unit.folder(tmp_path), [row("source", "fog", 3, 0.2)])
    pq.write_table(pa.table({"trial": ["t0"], "status": ["ok"]}), tmp_path / "results.parquet")
    again = read.results(tmp_path)
    assert again.frame["error"].tolist() == [0.2]
    assert any("not that of the present plan" in note for note in again.notes)


def test_a_damaged_sweep_is_one_sentence_with_the_way_out(tmp_path):
    put_sweep(tmp_path, {"seeds=0": [row("source", "fog", 0, 0.4)]})
    (tmp_path / "results.parquet").write_bytes(b"no table")
    with pytest.raises(ReportError, match=r"results\.parquet is damaged .* remove it"):
        read.results(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    (tmp_path / "results.parquet").unlink()
    said = " ".join(read.results(tmp_path).notes)
    assert "plan.json could not be read" in said and "no results.parquet yet" in said

    def refuse(words, **columns):
        pq.write_table(pa.table(columns), tmp_path / "results.parquet")
        with pytest.raises(ReportError, match=words):
            read.results(tmp_path)

    (tmp_path / "plan.json").unlink()
    refuse("lacks `trial` among city, status", city=["Oslo"], status=["ok"])
    refuse("`error` must hold numbers, got 'high'", trial=["t"], status=["ok"], error=["high"])
    refuse("`settings` must be a JSON object", trial=["t"], status=["ok"], settings=["{"])


def test_many_values_of_a_setting_become_ranges():
    rates = pd.Series([10 ** (-4 + k / 10) for k in range(31)])
    ranges = page._binned(rates)
    assert ranges.nunique() == 10 and ranges[0] == "0.0001 to 0.0002"
    assert page._binned(rates[:14]).equals(rates[:14])


def test_the_quantiles_are_those_of_student():
    stats = pytest.importorskip("scipy.stats")
    expected = [round(float(stats.t.ppf(0.975, n)), 3) for n in range(1, 31)]
    assert list(intervals.T95) == expected


def test_every_kept_result_still_reads():
    count = 0
    for path in sorted(pathlib.Path("experiments/results").glob("*.json")):
        record = json.loads(path.read_text())
        rows = record.get("rows") or [{}]
        if "method" in rows[0] and "error" in rows[0]:
            data = prepared(path)
            roles = ("reported", "validation")
            means = [line for role in roles for line in table.means(data, role=role)["mean"]]
            assert len(data.frame) == len(rows) and means and 0 < min(means) <= max(means) < 1
            count += 1
    assert count >= 15


def run_program(*arguments):
    command = [sys.executable, "-m", "experiments.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_writes_page_figures_and_a_kept_file(full, tmp_path):
    kept, figures = tmp_path / "kept.json", tmp_path / "figures"
    done = run_program(f"--workdir={full}", f"--export={kept}", f"--figures={figures}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^source .* 55\.0±2\.5$", done.stdout, re.M) and "wrote " in done.stdout
    record = json.loads(kept.read_text())
    assert record["commit"] == "0123abcd" and len(record["rows"]) == len(report_rows.table())
    names = {path.name for path in figures.iterdir()}
    assert {"means.png", "means.pdf", "turned.png", "error_by_step.pdf", "cost.png"} <= names
    assert (figures / "means.pdf").read_bytes().startswith(b"%PDF")
    assert read.results(kept).frame["error"].equals(prepared(full).frame["error"])


def test_a_notebook_draws_what_the_page_draws(full):
    data = prepared(full)
    chart = charts.figure(data, "domains", "gain").to_dict()
    (rows,) = chart["datasets"].values()
    named = {"source", "augmented", "rotation", "rotation_online"}
    assert {one["method"] for one in rows} == named and {one["domain"] for one in rows} > {"fog"}
    fog = [one["mean"] for one in rows if (one["method"], one["domain"]) == ("rotation", "fog")]
    assert fog == [pytest.approx(4.0)]
    assert "ms per instance" in charts.figure(data, "cost", price="milliseconds").to_json()
    with pytest.raises(ValueError, match=r"have the charts means, domains, .* got 'heat'"):
        charts.figure(data, "heat")


def test_nothing_to_report_is_status_two(tmp_path, capsys):
    assert report.run(tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    put_sweep(tmp_path, {"seeds=0": [row("source", "fog", 0, 0.4)]})
    assert report.run(tmp_path, export_to=str(tmp_path / "kept.json")) == 2
    assert "results.parquet" in capsys.readouterr().err
