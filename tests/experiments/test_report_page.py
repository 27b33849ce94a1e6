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
    for line in re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text, re.S):
        found = re.findall(
            r'data-label="(.*?)".*?>([^<>]*)(?:<small>([^<]*)</small>)?</td>', line[1], re.S
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
    assert '<output id="shown">192 of 204 rows' in dom


def test_the_address_filters_every_part(page):
    dom = opened(page, "#method=rotation&q=fog&measure=gain")
    assert "3 of 204 rows" in dom
    assert cells(dom, "table").keys() == {"rotation"}
    # Source minus rotation: 2 points on seed 0, 4 on seed 1, 6 on seed 2.
    assert cells(dom, "table")["rotation"]["fog"][0] == "4.0"
    assert '<option value="gain"' in dom and "Showing 1 to 3 of 3 entries" in dom


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
    assert errors == ['"56"', '"55"', '"54"']
    (first,) = re.findall(r'data-sorted="(.*?)"', dom)
    assert "56" in first and "55" not in first


def test_a_sweep_shows_maps_links_and_what_validation_chose(tmp_path):
    path = report.write(put_sweep(tmp_path / "sweep", report_rows.grid(400)))[0]
    dom = opened(path, "#chosen=1")
    assert 'data-each="rotation"' in dom and 'href="trials/t0/log.txt"' in dom
    assert cells(dom, "table")["rotation"]["mean"][0] == "30.0"
    assert payload(dom)["axes"] == ["num_steps", "learning_rate"]


def test_marks_of_chance_and_of_no_difference_stand_in_the_cells(tmp_path):
    rows = report_rows.table(domains=("fog", "contrast"))
    for one in rows:
        one |= {"chooses": "error", "chance": 0.9}
        # All are equal on clean images, and at chance under contrast.
        if one["domain"] == "contrast":
            one["error"] = 0.91 if one["method"] == "source" else 0.9
    put_instances(put_run(tmp_path, rows), rows)
    path = report.write(tmp_path)[0]
    dom = opened(path)
    held = cells(dom, "table")
    assert all("\nat chance" in held[method]["contrast"][1] for method in held)
    assert "at chance" not in held["source"]["fog"][1]
    lowest = re.findall(r'<td data-label="(\w+)" class="low"', dom)
    assert "contrast" not in lowest and "clean" not in lowest and "fog" in lowest
    # A gain of 2, 4 and 6 points on fog, and of one on contrast.
    gains = cells(opened(path, "#measure=gain"), "table")
    assert "\nno difference seen" in gains["rotation"]["mean"][1]
    assert "\nno difference seen" not in gains["augmented"]["fog"][1]


@pytest.mark.parametrize("width", [390, 1000, 1400])
def test_nothing_is_cut_off_and_what_scrolls_can_be_reached(page, tmp_path, width):
    (tmp_path / "frame.html").write_text(
        f'<iframe id="phone" src="{page.as_uri()}" width="{width}" height="800"></iframe>'
        "<script>const f = document.getElementById('phone');"
        "const tell = () => { const d = f.contentDocument.documentElement;"
        "if (!d.dataset.ready) return setTimeout(tell, 100);"
        "const told = document.documentElement.dataset; told.ready = 1; told.wide = d.scrollWidth;"
        "const own = (e) => f.contentWindow.getComputedStyle(e).overflowX;"
        "const boxes = [...d.querySelectorAll('main *')].filter((e) => e.clientWidth &&"
        "e.scrollWidth > e.clientWidth + 1 && own(e) !== 'visible');"
        "told.boxes = boxes.filter((e) => own(e) !== 'auto' || e.tabIndex < 0).length;"
        "told.scrolling = boxes.length;"
        "told.charts = [...d.querySelectorAll('canvas')].filter((e) =>"
        f"e.getBoundingClientRect().right > {width}).length; }};"
        "f.onload = tell;</script>"
    )
    dom = opened(tmp_path / "frame.html", "", "--allow-file-access-from-files")
    wide, boxes, scrolling, drawings = (
        int(re.search(rf'data-{name}="(\d+)"', dom)[1])
        for name in ("wide", "boxes", "scrolling", "charts")
    )
    assert wide <= width and boxes == drawings == 0
    assert scrolling == 0 if width == 390 else scrolling > 0
