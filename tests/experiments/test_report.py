"""The page of a run and the table in the terminal."""

import json
import re
import statistics

import pytest

from experiments import report
from experiments.reporting import figures, origin, rows, summary, svg, tables, terminal
from experiments.reporting.rows import ReportError
from tests.experiments.report_pages import (
    DOMAINS,
    METHODS,
    RUN,
    SELECTION,
    Page,
    make_results,
    make_row,
    page_of,
    put,
    run_program,
)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = put(tmp_path_factory.mktemp("full"), make_results())
    (folder / "selection.json").write_text(json.dumps(SELECTION))
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


def test_table_holds_hand_counts(tmp_path):
    # Two seeds, two corruptions; every mean below is counted by hand.
    errors = {
        ("source", "clean"): (0.10, 0.12),
        ("source", "gaussian_noise"): (0.50, 0.54),
        ("source", "fog"): (0.30, 0.30),
        ("memo", "clean"): (0.10, 0.13),
        ("memo", "gaussian_noise"): (0.40, 0.40),
        ("memo", "fog"): (0.20, 0.32),
    }
    records = [
        make_row(method, domain, seed, value, num_examples=100)
        for (method, domain), values in errors.items()
        for seed, value in enumerate(values)
    ]
    page = page_of(put(tmp_path, records))
    table = page.table(0)
    assert table["method"] == ["clean", "gauss", "fog", "mean"]
    # Standard error of two values is half their distance: 0.02 / 2 = 1.0 points.
    assert table["source"] == ["11.0 ±1.0", "52.0 ±2.0", "30.0 ±0.0", "41.0 ±1.0"]
    # Seed means 0.30 and 0.36: 33.0, half the distance 3.0; clean is not in them.
    assert table["memo"] == ["11.5 ±1.5", "40.0 ±0.0", "26.0 ±6.0", "33.0 ±3.0"]
    difference = page.table(1)
    assert difference["memo"] == ["+0.5", "−12.0", "−4.0", "−8.0"]
    grid = tables.Grid(rows.parse_row(record) for record in records)
    head = summary.headline(grid)
    assert (head.source, head.best, head.wins) == ("source", "memo", 2)
    assert head.reduction == pytest.approx(8 / 41)
    assert head.clean_more_wrong == pytest.approx(0.5)
    assert "41.0 % (source) to 33.0 %" in page.text
    assert "−19.5 %" in page.text and "+0.5 points" in page.text
    text = report.show(report.write(tmp_path))
    assert re.search(r"^source +11\.0\* +52\.0 +30\.0 +41\.0±1\.0$", text, re.M)
    assert re.search(r"^memo +11\.5 +40\.0\* +26\.0\* +33\.0±3\.0\*$", text, re.M)


def test_lowest_is_marked_and_ties_share_it():
    errors = {"source": 0.4, "augmented": 0.3, "memo": 0.3}
    grid = tables.Grid(
        rows.parse_row(make_row(method, "fog", 0, error)) for method, error in errors.items()
    )
    assert grid.lowest({m: grid.cell(m, "fog") for m in grid.methods}) == {"augmented", "memo"}


