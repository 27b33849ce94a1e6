"""The problems of reinforcement: right by themselves, apart from the training, read as they are."""

import functools
import itertools
import re

import jax
import ml_collections
import numpy as np
import pytest

from benchmarks import reinforcement, reinforcement_problems
from benchmarks.reinforcement_problems import ALPHABET, FAMILIES
from experiments import launch
from ttt_jax.generation import Generated


def text_of(tokens):
    return "".join(ALPHABET[token] for token in tokens)


PRODUCTS = {
    "chains": lambda a, b: a * b % 10,
    "squares": lambda a, b: reinforcement_problems.square(a, b),
}


def step_result(name, left, sign, right):
    """A step of a chain."""
    if sign == "*":
        return PRODUCTS[name](int(left), int(right))
    return (int(left) + (1 if sign == "+" else -1) * int(right)) % 10


def chain_result(name, prompt):
    """From left to right."""
    value = int(prompt[0])
    for sign, digit in re.findall(r"([-+*])(\d)", prompt):
        value = step_result(name, value, sign, digit)
    return value


def sequence_result(prompt):
    """The ninth of digits that grow by two steps in turn."""
    shown = np.array([int(digit) for digit in re.findall(r"\d", prompt)])
    assert len(shown) == 5
    growth = np.diff(shown) % 10
    assert (growth[:2] == growth[2:]).all()
    return int((shown[0] + 4 * growth[:2].sum()) % 10)


RESULTS = {name: functools.partial(chain_result, name) for name in PRODUCTS}
RESULTS["sequences"] = sequence_result


def test_a_square_has_every_digit_once_in_each_row_and_column():
    table = np.array([[reinforcement_problems.square(a, b) for b in range(10)] for a in range(10)])
    for lines in (table, table.T):
        np.testing.assert_array_equal(np.sort(lines, axis=1), np.tile(np.arange(10), (10, 1)))


@pytest.mark.parametrize("name", FAMILIES)
def test_solutions_are_right_and_of_one_length(name):
    rng, family = np.random.default_rng(0), FAMILIES[name]
    for rare in (0.0, 0.3, 1.0):
        for _ in range(100):
            problem = family.draw(rng, rare)
            assert (len(problem.prompt), len(problem.solution)) == (family.prompt, family.solution)
            assert problem.answer == RESULTS[name](problem.prompt)
            assert set(problem.prompt + problem.solution) <= set(ALPHABET)


def test_every_step_of_a_chain_is_right():
    rng = np.random.default_rng(0)
    for _ in range(100):
        solution = reinforcement_problems.draw_chain(rng, 0.5).solution
        for step in solution.rstrip(";").split(","):
            left, right = step.split("=")
            assert eval(left) % 10 == int(right)


@pytest.mark.parametrize(
    ("name", "rare"), [("chains", lambda p: p.count("*") / 3), ("sequences", lambda p: _large(p))]
)
def test_the_share_of_the_rare_operation_is_the_difficulty(name, rare):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.25, 1.0):
        drawn = [rare(FAMILIES[name].draw(rng, share).prompt) for _ in range(400)]
        assert np.mean(drawn) == pytest.approx(share, abs=0.05)


