"""The page of a sweep in a real, headless browser."""

import io

import PIL.Image
import pytest

from experiments import browser, report, synthetic_sweep
from tests.experiments.sweep_folders import failed, put, row

pytestmark = pytest.mark.skipif(browser.find() is None, reason="chromium is not installed")

# Two seeds, two domains, two step sizes; every mean that a test looks for is worked out by hand.
SMALL = {
    "seeds=0 methods=source": [
        row("source", "fog", 0, 0.5),
        row("source", "snow", 0, 0.3),
        row("source", "spatter", 0, 0.4, split_role="validation"),
    ],
    "seeds=1 methods=source": [row("source", "fog", 1, 0.7), row("source", "snow", 1, 0.3)],
    "seeds=0 rate=0.01": [
        row("memo", "fog", 0, 0.2, rate=0.01, steps=1),
        row("memo", "snow", 0, 0.4, rate=0.01, steps=1),
        row("memo", "spatter", 0, 0.35, rate=0.01, steps=1, split_role="validation"),
    ],
    "seeds=1 rate=0.01": [
        row("memo", "fog", 1, 0.4, rate=0.01, steps=1),
        row("memo", "snow", 1, 0.2, rate=0.01, steps=1),
    ],
    "seeds=0 rate=0.1": [
        row("memo", "fog", 0, 0.1, rate=0.1, steps=1, seconds=None),
        row("memo", "spatter", 0, 0.45, rate=0.1, steps=1, split_role="validation"),
    ],
    "seeds=1 methods=memo domains=fog": [],
    "seeds=1 rate=<script>window.hacked=1</script>": [],
}
HOSTILE = "<img src=x onerror='window.hacked=1'> after 12 s"
STATES = {
    "seeds=1 methods=memo domains=fog": failed("ended after 345 s"),
    "seeds=1 rate=<script>window.hacked=1</script>": failed(HOSTILE),
}


@pytest.fixture(scope="module")
def window():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = put(tmp_path_factory.mktemp("small"), SMALL, states=STATES)
    return report.write_sweep(folder)[0]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "sweep"
    synthetic_sweep.make(folder, 2000)
    return report.write_sweep(folder)[0]


@pytest.fixture(autouse=True)
def plain_window(window):
    window.errors.clear()
    window.requests.clear()
    yield
    assert window.errors == []
    window.resize(1400, 900)
    window.scheme("light")


def texts(window, selector):
    return window.evaluate(
        f"[...document.querySelectorAll({selector!r})].map(one => one.textContent)"
    )


def cells(window, name):
    """A column of the table of rows, as shown."""
    heads = window.evaluate(
        "[...document.querySelectorAll('[data-sort]')].map(b => b.dataset.sort)"
    )
    place = heads.index(name) + 1
    return texts(window, f"table.rows tbody tr td:nth-child({place})")


def shown(window):
    return texts(window, "#shown b")[0]


def choose(window, control, value):
    window.evaluate(
        f"(() => {{ const one = document.getElementById({control!r}); one.value = {value!r};"
        " one.dispatchEvent(new Event('change')); })()"
    )
    window.settle()


def click(window, selector):
    window.evaluate(f"document.querySelector({selector!r}).click()")
    window.settle()


def test_it_opens_from_a_file_and_asks_for_nothing_else(window, small):
    window.open(small)
    assert {url for url in window.requests if url != "about:blank"} == {small.as_uri()}
    # Nine reported rows and two of trials that failed, which are in either role.
    assert shown(window) == "11 of 14 rows"
    assert len(cells(window, "method")) == 11
    assert "7 of 7 trials" in texts(window, "#shown")[0]


def test_texts_of_anyone_stay_texts(window, small):
    window.open(small)
    window.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    window.wait("document.querySelectorAll('#failures table').length === 2")
    assert window.evaluate("window.hacked") is None
    assert any(HOSTILE in text for text in texts(window, "#failures summary"))
    assert "seeds=1 rate=<script>window.hacked=1</script>" in texts(window, "#failures td")
    assert "seeds=1 rate=<script>window.hacked=1</script>" in cells(window, "label")