def test_full_page_is_complete_well_formed_and_offline(full):
    text = report.write(full).path.read_text()
    page = Page(text)
    assert not re.search(r"(?i)https?:|//\w|@import|url\(", text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img")
        assert "src" not in attributes and "href" not in attributes
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    order = "clean gauss shot impul defoc glass motn zoom snow frost fog brit contr elast pixel"
    assert page.table(0)["method"] == [*order.split(), "jpeg", "mean"]
    assert len(page.table(0)["rotation_memo"]) == 17
    for words in (
        "rotation_memo is the best per-sample method",
        "chosen on the validation corruptions (speckle_noise, gaussian_blur, spatter, saturate)",
        "chosen on these",
        "learning_rate = 0.003, num_steps = 4",
        "Grid search at severity 5, seed 0.",
        "python -m experiments.adapt --workdir=runs/demo",
        "jax 0.10.2",
        "0123abcd",
        "fingerprint-2",
        "inner steps (0: before the first)",
    ):
        assert words in page.text, words
    assert not re.search(r"\b(None|nan|inf|Failed runs)\b", page.text)
    chosen = [cells for table in page.tables for cells in table if cells[-1] == "chosen"]
    assert ["rotation", "learning_rate = 0.003, num_steps = 4", "21.00", "chosen"] in chosen


def test_page_numbers_agree_with_the_rows(full):
    records = make_results()
    page = page_of(full)

    def seeds(method, field, domains=DOMAINS[1:]):
        for seed in (0, 1, 2):
            yield statistics.fmean(
                r[field]
                for r in records
                if r["method"] == method and r["domain"] in domains and r["seed"] == seed
            )

    for method in METHODS:
        values = [100 * value for value in seeds(method, "error")]
        spread = statistics.stdev(values) / 3**0.5
        shown = f"{statistics.fmean(values):.1f} ±{spread:.1f}"
        assert page.table(0)[method][-1] == shown
    aux = next(t for t in page.tables if "domains where it fell" in t[0])
    # Places 1..15: 0.5 + 0.02 * 8 before, 0.3 + 0.02 * 8 after; clean is place 0.
    expected = ["rotation", "0.660", "0.460", "−30 %", "0.500", "0.300", "−40 %", "16 of 16"]
    assert expected in aux
    turned = next(t for t in page.tables for c in t if c[0] == "augmented" and "+" in c[1])
    cells = next(c for c in turned if c[0] == "memo")
    right = 100 * statistics.fmean(seeds("memo", "turned_right"))
    wrong = 100 * statistics.fmean(seeds("memo", "turned_wrong"))
    assert cells[-1] == f"+{right:.1f} −{wrong:.1f}"
    cost = {c[0]: c[1:] for t in page.tables if "in plain forwards" in t[0] for c in t}
    # rotation: 8 views x 4 steps + 1 forwards, 32 backwards, each worth two forwards.
    assert cost["rotation"][:3] == ["33", "32", "97"]
    assert cost["source"][-1] == "1 ×"


def test_curve_is_the_mean_over_corruptions_per_step():
    records = [
        make_row("memo", "clean", 0, 0.1, error_by_step=[0.0, 0.0, 0.0]),
        make_row("memo", "fog", 0, 0.2, error_by_step=[0.4, 0.3, 0.2]),
        make_row("memo", "snow", 0, 0.4, error_by_step=[0.6, 0.5, 0.4]),
        make_row("source", "fog", 0, 0.4),
        make_row("source", "snow", 0, 0.6),
    ]
    grid = tables.Grid(map(rows.parse_row, records))
    assert [stat.mean for stat in summary.curve(grid, "memo")] == pytest.approx([0.5, 0.4, 0.3])
    assert [s.mean for s in summary.curve(grid, "memo", "fog")] == pytest.approx([0.4, 0.3, 0.2])
    drawn = figures.steps(grid, summary.headline(grid))
    assert drawn.count("<polyline") == 1 and "memo, step 2: 30.00 %" in drawn


def test_composition_named_after_a_baseline_is_an_adapting_method():
    records = [
        make_row("source", "fog", 0, 0.5),
        make_row("augmented", "fog", 0, 0.3),
        make_row("augmented_rotation", "fog", 0, 0.4, num_steps=2),
        make_row("tent_online", "fog", 0, 0.1, scope="stream"),
    ]
    head = summary.headline(tables.Grid(map(rows.parse_row, records)))
    assert (head.best, head.augmented) == ("augmented_rotation", "augmented")
    assert head.reduction == pytest.approx(0.2)


def test_failed_rows_and_gaps_are_shown(tmp_path):
    records = make_results(seeds=(0, 1))
    records = [r for r in records if not (r["method"] == "memo" and r["domain"] == "fog")]
    identity = ("method", "dataset", "domain", "severity", "seed", "split_role")
    for place, r in enumerate(records):
        if r["method"] == "rotation_memo" and r["domain"] == "snow":
            failed = {name: r[name] for name in identity}
            records[place] = {**failed, "status": "failed", "message": "out of <memory> & time"}
        if r["method"] == "rotation_online" and r["seed"] == 1:
            records[place] = None
    page = page_of(put(tmp_path, [r for r in records if r]))
    table = page.table(0)
    fog, snow = table["method"].index("fog"), table["method"].index("snow")
    assert table["memo"][fog] == "–" and table["memo"][-1] == "–"
    assert table["rotation_memo"][snow] == "failed" and table["rotation_memo"][-1] == "–"
    assert "†" in table["rotation_online"][0] and "†" in table["rotation_online"][-1]
    assert "memo has no complete measurement on fog" in page.text
    assert "rotation is the best per-sample method among those that are complete" in page.text
    assert page.text.count("out of <memory> & time") == 2
    text = report.show(report.write(tmp_path))
    assert text.count("failed: rotation_memo on snow, severity 5") == 2
    assert "rotation_online lacks seeds that other methods have on every domain" in text


def test_seed_that_is_not_complete_is_left_out_of_the_mean(tmp_path):
    records = [
        make_row(method, domain, seed, 0.5)
        for method in ("source", "memo")
        for seed in (0, 1)
        for domain in ("clean", "fog", "snow")
        if (seed, domain) != (1, "snow")
    ]
    page = page_of(put(tmp_path, records))
    assert page.table(0)["memo"] == ["50.0 ±0.0", "50.0", "50.0 ±0.0", "50.0†"]
    assert "memo: the mean (marked †) is over 1 of 2 seeds" in page.text


def test_several_severities_are_averaged_and_split(tmp_path):
    records = [
        make_row("source", "fog", 0, 0.2, severity=1),
        make_row("source", "fog", 0, 0.6, severity=5),
        make_row("memo", "fog", 0, 0.1, severity=1),
    ]
    page = page_of(put(tmp_path, records))
    assert page.table(0)["source"] == ["40.0", "40.0"]
    # memo lacks severity 5, and the mean of severity 1 alone does not stand beside 40.0.
    assert page.table(0)["memo"] == ["–", "–"]
    split = next(t for t in page.tables if "severity 1" in t[0])
    assert ["source", "20.0", "60.0"] in split and ["memo", "10.0", "–"] in split


def test_programs_that_had_the_folder_are_a_list_that_opens(tmp_path):
    parts = [{"folder": "runs/a", "test": "test[:5]", "command": "adapt <a>", "device": "cpu"}]
    runs = [{"command": "train"}, {"command": "adapt", "versions": {"jax": "1"}}]
    facts = dict(origin.run_facts({**RUN, "parts": parts, "runs": runs, "devices": 2}))
    assert facts["parts"].count("<li>") == 1 and "adapt &lt;a&gt;, cpu" in facts["parts"]
    assert facts["runs"].startswith("<details><summary>2</summary>") and facts["devices"] == "2"
    assert "jax" not in facts["runs"]
    assert "runs" not in dict(origin.run_facts({**RUN, "runs": runs[:1]}))


def test_a_stream_that_collapsed_is_named():
    def stream(method, domain, after):
        classes = {"predicted_classes_before": 8.0, "predicted_classes_after": after}
        return make_row(method, domain, 0, 0.5, **classes)

    records = [
        make_row("source", "fog", 0, 0.4),
        stream("memo", "fog", 4.0),
        stream("rotation_online", "fog", 3.9),
        stream("rotation_online", "snow", 1.2),
        stream("rotation_online", "frost", None),
    ]
    notes = summary.oddities(tables.Grid(map(rows.parse_row, records)))
    (note,) = [note for note in notes if "collapsed" in note]
    assert note.startswith("rotation_online: on 2 rows") and "snow: 1.2 of 8.0" in note


def test_contradicting_rows_are_noted():
    records = [
        make_row("source", "fog", 0, 0.5),
        make_row("memo", "fog", 0, 0.4, turned_right=0.3, turned_wrong=0.1, non_finite=3),
        make_row("rotation", "fog", 0, 0.4, turned_right=0.2, turned_wrong=0.1),
        make_row("tent", "fog", 0, 0.4, num_examples=200),
    ]
    notes = " ".join(summary.oddities(tables.Grid(map(rows.parse_row, records))))
    assert "memo: the shares turned right and wrong do not add up" in notes
    assert "tent: measured on another number of examples" in notes
    assert "memo: a non-finite inner step on 3 examples" in notes
    assert "rotation" not in notes


def test_only_validation_rows_or_no_source_still_make_a_page(tmp_path):
    page = page_of(put(tmp_path, [make_row("memo", "spatter", 0, 0.5, split_role="validation")]))
    assert page.table(0)["memo"] == ["50.0", "50.0"] and "No reported rows yet" in page.text
    page = page_of(put(tmp_path, [make_row("memo", "clean", 0, 0.5)]))
    assert "Without a source method" in page.text
    page = page_of(put(tmp_path, [make_row("source", "clean", 0, 0.5)]))
    assert "Without a per-sample adapting method" in page.text
    assert "No row holds an auxiliary loss" in page.text


def test_names_and_messages_are_escaped(tmp_path):
    records = [make_row("source", "fog", 0, 0.5), make_row('memo_<b>"&', "fog", 0, 0.4)]
    records[1]["checkpoint"] = "<script>alert(1)</script>"
    text = report.write(put(tmp_path, records)).path.read_text()
    assert 'memo_<b>"&' in Page(text).text
    assert text.count("<script>") == 1 and "<b>&quot;" not in text


def test_unwritable_page_is_a_clear_error(tmp_path):
    put(tmp_path, [make_row("source", "fog", 0, 0.5)])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ReportError, match=r"report\.html: cannot be written"):
        report.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.jsonl"]


