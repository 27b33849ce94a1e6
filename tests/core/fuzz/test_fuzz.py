"""Every public name times the slips: nothing silent, and no message worse than the table says."""

import importlib
import inspect
import pathlib

import pytest

from experiments.report import headlines
from tests.core.fuzz import outcomes, table

MODULES = (
    *("", "adapters", "audit", "batching", "budget", "checkpoint", "data", "data.corruptions"),
    *(
        "data.streams",
        "data.few_shot",
        "data.grid_rules",
        "data.isomorphism",
        "data.tokenizers",
        "diagnostics",
        "evaluation",
        "inner",
        "kernels.attention",
        "kernels.conv",
        "kernels.ttt_linear",
        "kernels.ttt_mlp",
    ),
    *("generation", "losses", "methods", "metrics", "models", "neighbors", "online"),
    *("optimizers", "passages", "predictors", "readers", "resets", "serving"),
    *("running_statistics", "select", "task", "training", "tuning", "views.augmix", "views.image"),
    *("layers", "layers.inner_losses", "layers.inner_optimizers", "layers.memories"),
    *("layers.retentions", "meta", "views.grid", "views.grid_arrays", "votes"),
)
LEAST_SLIPS = 6


def _is_own(member, module):
    return inspect.isfunction(member) and member.__module__ == module.__name__


def functions(name):
    """``(public name, function)``; classes are records of results, or in the table as well."""
    module = importlib.import_module(f"ttt_jax.{name}".rstrip("."))
    own = [n for n, member in vars(module).items() if _is_own(member, module) and n[0] != "_"]
    for public in getattr(module, "__all__", own):
        member = getattr(module, public)
        if inspect.isroutine(member):
            yield f"{name}.{public}".lstrip("."), member


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_is_in_the_table(module):
    known = {id(call.function) for call in table.CALLS.values()}
    missing = {
        name
        for name, member in functions(module)
        if id(member) not in known and name not in table.NOTHING_TO_SLIP
    }
    assert missing == set()


def test_what_has_nothing_to_slip_takes_nothing():
    for name in table.NOTHING_TO_SLIP:
        module, _, function = name.rpartition(".")
        member = getattr(importlib.import_module(f"ttt_jax.{module}"), function)
        assert not inspect.signature(member).parameters


def test_every_function_has_several_slips():
    few = {
        name: number
        for name, call in table.CALLS.items()
        if (number := sum(1 for _ in outcomes.slips_of(call))) < LEAST_SLIPS
    }
    assert few == {}


def test_nothing_is_silent():
    assert headlines.silent({"rows": table.read()}) == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_page_has_the_sums(when):
    rows = [row for row in table.read() if row.get(f"{when}_calls")]
    sums = [sum(int(row[f"{when}_{column}"]) for row in rows) for column in table.COLUMNS]
    page = pathlib.Path(__file__).parents[3] / "docs" / "contract.md"
    line = " | ".join([str(len(rows)), *(f"{total:,}" for total in sums)])
    assert f"| {line} |" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("part", range(table.PARTS))
def test_outcomes_are_those_of_the_table(part):
    committed = {row["function"]: row for row in table.read()}
    names = list(table.CALLS)[part :: table.PARTS]
    found = table.measured(names)
    wrong = [outcome for outcome in found if outcome.outcome in (outcomes.SILENT, outcomes.UNCLEAR)]
    counts = table.counts(found)
    for name in names:
        for column in (outcomes.SILENT, outcomes.UNCLEAR):
            due = int(committed[name][f"after_{column}"])
            assert counts[name][column] == due, [o for o in wrong if o.function == name]
