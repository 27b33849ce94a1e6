"""Reading rows for the report: every bad line is named, nothing is dropped in silence."""

import json
import re

import pytest

from experiments import report
from experiments.reporting.rows import ReportError
from tests.experiments.report_pages import (
    make_row,
    page_of,
    put,
)


def test_cut_off_last_line_is_skipped_with_a_note(tmp_path):
    records = [make_row("source", "fog", 0, 0.5)]
    page = page_of(put(tmp_path, records, tail='{"method": "mem'))
    assert "line 2) is cut off and was skipped" in page.text
    # A half character of UTF-8 is no other case.
    (tmp_path / "results.jsonl").write_bytes(json.dumps(records[0]).encode() + b'\n{"m": "\xc3')
    assert "cut off" in report.show(report.write(tmp_path))
    # A last line that lacks only its newline is whole.
    (tmp_path / "results.jsonl").write_text(json.dumps(records[0]))
    assert report.write(tmp_path).notes == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"error": 50.0}, "`error` must be a fraction in [0, 1], got 50.0"),
        ({"error": float("nan")}, "`error` must be a fraction in [0, 1], got nan"),
        ({"error": None}, "a row with status ok needs `error`"),
        ({"error": True}, "`error` must be a fraction"),
        ({"scope": "sample"}, "`scope` must be one of per_sample, batch, stream, got 'sample'"),
        ({"split_role": "test"}, "`split_role` must be one of reported, validation"),
        ({"status": "done"}, "`status` must be one of ok, failed, got 'done'"),
        ({"seed": "0"}, "`seed` must be an integer, got '0'"),
        ({"severity": -1}, "`severity` must be at least 0, got -1"),
        ({"method": ""}, "`method` must be a non-empty string"),
        ({"num_examples": 0}, "`num_examples` must be positive"),
        ({"error_by_step": [0.1, 2]}, "`error_by_step[1]` must be a fraction"),
        ({"error_by_step": [0.1, None]}, "`error_by_step` must hold fractions only"),
        ({"error_by_step": 0.1}, "`error_by_step` must be a non-empty list"),
        ({"seconds": "3"}, "`seconds` must be a number, got '3'"),
    ],
)
def test_malformed_row_names_file_line_and_rule(tmp_path, changes, words):
    good = make_row("source", "fog", 0, 0.5)
    put(tmp_path, [good, {**make_row("memo", "fog", 0, 0.5), **changes}])
    with pytest.raises(ReportError, match=re.escape(words)) as caught:
        report.write(tmp_path)
    assert "results.jsonl, line 2:" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_missing_field_broken_json_and_wrong_type_name_the_line(tmp_path):
    good = make_row("source", "fog", 0, 0.5)
    bad = {name: value for name, value in good.items() if name not in ("scope", "reset")}
    with pytest.raises(ReportError, match=r"line 1: missing `scope`, `reset`"):
        report.write(put(tmp_path, [bad]))
    with pytest.raises(ReportError, match=r"line 1: a row must be a JSON object, got list"):
        report.write(put(tmp_path, [[1]]))
    (tmp_path / "results.jsonl").write_text('{"half": \n' + json.dumps(good) + "\n")
    with pytest.raises(ReportError, match=r"results\.jsonl, line 1: not valid JSON"):
        report.write(tmp_path)


def test_doubled_row_is_named_with_its_lines(tmp_path):
    records = [make_row("source", d, 1, 0.5) for d in ("fog", "snow")]
    with pytest.raises(ReportError, match=r"twice: method=source .*domain=snow.*\(lines 2, 3\)"):
        report.write(put(tmp_path, [*records, records[1]]))
    # The same domain in the other role is another measurement.
    report.write(put(tmp_path, [*records, {**records[1], "split_role": "validation"}]))


def test_broken_side_files_become_notes(tmp_path):
    put(tmp_path, [make_row("source", "fog", 0, 0.5)])
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "selection.json").write_text("[1]")
    page = page_of(tmp_path)
    assert "run.json could not be read" in page.text
    assert "selection.json must hold a JSON object" in page.text
    assert "chosen on the validation corruptions" not in page.text
