"""The page in a real, headless browser: no request, no script error, the filter, the means."""

import re
import shutil
import subprocess

import pytest

from experiments.report import __main__ as report, read, table
from tests.experiments import report_rows
from tests.experiments.report_rows import payload, put_instances, put_run, put_sweep

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def opened(path, address="", *options):
    """What the page holds once it is drawn; a script error fails."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=60000", "--enable-logging=stderr", *options]
    command += [f"--user-data-dir={path.parent / 'profile'}", path.as_uri() + address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "data-ready=" in done.stdout, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # Vega warns of charts without an interval.
    assert not [line for line in said if '"WARN ' not in line], said
    return done.stdout


def cells(dom, view, panel="all"):
    """``{method: {column: text}}`` of a table that the page's script made."""
    text = dom[dom.index(f'id="{view}-{panel}"') :]
    text = text[: text.index("</table>")]
    made = {}
    for line in re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text):
        found = re.findall(
            r'data-label="(.*?)".*?>([^<>]*)(?:<small>([^<]*)</small>)?</td>', line[1]
        )
        made[line[0].replace("\u200b", "")] = {name: (mean, half) for name, mean, half in found}
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    rows = report_rows.table()
    put_instances(put_run(folder, rows), rows)
    return report.write(folder)[0]


def test_it_opens_alone_and_has_the_means_and_intervals_of_the_frames(page):
    ask = """<script>const tell = () => { const told = document.documentElement.dataset;
    if (!told.ready) return setTimeout(tell, 50);
    told.asked = performance.getEntriesByType("resource").map((one) => one.name).join(" "); };
    tell();</script></body>"""
    copy = page.with_name("told.html")
    # The libraries speak of "</body>", too.
    copy.write_text(ask.join(page.read_text().rsplit("</body>", 1)))
    dom = opened(copy)
    assert 'data-asked=""' in dom
    held = cells(dom, "table")
    data = table.prepare(read.results(page.parent))
    frames = table.by_domain(data)
    assert len(held) == 4 and len(frames) == 4 * 16
    for _, line in frames.iterrows():
        mean, half = held[line["method"]][line["domain"]]
        assert mean == f"{100 * line['mean']:.1f}"
        assert half == ("" if line["half"] != line["half"] else f" ± {100 * line['half']:.1f}")
    means = {m: values["mean"][0] for m, values in held.items()}
    assert means == {
        line["method"]: f"{100 * line['mean']:.1f}" for _, line in table.means(data).iterrows()
    }
    assert dom.count("<canvas") + dom.count('class="marks"') >= 6
    assert '<output id="shown">128 of 132 rows' in dom


def test_the_address_filters_every_part(page):
    dom = opened(page, "#method=rotation&q=fog&measure=gain")
    assert "2 of 132 rows" in dom
    assert cells(dom, "table").keys() == {"rotation"}
    # Source minus rotation: 2 points on seed 0, 4 on seed 1.
    assert cells(dom, "table")["rotation"]["fog"][0] == "3.0"
    assert '<option value="gain"' in dom and "Showing 1 to 2 of 2 entries" in dom


def test_rows_sort_and_download_as_csv(page):
    ask = """<script>const tell = async () => { const told = document.documentElement.dataset;
    if (!told.ready) return setTimeout(tell, 50);
    const made = []; URL.createObjectURL = (blob) => { made.push(blob); return "#"; };
    HTMLAnchorElement.prototype.click = () => {};
    document.querySelector(".dt-buttons button").click(); told.csv = await made[0].text();
    const heading = [...document.querySelectorAll("#rows thead th")]
      .find((one) => one.textContent.startsWith("error (%)"));
    heading.click(); heading.click();
    setTimeout(() => { told.sorted = document.querySelector("#rows tbody tr").textContent; }, 200);
    }; tell();</script></body>"""
    copy = page.with_name("csv.html")
    copy.write_text(ask.join(page.read_text().rsplit("</body>", 1)))
    dom = opened(copy, "#method=rotation&domain=fog")
    (text,) = re.findall(r'data-csv="(.*?)"', dom, re.S)
    header, *lines = text.replace("&quot;", '"').strip().split("\n")
    assert header.startswith('"method","dataset","domain",') and '"error (%)"' in header
    errors = [line.split(",")[header.split(",").index('"error (%)"')] for line in lines]
    # 38 + 2 * 9 wrong images on seed 0, one less on seed 1.
    assert errors == ['"56"', '"55"']
    (first,) = re.findall(r'data-sorted="(.*?)"', dom)
    assert "56" in first and "55" not in first


def test_a_sweep_shows_maps_links_and_what_validation_chose(tmp_path):
    path = report.write(put_sweep(tmp_path / "sweep", report_rows.grid(400)))[0]
    dom = opened(path, "#chosen=1")
    assert 'data-each="rotation"' in dom and 'href="trials/t0/log.txt"' in dom
    assert cells(dom, "table")["rotation"]["mean"][0] == "30.0"
    assert payload(dom)["axes"] == ["num_steps", "learning_rate"]


def test_nothing_is_cut_off_on_a_phone(page, tmp_path):
    (tmp_path / "frame.html").write_text(
        f'<iframe id="phone" src="{page.as_uri()}" width="390" height="800"></iframe>'
        "<script>const f = document.getElementById('phone');"
        "const tell = () => { const d = f.contentDocument.documentElement;"
        "if (!d.dataset.ready) return setTimeout(tell, 100);"
        "document.documentElement.dataset.ready = 1; document.documentElement.dataset.wide ="
        "d.scrollWidth; }; f.onload = tell;</script>"
    )
    dom = opened(tmp_path / "frame.html", "", "--allow-file-access-from-files")
    assert int(re.search(r'data-wide="(\d+)"', dom)[1]) <= 390