def test_typing_filters_all_views(window, small):
    window.open(small)
    window.evaluate("document.getElementById('q').focus()")
    window.type("RATE=0.01 snow")
    window.settle()
    assert shown(window) == "2 of 14 rows"
    assert cells(window, "domain") == ["snow", "snow"] and cells(window, "method") == ["memo"] * 2
    assert texts(window, "#bars h3") == ["snow"]
    assert texts(window, "#failures [data-body]") == ["No row that passes the filter failed."]
    assert window.evaluate("location.hash") == "#q=RATE%3D0.01+snow"
    # What is typed on goes on where it was.
    window.type("ball")
    window.settle()
    assert shown(window) == "0 of 14 rows"
    assert texts(window, "#table [data-body]") == ["No row passes the filter."]
    click(window, "#reset")
    assert shown(window) == "11 of 14 rows" and window.evaluate("location.hash") == ""


def test_choices_filter_by_column(window, small):
    window.open(small)
    choose(window, "choice-method", "memo")
    assert shown(window) == "6 of 14 rows"
    choose(window, "choice-seed", "0")
    choose(window, "choice-learning_rate", "0.1")
    assert cells(window, "error") == ["10.00"]
    choose(window, "choice-learning_rate", "")
    choose(window, "choice-seed", "")
    choose(window, "choice-status", "failed")
    # The one whose label names its method and domain.
    assert cells(window, "domain") == ["fog"] and cells(window, "seed") == ["1"]


def test_the_address_presets_filter_and_order(window, small):
    window.open(small, "#q=fog&sort=error&dir=desc&method=memo")
    assert cells(window, "error") == ["40.00", "20.00", "10.00", "–"]
    assert window.evaluate("document.getElementById('q').value") == "fog"
    # What is no choice is no error.
    window.open(small, "#method=none&sort=colour&page=-3&size=7&role=valueOf&dir=up&valueOf=1")
    assert shown(window) == "11 of 14 rows"
    window.evaluate("location.hash = '#domain=snow'")
    window.wait("document.querySelector('#shown b').textContent.startsWith('4 ')")


def test_sorting_up_down_and_back_with_missing_values_last(window, small):
    window.open(small)
    errors = ["50.00", "30.00", "70.00", "30.00", "20.00", "40.00", "40.00", "20.00", "10.00"]
    assert cells(window, "error") == [*errors, "–", "–"]
    click(window, "[data-sort=error]")
    ordered = sorted(errors)
    assert cells(window, "error") == [*ordered, "–", "–"]
    state = "document.querySelector('[data-sort=error]').parentElement.getAttribute('aria-sort')"
    assert window.evaluate(state) == "ascending"
    click(window, "[data-sort=error]")
    assert cells(window, "error") == [*ordered[::-1], "–", "–"]
    assert window.evaluate(state) == "descending"
    # Ties stay in the order of the sweep: both have 30 %.
    assert cells(window, "domain")[4:6] == ["snow", "snow"]
    assert cells(window, "seed")[4:6] == ["0", "1"]
    click(window, "[data-sort=error]")
    assert cells(window, "error") == [*errors, "–", "–"] and window.evaluate(state) == "none"
    click(window, "[data-sort=domain]")
    # The benchmark's order: snow comes before fog there.
    assert cells(window, "domain") == ["snow"] * 4 + ["fog"] * 6 + ["–"]


def test_headings_are_pressed_from_the_keyboard_and_keep_the_focus(window, small):
    window.open(small)
    window.evaluate("document.querySelector('[data-sort=seed]').focus()")
    window.press("Tab")
    assert window.evaluate("document.activeElement.dataset.sort") == "status"
    window.press("Tab")
    window.press("Enter")
    window.settle()
    assert cells(window, "error")[0] == "10.00"
    assert window.evaluate("document.activeElement.dataset.sort") == "error"


