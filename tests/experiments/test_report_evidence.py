"""What a report claims: who chose the headline, what a difference rests on, who is at chance."""

import types

import numpy as np
import pandas as pd
import pytest

from experiments import result_rows
from experiments.report import alignment, charts, intervals, notes, page, read, table, terminal
from tests.experiments.report_rows import payload, put_instances, put_run, put_sweep, row
from ttt_jax import metrics
from ttt_jax.task import Examples

ONE_MODEL = "All this is of one model; it says nothing about another one."
HINDSIGHT = "Best in hindsight, picked on these very instances: "


def prepared(folder):
    return table.prepare(read.results(folder))


def made(method, held, error, *, seed=0, domains=("fog", "snow"), **changes):
    """Rows of one validation error, None for no such row, and one reported error."""
    steps = 0 if method in ("source", "augmented") else 1
    more = {"num_steps": steps} | changes
    rows = [row(method, name, seed, error, **more) for name in domains]
    if held is not None:
        rows.append(row(method, "spatter", seed, held, split_role="validation", **more))
    return rows


def lead_of(folder, *parts):
    rows = [one for part in parts for one in part]
    return " ".join(notes.lead(prepared(put_run(folder, rows))))


SOURCE = made("source", 0.5, 0.5)


def test_the_headline_is_what_validation_chose_beside_the_best_in_hindsight(tmp_path):
    text = lead_of(
        tmp_path,
        SOURCE,
        made("rotation", 0.1, 0.40),
        made("memo", 0.2, 0.38),
        made("tta", 0.3, 0.6),
    )
    assert (
        "rotation, chosen on validation among 3 methods adapting to each instance alone: 40.0 %"
        in text
    )
    assert f"{HINDSIGHT}memo, 38.0 %, 2.0 points below rotation (paired" in text
    assert "is the best" not in text
    text = lead_of(tmp_path, SOURCE, made("rotation", 0.1, 0.37), made("memo", 0.2, 0.38))
    assert "It is the best in hindsight, too." in text and HINDSIGHT not in text


def test_every_scope_has_the_choice_of_its_own_validation_rows(tmp_path):
    parts = [made("rotation", 0.1, 0.40), made("memo", 0.2, 0.38)]
    for scope in ("batch", "stream"):
        parts += [
            made(f"{scope}_{n}", held, error, scope=scope)
            for n, (held, error) in enumerate([(0.05, 0.45), (0.3, 0.2)])
        ]
    parts.append(made("augmented", 0.6, 0.3))
    text = lead_of(tmp_path, SOURCE, *parts)
    for words in (
        "rotation, chosen on validation among 2 methods adapting to each instance alone",
        "batch_0, chosen on validation among 2 methods adapting to a batch",
        "stream_0, chosen on validation among 2 methods carrying on along a stream",
        "source, chosen on validation among 2 methods without a gradient step: 50.0 %",
        f"{HINDSIGHT}augmented, 30.0 %, 20.0 points below source",
        "10.0 points below source (paired",
    ):
        assert words in text, words


def test_without_validation_rows_nothing_was_chosen(tmp_path):
    parts = [made("source", None, 0.5), made("rotation", None, 0.4), made("memo", None, 0.3)]
    text = lead_of(tmp_path, *parts)
    assert "Of 2 methods adapting to each instance alone nothing was chosen on validation. " in text
    assert f"{HINDSIGHT}memo: 30.0 %, 20.0 points below source" in text
    assert "chosen on validation among" not in text


def test_validation_rows_that_are_fewer_choose_nothing(tmp_path):
    parts = [made("rotation", 0.2, 0.4), made("rotation", 0.2, 0.4, seed=1), made("memo", 0.1, 0.3)]
    parts.append([r | {"split_role": "reported"} for r in made("memo", None, 0.3, seed=1)])
    assert "rotation, chosen on validation among 2" in lead_of(tmp_path, SOURCE, *parts)


def test_ties_on_validation_are_said(tmp_path):
    text = lead_of(tmp_path, SOURCE, made("memo", 0.1, 0.4), made("rotation", 0.1, 0.3))
    assert "memo, chosen on validation among 2 methods" in text
    assert "(as good there: rotation): 40.0 %" in text and f"{HINDSIGHT}rotation, 30.0 %" in text


def test_a_choice_that_failed_on_reported_rows_stays_the_choice(tmp_path):
    lost = [
        r | ({} if r["split_role"] == "validation" else {"status": "failed", "error": None})
        for r in made("rotation", 0.1, 0.4)
    ]
    text = lead_of(tmp_path, SOURCE, lost, made("memo", 0.2, 0.3))
    assert "rotation, chosen on validation among 2 methods adapting" in text
    assert "has no reported row." in text and "memo" not in text


