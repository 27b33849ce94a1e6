"""Right calls of few-shot tasks, views of grids, and votes."""

import numpy as np

from tests.core.fuzz.calls import Table
from ttt_jax import votes
from ttt_jax.data import few_shot, grid_rules, isomorphism
from ttt_jax.data.few_shot import Example, FewShotTask
from ttt_jax.views import grid as views, grid_arrays
from ttt_jax.votes import Vote

TABLE = Table()
add = TABLE.add
GRID = np.array([[0, 1, 2], [3, 4, 5]])
EXAMPLE = Example(GRID, GRID[:1])
TASK = FewShotTask("task", (EXAMPLE, EXAMPLE._replace(input=GRID.T)), (Example(GRID, GRID[:, 1:]),))
VIEW = views.GridView(5, (0, 3, 2, 1, 4, 5, 6, 7, 8, 9))
NO_VIEWS = (VIEW._replace(symmetry=8), VIEW._replace(colors=(1, 1)))
VOTES = [Vote(GRID, 0), Vote(None, 1), Vote(GRID.T, 1)]
TABLES = {"log_probs": np.log([[0.5, 0.25], [0.75, 0.125]])}


def generator(rng):
    return Example(int(rng.integers(9)), 0)


def accept(example):
    return bool(example.input)


def group(view):
    return view