def test_heat_map_holds_means_counts_and_gaps(window, small):
    window.open(small)
    assert texts(window, "#heat h3") == ["memo"]
    # 0.01: (0.2 + 0.4 + 0.4 + 0.2) / 4; 0.1 was run on one domain and seed of four.
    assert texts(window, "#heat tbody tr") == ["0.0130.0n 4", "0.110.0†n 1"]
    assert texts(window, "#heat thead tr") == ["rate \\ steps1"]
    assert texts(window, ".legend")[0].startswith("10.0 %30.0 %")
    # Reported rows choose nothing: no cell is framed, though both are over the same images here.
    window.open(small, "#seed=0&domain=fog")
    assert texts(window, "#heat tbody tr") == ["0.0120.0n 1", "0.110.0n 1"]
    assert texts(window, "td.lowest") == []
    window.open(small)
    choose(window, "role", "validation")
    assert texts(window, "#heat tbody tr") == ["0.0135.0n 1", "0.145.0n 1"]
    assert texts(window, "td.lowest") == ["35.0n 1"]
    assert "Settings may be chosen on them" in texts(window, "#shown")[0]
    assert cells(window, "domain") == ["spatter"] * 3 + ["fog", "–"]


def test_bars_are_means_over_seeds_with_their_standard_errors(window, small):
    window.open(small, "#learning_rate=0.01")
    assert texts(window, "#bars h3") == ["snow", "fog"]
    # Two values: mean, and half their distance.
    assert texts(window, "#bars tbody tr") == ["memo30.0 ± 10.0", "memo30.0 ± 10.0"]
    window.open(small)
    # Seed 0 has 0.2 and 0.1 on fog, mean 0.15; seed 1 has 0.4: 0.275 ± 0.125.
    snow, fog = ["source30.0 ± 0.0", "memo30.0 ± 10.0"], ["source60.0 ± 10.0", "memo27.5 ± 12.5"]
    assert texts(window, "#bars tbody tr") == [*snow, *fog]
    widths = window.evaluate("[...document.querySelectorAll('.fill')].map(one => one.style.width)")
    # The longest bar and its standard error, 0.6 + 0.1, fill the width.
    assert [float(width.strip("%")) for width in widths] == pytest.approx(
        [300 / 7, 300 / 7, 600 / 7, 275 / 7], abs=1e-3
    )
    window.open(small, "#seed=0")
    assert "±" not in "".join(texts(window, "#bars tbody tr"))


def test_cost_and_gain_are_of_rows_with_a_baseline(window, small):
    window.open(small)
    values = texts(window, "#cost td")
    # Gains of memo: seed 0 0.3, -0.1 and 0.4, mean 0.2; seed 1 0.3 and 0.1, mean 0.2. One of five
    # is worse. A step is 2 forwards and a backward, that is 4; 2 s for 100 images.
    assert values == ["4", "0.0 ± 0.0", "0 %", "1", "20", "5", "+20.0 ± 0.0", "20 %", "4", "20"]
    assert "3 choices of settings" in texts(window, "#cost figcaption")[0]
    window.evaluate(
        "(() => { const one = document.querySelector('#cost canvas');"
        " const box = one.getBoundingClientRect();"
        " for (let x = 0; x < box.width; x += 5) for (let y = 0; y < box.height; y += 5) {"
        "  one.dispatchEvent(new PointerEvent('pointermove',"
        "   {clientX: box.left + x, clientY: box.top + y}));"
        "  const says = document.querySelector('#cost figcaption').textContent;"
        "  if (says.includes('rate 0.1')) { window.said = says; return; }"
        " } })()"
    )
    said = "memo, learning rate 0.1, steps 1, gain +40.00 points, cost 4, 1 row"
    assert window.evaluate("window.said") == said
    choose(window, "price", "milliseconds")
    # The row without seconds has no such cost: its settings are no point.
    assert "2 choices of settings" in texts(window, "#cost figcaption")[0]