def test_the_headline_follows_the_measure_that_chooses(tmp_path):
    def of(method, held, bits):
        rows = made(method, held, bits, chooses="bits_per_byte", domains=("old", "new"))
        for one in rows:
            one["bits_per_byte"] = one.pop("error")
        return rows

    text = lead_of(tmp_path, of("source", 3.0, 3.0), of("next", 2.0, 2.6), of("memory", 2.5, 2.5))
    assert "next, chosen on validation among 2 methods" in text and ": 2.600, 0.400 below" in text
    assert f"{HINDSIGHT}memory, 2.500, 0.100 below next" in text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (0.52, "raises it from 50.0 ± 0.0 % (source) to 52.0 ± 0.0 %: 2.0 ± 0.0 points above"),
        (0.48, "lowers it from 50.0 ± 0.0 % (source) to 48.0 ± 0.0 %: 2.0 ± 0.0 points below"),
        (0.50, ": 50.0 ± 0.0 %, no difference seen from source (0.0 ± 0.0 points above"),
    ],
)
def test_the_only_adapted_method_is_no_best(tmp_path, error, words):
    parts = [
        made(m, None, e, seed=s)
        for m, e in {"source": 0.5, "rotation": error}.items()
        for s in range(3)
    ]
    text = lead_of(tmp_path, *parts)
    assert (
        f"rotation, the only method adapting to each instance alone{', ' * (error != 0.5)}" in text
    )
    assert words in text and "best" not in text


def test_a_sweep_chooses_settings_and_method_on_validation(tmp_path):
    def trial(method, rate, held, error):
        settings = {"settings": {"learning_rate": rate}} if rate else {}
        return made(method, held, error, **settings)

    trials = {"methods=source": trial("source", None, 0.5, 0.5)}
    for method, rate, held, error in (
        ("rotation", 0.1, 0.2, 0.40), ("rotation", 0.2, 0.3, 0.10),
        ("memo", 0.1, 0.25, 0.35), ("memo", 0.2, 0.4, 0.05),
    ):  # fmt: skip
        trials[f"methods={method} rate={rate}"] = trial(method, rate, held, error)
    text = " ".join(notes.lead(prepared(put_sweep(tmp_path, trials))))
    # The lowest reported error of all trials, 5 %, and of rotation's, 10 %, are no one's headline.
    assert "rotation, chosen on validation among 2 methods adapting" in text
    assert "40.0 %, 10.0 points below source" in text and f"{HINDSIGHT}memo, 35.0 %" in text


def test_a_sweep_without_validation_rows_is_compared_over_all_settings(tmp_path):
    trials = {"methods=source": made("source", None, 0.5)}
    for n, error in enumerate((0.4, 0.3, 0.2)):
        trials[f"rate={n}"] = made("rotation", None, error, settings={"learning_rate": n})
    data = prepared(put_sweep(tmp_path, trials))
    text = " ".join(notes.lead(data))
    assert "over 2 domains, of all settings." in text and "chose" not in text
    assert table.difference(data, "rotation", "source")["mean"] == pytest.approx(-0.2)
    assert table.difference(data, "rotation", "source")["rows"] == 2


def test_rows_are_paired_by_their_tags(tmp_path):
    def of(method, errors):
        more = {"stream": "frames", "tags": ["shift"], "num_examples": 50}
        return [row(method, None, 0, error, shift=k, **more) for k, error in errors.items()]

    rows = of("source", {"dark": 0.2, "far": 0.6}) + of("rotation", {"dark": 0.1, "far": 0.4})
    data = prepared(put_run(tmp_path, rows))
    assert data.frame["place"].nunique() == 2
    assert data.frame["gain"].tolist() == pytest.approx([0, 0, 0.1, 0.2])
    assert table.difference(data, "rotation", "source")["mean"] == pytest.approx(-0.15)


def test_the_interval_covers_the_mean_over_new_seeds_and_new_instances():
    rng = np.random.default_rng(0)
    num_seeds, count, covered = 4, 50, []
    for _ in range(400):
        values = rng.normal(size=(num_seeds, 1)) * 0.1 + rng.normal(size=(1, count))
        values = values + rng.normal(size=(num_seeds, count))
        weights = rng.multinomial(count, np.full(count, 1 / count), 100) / count
        half, basis, within = intervals._half(values.mean(1), list(values @ weights.T))
        assert basis == "seeds and instances" and within < half
        covered.append(abs(values.mean()) <= half)
    assert 0.94 <= np.mean(covered) < 1


def test_several_models_of_one_seed_are_one_seed(tmp_path):
    rows = [one | {"checkpoint": one["domain"]} for one in (*SOURCE, *made("memo", 0.2, 0.3))]
    text = lead_of(tmp_path, rows)
    assert text.endswith("All this is of one seed; it says nothing about another one.")