def slipped(name, problem):
    """Whether the steps that the solution writes are another's than the prompt's."""
    if "=" in problem.solution:
        steps = problem.solution.rstrip(";").split(",")
        return [step_result(name, *step[:3]) != int(step[-1]) for step in steps]
    shown = np.diff([int(digit) for digit in re.findall(r"\d", problem.prompt)][:3]) % 10
    return [int(sign) != step for sign, step in zip(problem.solution[:2], shown, strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_slips_are_of_the_rare_operation_alone(name):
    rng, family = np.random.default_rng(0), FAMILIES[name]
    slips = np.concatenate([slipped(name, family.draw(rng, 1.0, 0.4)) for _ in range(300)])
    assert slips.mean() == pytest.approx(0.4, abs=0.05)
    assert not any(any(slipped(name, family.draw(rng, 0.0, 1.0))) for _ in range(100))
    for _ in range(50):
        problem = family.draw(rng, 1.0, 1.0)
        assert all(slipped(name, problem))
        assert (len(problem.prompt), len(problem.solution)) == (family.prompt, family.solution)


@pytest.mark.parametrize("name", FAMILIES)
def test_after_a_slip_the_solution_goes_on_from_what_it_wrote(name):
    rng, family = np.random.default_rng(0), FAMILIES[name]
    for _ in range(100):
        problem = family.draw(rng, 1.0, 0.5)
        digits = [int(digit) for digit in re.findall(r"\d", problem.solution)]
        if name in PRODUCTS:
            steps = problem.solution.rstrip(";").split(",")
            assert [s[0] for s in steps[1:]] == [s[-1] for s in steps[:-1]]
        else:
            last = int(problem.prompt[-2])
            growth = np.diff([last, *digits[2:]]) % 10
            assert growth.tolist() == [digits[0], digits[1]] * 2


def _large(prompt):
    digits = [int(digit) for digit in re.findall(r"\d", prompt)]
    return np.mean([(b - a) % 10 > 3 for a, b in itertools.pairwise(digits)])


def test_solutions_alone_are_learned_from_and_no_prompt_that_is_asked():
    family, rng = FAMILIES["sequences"], np.random.default_rng(0)
    # All but a few of the prompts without the rare step.
    known, texts = reinforcement_problems.problems(family, rng, 60, 0.0)
    batch = reinforcement_problems.training_batch(family, rng, 50, 0.0, set(texts))
    assert [text_of(row) for row in known["tokens"]] == texts
    drawn = {text_of(row[: family.prompt]) for row in batch["tokens"]}
    assert drawn and not drawn & set(texts)
    assert (batch["mask"][:, : family.prompt] == 0).all()
    assert (batch["mask"][:, family.prompt :] == 1).all()
    for row in batch["tokens"]:
        assert int(text_of(row)[-2]) == sequence_result(text_of(row[: family.prompt]))


def test_problems_are_distinct_and_say_their_answers():
    asked, texts = reinforcement_problems.problems(
        FAMILIES["chains"], np.random.default_rng(0), 40, 0.5
    )
    assert len(set(texts)) == 40
    assert [chain_result("chains", text) for text in texts] == asked["truth"].tolist()


def test_more_problems_than_there_are():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at most as many as there are; got 100, and 90 were"):
        reinforcement_problems.problems(FAMILIES["sequences"], rng, 100, 0.0)


@pytest.mark.parametrize(
    ("text", "value"), [("7,4;", 4), ("4;  ", 4), ("7,4 ", None), (";7,4", None), ("7,;4", None)]
)
def test_the_answer_is_the_digit_before_the_stop(text, value):
    tokens = np.array([reinforcement_problems.tokens_of(text)])
    generated = Generated(tokens, np.ones(tokens.shape, bool), 0.0 * tokens)
    made = reinforcement_problems.answer(None, generated)
    assert bool(made.valid[0]) == (value is not None)
    if value is not None:
        assert int(made.values[0]) == value


def test_shares_are_counted_over_prompts():
    texts = [["1;", "1;", "2;"], ["3;", "4;", "4;"], [" ;", " ;", " ;"]]
    tokens = np.array([[[reinforcement_problems.tokens_of(t) for t in row] for row in texts]])
    made = Generated(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape))
    assert reinforcement.shares(made, np.array([[1, 3, 5]])) == {
        "right": pytest.approx(3 / 9),
        "votes_right": pytest.approx(1 / 3),
        "no_answer": pytest.approx(3 / 9),
        "most_frequent": pytest.approx(2 / 9),
    }


def settings(**changes):
    values = {"ways": ("ttrl", "form", "samples"), "family": "sequences", "seed": 0, "width": 32}
    values |= {
        "depth": 1,
        "num_steps": 3,
        "rows": 2,
        "easy_rare": 0.1,
        "hard_rare": 0.5,
        "slips": 0.5,
    }
    values |= {"sets": 2, "prompts": 2, "held_out": 1}
    values |= {
        "rank": 2,
        "rate": 1e-2,
        "steps": 2,
        "rollouts": 4,
        "stop_ratio": 2.0,
        "evaluated": 3,
        "min_consensus": 0.1,
        "keep_votes": True,
        "kl": 0.01,
    }
    return ml_collections.ConfigDict(values | changes)


def test_the_program_runs_and_keeps_both_columns(tmp_path):
    pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")
    record = reinforcement.run(str(tmp_path / "a.json"), settings())
    assert [row["way"] for row in record["rows"]] == ["ttrl", "form", "samples"]
    first, second, third = record["rows"]
    assert first["trained_before"] == second["trained_before"]
    assert first["held_out_before"] == second["held_out_before"]
    assert third["trained_before"] == third["trained_after"]
    for part, gain in first["gain"].items():
        right, votes = (first[f"{part}_before"][name] for name in ("right", "votes_right"))
        assert gain["over_pass1"] == first[f"{part}_after"]["right"] - right
        assert gain["over_votes"] == first[f"{part}_after"]["right"] - votes
    assert len(first["curve"]["majority_ratio"]) == 2 and "label_right" not in second["curve"]
    assert all(jax.tree.leaves([row["ok"] for row in record["rows"]]))
    with pytest.raises(launch.UserError, match=r"larger than easy_rare.*got 0.1 and 0.1"):
        reinforcement.run(str(tmp_path / "b.json"), settings(hard_rare=0.1))


def test_sets_are_apart_and_fresh():
    x, texts = reinforcement.asked(FAMILIES["chains"], settings(sets=3, prompts=4, held_out=2))
    assert x["tokens"].shape[:2] == (3, 4) and x["held_out"]["tokens"].shape[:2] == (3, 2)
    every = [*x["tokens"].reshape(12, -1), *x["held_out"]["tokens"].reshape(6, -1)]
    assert {text_of(row) for row in every} == texts and len(texts) == 18


def test_a_vote_turns_by_prompt():
    """Three prompts, three answers each: the first vote is lost, the second won, the third kept."""

    def spoken(*rows):
        texts = np.array(
            [[[[ALPHABET.index(sign) for sign in f"{digit};"] for digit in row] for row in rows]]
        )
        return Generated(texts, np.ones(texts.shape, bool), np.zeros(texts.shape, np.float32))

    before, after = spoken("334", "115", "772"), spoken("344", "551", "777")
    made = reinforcement.turned(before, after, np.array([3, 5, 7]))
    assert made == {"harmed": pytest.approx(1 / 3), "mended": pytest.approx(1 / 3)}