add("data.few_shot.leave_one_out", few_shot.leave_one_out, task=TASK)
add("data.few_shot.leave_out", few_shot.leave_out, task=TASK, count=1, ranges={"count": (0, 2)})
add(
    "data.few_shot.orders",
    few_shot.orders,
    task=TASK,
    count=2,
    rng=np.random.default_rng(0),
    ranges={"count": (0, 3)},
    only_refusals=True,
)
add(
    "data.few_shot.generated",
    few_shot.generated,
    generator=generator,
    count=3,
    seed=0,
    accept=(accept,),
    most_draws=50,
    ranges={"count": (0, 9), "accept": [0.5], "most_draws": 0},
)
add(
    "data.few_shot.load_arc",
    few_shot.load_arc,
    version="arcagi1",
    split="training",
    ranges={"version": "latest", "split": "test"},
    only_refusals=True,
)
add(
    "data.few_shot.load_bbh",
    few_shot.load_bbh,
    folder="nothing",
    task="word_sorting",
    kinds={"folder": "path"},
    only_refusals=True,
)
add(
    "data.few_shot.load_folder",
    few_shot.load_folder,
    folder="nothing",
    kinds={"folder": "path"},
    only_refusals=True,
)
add(
    "data.grid_rules.draw_rule",
    grid_rules.draw_rule,
    lambda rule: rule(GRID),
    family="shift",
    rng=np.random.default_rng(0),
    ranges={"family": "turn"},
    only_refusals=True,
)
add(
    "data.grid_rules.draw_task",
    grid_rules.draw_task,
    family="fill",
    seed=0,
    demonstrations=2,
    side=3,
    ranges={"family": "turn", "seed": -1, "demonstrations": 0, "side": 1},
)
add(
    "data.isomorphism.canonical",
    isomorphism.canonical,
    example=EXAMPLE,
    ranges={"example": (Example("a", GRID), Example(GRID, None), Example(GRID[:0], GRID))},
)
add(
    "data.isomorphism.leaks",
    isomorphism.leaks,
    training=[TASK],
    evaluation=[TASK],
    kinds={"evaluation": "record"},
    ranges={
        "training": [EXAMPLE],
        "evaluation": [TASK._replace(queries=(Example(GRID, None),))],
    },
)
add(
    "views.grid.apply",
    views.apply,
    view=VIEW,
    grid=GRID,
    ranges={"view": NO_VIEWS, "grid": (GRID + 5, GRID - 1, GRID[:0])},
)
add("views.grid.inverse", views.inverse, view=VIEW, ranges={"view": NO_VIEWS})
add(
    "views.grid.compose",
    views.compose,
    first=VIEW,
    second=VIEW,
    ranges={"first": NO_VIEWS, "second": NO_VIEWS},
)
add(
    "views.grid.draw",
    views.draw,
    rng=np.random.default_rng(0),
    count=3,
    ranges={"count": (0, 10**9), "keep_colors": ((0, 0), (10,), (-1,), (0.5,))},
    only_refusals=True,
)
add(
    "views.grid.random",
    views.random,
    rng=np.random.default_rng(0),
    ranges={"keep_colors": ((0, 0), (10,), (0.5,))},
    only_refusals=True,
)
add(
    "views.grid_arrays.item",
    grid_arrays.item,
    view=VIEW,
    example=EXAMPLE,
    ranges={
        "view": NO_VIEWS,
        "example": Example("a", GRID),
        "number": -1,
    },
    kinds={"tag": None},
)
add(
    "views.grid_arrays.demonstrations",
    grid_arrays.demonstrations,
    task=TASK,
    rng=np.random.default_rng(0),
    rows=1,
    length=64,
    most=2,
    ranges={
        "task": TASK._replace(demonstrations=()),
        "rows": 0,
        "length": (0, 8),
        "most": 0,
        "keep_colors": ((0, 0), (10,)),
        "number": -1,
    },
    only_refusals=True,
)
add(
    "views.grid_arrays.queries",
    grid_arrays.queries,
    task=TASK,
    views=[VIEW],
    length=40,
    count=2,
    ranges={"views": [], "length": (0, 8), "count": 0, "number": -1},
)
add(
    "views.grid_arrays.training_rows",
    grid_arrays.training_rows,
    tasks=[TASK],
    rng=np.random.default_rng(0),
    rows=1,
    length=64,
    most=2,
    ranges={
        "tasks": ([], [TASK._replace(demonstrations=())]),
        "rows": 0,
        "length": (0, 8),
        "most": 0,
        "keep_colors": ((0, 0), (10,)),
        "unknown": (-0.1, 1.1),
    },
    only_refusals=True,
)
add(
    "views.grid_arrays.sizes",
    grid_arrays.sizes,
    tasks=[TASK],
    ranges={"tasks": ([], [TASK._replace(demonstrations=())])},
)
add(
    "views.grid_arrays.answers",
    grid_arrays.answers,
    tokens=np.array([[1, 2, 10, 11]]),
    views=[VIEW],
    ranges={"views": [VIEW, VIEW]},
)
add(
    "views.grid_arrays.answer_length",
    grid_arrays.answer_length,
    task=TASK,
    ranges={"task": TASK._replace(demonstrations=())},
)
add(
    "views.grid.view_task",
    views.view_task,
    view=VIEW,
    task=TASK,
    ranges={"view": NO_VIEWS, "task": FewShotTask("text", (Example("a", "b"),), ())},
)
add("votes.majority", votes.majority, votes=VOTES, ranges={"votes": [GRID], "attempts": 0})
add("votes.shares", votes.shares, votes=VOTES, ranges={"votes": [Vote([1], 0)]})
add(
    "votes.hierarchical",
    votes.hierarchical,
    votes=VOTES,
    group=group,
    kinds={"identity": None},
    ranges={"votes": ([GRID], [Vote("a", 0)]), "attempts": (0, 4), "identity": [0]},
)
add(
    "votes.product_of_experts",
    votes.product_of_experts,
    **TABLES,
    bonus=3.0,
    proposed=np.array([[True, False], [False, False]]),
    ranges={"bonus": -1.0, "proposed": np.ones((3, 2), bool), "log_probs": np.ones((2, 0))},
    # NaN candidates come last by rule.
    allowed="log_probs: nan",
)
add(
    "votes.prefer",
    votes.prefer,
    clone=np.array([[0.5, 0.25], [2.0, 3.0]]),
    source=np.ones(2),
    ranges={"margin": -1.0, "source": np.ones(3)},
    # By rule NaN is no reason to leave the source.
    allowed="clone: nan, source: nan",
)
NOTHING_TO_SLIP = ("views.grid.identity", "views.grid.all_symmetries")