def test_a_measure_that_nobody_says_chooses_has_no_headline(tmp_path):
    rows = made("source", 0.5, 0.5) + made("memo", 0.9, 0.9) + made("rotation", 0.1, 0.1)
    for one in rows:
        one["accuracy"] = one.pop("error")
    data = prepared(put_run(tmp_path, rows))
    text = " ".join(notes.lead(data))
    assert "No row says which measure chooses" in text and "rotation" not in text
    assert "*" not in terminal.error_table(data) and data.frame["chosen"].all()
    assert payload(page.render(data, name="run"))["primary"] == ""


def seeds_of(errors, **changes):
    return [
        one
        for seed, (source, rotation) in enumerate(errors)
        for method, error in (("source", source), ("rotation", rotation))
        for one in made(method, None, error, seed=seed, **changes)
    ]


def test_a_difference_is_over_seeds_and_instances(tmp_path):
    rows = seeds_of([(0.50, 0.46), (0.50, 0.44), (0.50, 0.42)])
    put_instances(put_run(tmp_path, rows), rows)
    line = table.difference(prepared(tmp_path), "rotation", "source")
    assert line["mean"] == pytest.approx(-0.06) and line["basis"] == "seeds and instances"
    of_seeds = 4.303 * 0.02 / 3**0.5
    assert line["half"] == pytest.approx(np.hypot(of_seeds, line["within"])) and line["within"] > 0
    text = " ".join(notes.lead(prepared(tmp_path)))
    assert "6.0 ± 6." in text and "no difference seen from source" in text
    assert "interval over seeds and instances" in text and ONE_MODEL not in text


def test_one_seed_is_one_model(tmp_path):
    rows = seeds_of([(0.50, 0.40)])
    put_instances(put_run(tmp_path, rows), rows)
    text = " ".join(notes.lead(prepared(tmp_path)))
    assert "paired, interval over instances)" in text and text.endswith(ONE_MODEL)
    # Nor do several seeds of one checkpoint say more.
    assert ONE_MODEL in lead_of(tmp_path / "shared", seeds_of([(0.5, 0.4)] * 3, checkpoint="one"))


@pytest.mark.parametrize(("count", "basis"), [(1, ""), (2, ""), (3, "seeds")])
def test_without_instances_an_interval_takes_three_seeds(tmp_path, count, basis):
    rows = seeds_of([(0.50, 0.40), (0.52, 0.41), (0.51, 0.43)][:count])
    data = prepared(put_run(tmp_path, rows))
    line = table.difference(data, "rotation", "source")
    assert line["basis"] == basis and np.isnan(line["half"]) == (not basis)
    said = intervals.NO_INTERVAL if not basis else "interval over seeds"
    assert f"(paired, {said})" in " ".join(notes.lead(data))


def test_a_gain_without_source_rows_is_paired_too(tmp_path):
    put_run(tmp_path, [row("memo", "fog", 0, 0.4, turned_right=0.2, turned_wrong=0.05)])
    (tmp_path / "instances").mkdir()
    right, wrong = np.arange(100) < 20, np.arange(100) >= 95
    np.savez(
        tmp_path / "instances" / "memo.npz",
        id=np.arange(100),
        sums=np.stack([right, wrong], 1).astype(float),
        metrics=np.array(["turned_right", "turned_wrong"]),
        **{"method": "memo", "stream": "fog", "seed": 0, "role": "reported"},
    )
    (line,) = table.means(prepared(tmp_path), "gain").to_dict("records")
    # Of each image 1, 0 or -1.
    error = ((right * 1.0 - wrong).var() / 100) ** 0.5
    assert line["mean"] == pytest.approx(0.15) and line["basis"] == "instances"
    assert line["half"] == pytest.approx(1.96 * error, rel=0.25)


def test_gains_of_a_diagnosis_have_paired_intervals():
    rows = [{"gain": g, "turned_right": g + 0.02, "turned_wrong": 0.02} for g in (0.04, 0.01)]
    shown = alignment.cells(pd.DataFrame(rows).assign(num_examples=400))["gain (points)"]
    # Of 400 images 24 right and 8 wrong: the variance of one is 0.08 - 0.04 ** 2.
    assert shown.tolist() == ["4.00 ± 2.74", "1.00 ± 2.19 (no difference seen)"]


def test_trials_of_a_sweep_have_instances_of_their_own(tmp_path):
    trials = {
        f"seeds={s}": [r for r in seeds_of([(0.5, 0.4)] * 2) if r["seed"] == s] for s in (0, 1)
    }
    put_sweep(tmp_path, trials)
    for n, rows in enumerate(trials.values()):
        put_instances(tmp_path / "trials" / f"t{n}", rows)
    line = table.difference(prepared(tmp_path), "rotation", "source")
    assert line["basis"] == "seeds and instances" and line["mean"] == pytest.approx(-0.1)