def test_terminal_table_is_plain_and_fits(full):
    text = report.show(report.write(full))
    assert "\x1b" not in text
    table = [line for line in text.splitlines() if line.startswith(tuple(METHODS))]
    assert max(map(len, table)) <= 120
    # One block: the mean stands in the line of its method.
    assert sum("clean gauss" in line for line in text.splitlines()) == 1
    grid = tables.by_dataset(report.write(full).rows, "reported")["digits"]
    assert "\x1b[1m" in terminal.error_table(grid, color=True)
    narrow = terminal.error_table(grid, width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert sum(line.startswith("rotation_memo ") for line in narrow.splitlines()) > 1


def test_unknown_domains_follow_the_benchmark_ones():
    names = ["custom_shift", "jpeg_compression", "clean", "gaussian_noise"]
    grid = tables.Grid(rows.parse_row(make_row("source", name, 0, 0.5)) for name in names)
    assert grid.domains == ["clean", "gaussian_noise", "jpeg_compression", "custom_shift"]
    assert [tables.short(name) for name in grid.domains] == ["clean", "gauss", "jpeg", "custom"]


def test_axis_helpers():
    assert svg.ticks(0, 39.6) == [0, 10, 20, 30, 40]
    assert svg.ticks(0.5, 0.5)[0] <= 0.5 <= svg.ticks(0.5, 0.5)[-1]
    assert svg.log_ticks(1, 385) == [1, 10, 100, 1000]
    assert svg.log_ticks(3, 40) == [2, 5, 10, 20, 50]
    assert svg.spread([10, 11, 50], 16, 0, 60) == [10, 26, 50]
    assert svg.spread([58, 59], 16, 0, 60) == [44, 60]


def test_program_writes_page_and_table(tmp_path):
    put(tmp_path, [make_row("source", "fog", 0, 0.5), make_row("memo", "fog", 0, 0.25)])
    done = run_program(f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^memo +25\.0\* +25\.0\*$", done.stdout, re.M)
    assert "\x1b" not in done.stdout and (tmp_path / "report.html").exists()
    unknown = run_program(tmp_path, "--workdirs=elsewhere")
    assert unknown.returncode == 1 and "Unknown command line flag 'workdirs'" in unknown.stderr
    double = run_program(f"--workdir={tmp_path}", "other")
    assert double.returncode != 0 and "exactly one results folder" in double.stdout + double.stderr
    absent = run_program(tmp_path / "absent")
    assert absent.returncode == 2 and "no results here" in absent.stderr


def test_nothing_to_report_is_status_two(tmp_path, capsys):
    for content in ("", "\n\n", '{"method": '):
        (tmp_path / "results.jsonl").write_text(content)
        assert report.run(tmp_path) == 2
        assert "holds no complete row" in capsys.readouterr().err
    put(tmp_path, [make_row("source", "fog", 0, 0.5)])
    assert report.run(tmp_path) == 0
    assert "wrote" in capsys.readouterr().out


def test_export_keeps_rows_and_provenance(tmp_path):
    source = tmp_path / "run"
    source.mkdir()
    row = {
        "method": "source",
        "dataset": "d",
        "domain": "clean",
        "severity": 0,
        "seed": 0,
        "split_role": "reported",
        "status": "ok",
        "error": 0.25,
        "num_examples": 4,
        "num_steps": 0,
        "scope": "per_sample",
        "reset": None,
        "predict": None,
        "seconds": 1.0,
        "samples_per_second": 4.0,
        "checkpoint": "c",
    }
    (source / "results.jsonl").write_text(json.dumps(row) + "\n")
    (source / "run.json").write_text(json.dumps({"command": "x", "device": "cpu"}))
    report.export(source, tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["rows"] == [row] and kept["command"] == "x" and kept["device"] == "cpu"
    with pytest.raises(report.ReportError, match="cannot be written"):
        report.export(source, tmp_path / "nowhere" / "kept.json")