def test_settings_chosen_on_validation_rows(window, small):
    window.open(small)
    click(window, "#chosen")
    # 0.01 has 0.35 on the validation rows, 0.1 has 0.45; failed trials have no settings.
    assert shown(window) == "8 of 14 rows"
    assert {*cells(window, "learning_rate")} == {"0.01", "–"}
    # A search for fog shows no validation row, and changes no choice.
    choose(window, "choice-domain", "fog")
    assert cells(window, "error") == ["50.00", "70.00", "20.00", "40.00"]


def test_failures_stand_together_by_message(window, large):
    window.open(large)
    found = texts(window, "#failures summary")
    assert len(found) == len(synthetic_sweep.MESSAGES)
    counts = [int(text.split()[0]) for text in found]
    assert counts == sorted(counts, reverse=True)
    assert f"{sum(counts)}failed" in texts(window, ".tile")[2]
    assert texts(window, "#failures table") == []
    window.evaluate("document.querySelector('#failures details').open = true")
    window.wait("document.querySelector('#failures table') !== null")
    assert len(texts(window, "#failures tbody tr")) == counts[0]


def test_a_large_sweep_shows_a_page_of_rows_at_a_time(window, large):
    window.open(large)
    total = int(shown(window).split()[0].replace(",", ""))
    assert total > 4000 and len(cells(window, "trial")) == 25
    first = cells(window, "trial")
    click(window, "[data-page=next]")
    assert "page 2 of" in texts(window, ".pager")[0] and cells(window, "trial") != first
    choose(window, "size", "200")
    assert len(cells(window, "trial")) == 200
    click(window, "[data-page=last]")
    assert len(cells(window, "trial")) == (total % 200 or 200)
    assert window.evaluate("document.querySelector('[data-page=next]').disabled")
    # A filter begins on its first page.
    choose(window, "choice-method", "source")
    assert len(cells(window, "trial")) == 45
    assert window.evaluate("document.querySelectorAll('*').length") < 6000


@pytest.mark.parametrize("width", [1400, 360])
def test_the_page_never_scrolls_sideways(window, large, tmp_path, width):
    # Words as long as a line, wherever names stand.
    rows = [row("tuned_" * 12, "shifted_" * 12, 0, 0.5, dataset="set_" * 20, rate=0.1, steps=1)]
    rows.append({**rows[0], "method": "source", "domain": "far_" * 20, "dataset": "other"})
    label = "note=" + "long_" * 30
    put(tmp_path, {label: rows, "seeds=1": []}, states={"seeds=1": failed("word_" * 40)})
    window.resize(width, 800)
    for path in (report.write_sweep(tmp_path)[0], large):
        window.open(path)
        assert window.evaluate("document.documentElement.scrollWidth") <= width


_CONTRAST = """
(() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (color) => {
    paint.fillStyle = color;
    paint.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map((v) => {
      const c = v / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll("td.heat")].map((cell) => {
    const style = getComputedStyle(cell);
    const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_on_the_heat_map_are_legible(window, large, scheme):
    window.scheme(scheme)
    window.open(large)
    # The least that WCAG 2.1 asks for, at level AA.
    contrasts = window.evaluate(_CONTRAST)
    assert len(contrasts) > 100 and min(contrasts) > 4.5


def test_screenshots_in_light_and_dark_differ_and_are_not_empty(window, large, tmp_path):
    colors = {}
    for scheme in ("light", "dark"):
        window.scheme(scheme)
        window.open(large)
        window.screenshot(tmp_path / "page.png")
        picture = PIL.Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB")
        assert picture.height > 2000
        colors[scheme] = picture.getpixel((3, 3))
        assert len(picture.getcolors(1 << 24)) > 100
    assert colors["light"] == (255, 255, 255) and max(colors["dark"]) < 60


def test_without_scripts_the_means_are_there(small):
    text = small.read_text()
    hidden = text[text.index("<noscript>") : text.index("</noscript>")]
    assert "memo" in hidden and "14 rows" in hidden