def test_no_difference_seen_stands_wherever_a_gain_does(tmp_path):
    rows = seeds_of([(0.50, 0.45), (0.50, 0.50), (0.50, 0.52)])
    data = prepared(put_run(tmp_path / "run", rows))
    lines = charts.lines_of(
        data, charts.views(data)[0], "gain", role="reported", names={"price": "cost"}
    )
    assert lines.set_index("method")["remark"]["rotation"] == intervals.UNSEEN
    assert "remark" in charts.figure(data, "means", "gain").to_json()
    sweep = prepared(put_sweep(tmp_path / "sweep", {"seeds=0": rows}))
    assert "(no difference seen)" in terminal.render(sweep)
    assert "no difference seen from source" in " ".join(notes.lead(sweep))


def at_level(errors, chance=0.9):
    return [
        row(method, domain, 0, error, num_steps=method != "source", chooses="error", chance=chance)
        for method, values in errors.items()
        for domain, error in values.items()
    ]


def test_a_method_at_chance_is_marked_and_never_the_lowest(tmp_path):
    rows = at_level(
        {"source": {"fog": 0.5, "contrast": 0.92}, "memo": {"fog": 0.4, "contrast": 0.87}}
    )
    put_instances(put_run(tmp_path, rows), rows)
    data = prepared(tmp_path)
    text = terminal.error_table(data)
    assert "92.0~" in text and "87.0~" in text and "40.0*" in text and "50.0 " in text
    lines = table.by_domain(data).set_index(["domain", "method"])
    assert intervals.at_chance(lines).to_dict() == {
        ("fog", "source"): False, ("fog", "memo"): False,
        ("contrast", "source"): True, ("contrast", "memo"): True,
    }  # fmt: skip
    chart = charts.figure(data, "domains").to_dict()
    (shown,) = chart["datasets"].values()
    remarks = {(one["method"], one["domain"]): one["remark"] for one in shown}
    assert remarks["memo", "contrast"] == "at chance" and remarks["memo", "fog"] == ""
    assert not intervals.at_chance(table.by_domain(data, "seconds")).any()
    assert not [name for name in data.results.measures if name == "chance"]


def test_the_headline_says_that_it_is_at_chance(tmp_path):
    rows = at_level({"source": {"fog": 0.91}, "memo": {"fog": 0.92}})
    text = " ".join(notes.lead(prepared(put_run(tmp_path, rows))))
    assert ": 92.0 % (at chance: a constant answer has 90.0 %), 1.0 points above source" in text


def test_rows_that_do_not_know_chance_have_no_mark(tmp_path):
    rows = at_level({"source": {"fog": 0.91}, "memo": {"fog": 0.92}}, chance=None)
    assert "~" not in terminal.error_table(prepared(put_run(tmp_path, rows)))


def test_cells_that_are_all_equal_are_not_marked(tmp_path):
    rows = at_level({m: {"fog": 0.3, "snow": e} for m, e in (("source", 0.4), ("memo", 0.2))})
    lines = table.by_domain(prepared(put_run(tmp_path, rows)))
    marked = {d: [*table.marked(part)["method"]] for d, part in lines.groupby("domain")}
    assert marked == {"fog": [], "snow": ["memo"]}


def test_the_chance_level_is_that_of_the_best_constant_answer():
    error = metrics.error()
    assert error.chance(np.array([0, 1, 1, 2, 1])) == pytest.approx(0.4)
    assert metrics.error(label="kind").chance({"kind": np.array([3, 3, 1, 2])}) == 0.5
    assert metrics.mean(lambda *_: 0).chance is None

    known = {"error": error, "mse": metrics.mean(lambda *_: 0)}
    task = types.SimpleNamespace(metrics=known, chooses="error")
    tags = np.array(["fog", "snow", "fog", "snow", "snow"])
    y = np.array([0, 1, 1, 1, 2])
    whole = Examples(np.arange(5), np.zeros((5, 2)), y, {"domain": tags})
    batches = [Examples(*(part[:3] for part in whole[:3]), {"domain": tags[:3]})]
    batches.append(Examples(*(part[3:] for part in whole[:3]), {"domain": tags[3:]}))
    # Of fog a class each; of snow two of three are of one.
    levels = [one["chance"] for one in result_rows.chances(task, batches)]
    assert levels == pytest.approx([0.5, 1 / 3])
    task.chooses = "mse"
    assert result_rows.chances(task, batches) == [{}, {}]
