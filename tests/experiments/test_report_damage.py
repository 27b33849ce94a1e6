"""The report of a folder that lacks something, or has a damaged file."""

import subprocess
import sys

from tests.experiments import called, report_rows

WITHOUT = """
import sys

sys.modules["pyarrow"] = None  # as where it is not installed
from experiments.report import __main__ as report

sys.exit(report.run(sys.argv[1]))
"""


def test_the_page_of_a_run_needs_no_pyarrow(tmp_path):
    """Pandas takes it where it is installed, so a process of its own does without."""
    folder = report_rows.put_run(tmp_path / "run", report_rows.table())
    report_rows.put_instances(folder, report_rows.table())
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folder)],
        cwd=called.ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert (folder / "report.html").exists() and "rotation" in ended.stdout
