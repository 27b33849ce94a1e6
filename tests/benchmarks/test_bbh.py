"""BIG-Bench Hard: what is shown, asked and allowed, the tokens of prompts, and the table."""

import json

import numpy as np
import pytest

from benchmarks.bbh import questions, sequences, smoke, table
from experiments import launch
from ttt_jax.data.few_shot import Example, FewShotTask

WRITER = sequences.Writer(smoke.Bytes())
LISTED = "Which?\nOptions:\n(A) one\n(B) - two\n(C) (D)"
WORDS = "Options: none?\nOptions:\n- valid \n- invalid"


def task(*outputs, question="?"):
    shown = tuple(Example(question, output) for output in outputs)
    return FewShotTask("task", shown, (Example(question, outputs[0]),))


def test_options_are_those_that_the_question_lists():
    assert questions.options(LISTED) == ("(A)", "(B)", "(C)")
    assert questions.options(WORDS) == ("valid", "invalid")
    assert questions.options("Are there options?") == ()


@pytest.mark.parametrize(
    ("given", "rule", "allowed"),
    [
        (task("(B)", question=LISTED), "options", ("(A)", "(B)", "(C)")),
        (task("yes", "yes"), "pair", ("yes", "no")),
        (task("False", "True"), "pair", ("True", "False")),
        (task("Yes", "no"), "greedy", ()),
        (task("yes", "valid"), "greedy", ()),
        (task("yes", "8"), "greedy", ()),
    ],
)
def test_answers_are_allowed_by_questions_and_demonstrations(given, rule, allowed):
    assert questions.rule(given) == rule
    assert questions.choices(given, given.queries[0].input) == allowed


def test_the_answers_of_queries_decide_nothing_but_their_score():
    given = task("(B)", question=LISTED)
    other = given._replace(queries=(Example(LISTED, "a word"),))
    assert questions.rule(other) == "options"
    assert questions.choices(other, LISTED) == questions.choices(given, LISTED)
    assert questions.chance(given) == pytest.approx(1 / 3) and questions.chance(other) == 0.0
    assert questions.constant(given) == 1.0 and questions.constant(other) == 0.0


def drawn(role, most=100, seed=0):
    examples = [Example(str(place % 20), str(place % 20)) for place in range(25)]
    return questions.draw("t", examples, shots=4, seed=seed, role=role, most=most)


def test_no_example_is_on_two_sides():
    first, second = drawn("validation"), drawn("reported")
    assert first.demonstrations == second.demonstrations and len(first.demonstrations) == 4
    sides = [first.demonstrations, first.queries, second.queries]
    inputs = [example.input for side in sides for example in side]
    assert len(inputs) == len(set(inputs)) == 20
    assert drawn("reported", most=3).queries == second.queries[:3]
    assert drawn("reported", seed=1).demonstrations != second.demonstrations
    with pytest.raises(launch.UserError, match=r"--shots must leave two .*got 19 of 20"):
        examples = [Example(str(place), "") for place in range(20)]
        questions.draw("t", examples, shots=19, seed=0, role="reported", most=1)


def test_folds_part_the_demonstrations():
    given = drawn("reported")
    for part, held_out in questions.halves(given):
        assert sorted((*part.demonstrations, *held_out)) == sorted(given.demonstrations)
        assert len(held_out) == 2


def text(tokens):
    return bytes(tokens).decode()


def test_demonstrations_are_left_out_in_front():
    shown = [Example("one", "1"), Example("two", "2"), Example("six", "6")]
    whole = "Q: one\nA: 1\n\nQ: two\nA: 2\n\nQ: six\nA: 6\n\n"
    assert text(sequences.prefix(WRITER, shown, 100)[0]) == whole
    size = len(whole) // 3
    for room, dropped in ((3 * size, 0), (3 * size - 1, 1), (size, 2), (size - 1, 3)):
        tokens, count = sequences.prefix(WRITER, shown, room)
        assert count == dropped and text(tokens) == whole[dropped * size :]
    made = sequences.row(WRITER, shown, 1, 2 * size)
    assert made.dropped == 1 and text(made.tokens) == whole[size:]
    assert text(made.targets) == " 6\n\n"
    with pytest.raises(launch.UserError, match=r"--context must have room.*got 9, and one has 13"):
        sequences.row(WRITER, shown, 1, 9)


def test_answers_from_the_second_demonstration_on_are_learned():
    given = FewShotTask("t", tuple(Example(sign, sign.upper()) for sign in "wxyz"), ())
    rows = sequences.in_context(WRITER, given, 8, 200, np.random.default_rng(0))
    lasts = [text(row.tokens)[-3] for row in rows]
    assert lasts == list("WXYZWXYZ")
    orders = {text(row.tokens) for row in rows}
    assert len(orders) > 4 and all(set("WXYZ") <= set(each) for each in orders)
    for row in rows:
        learned = [text(row.tokens)[place + 1] for place in row.places]
        assert "".join(learned) == text(row.targets)
        assert [sign for sign in text(row.targets) if sign in "WXYZ"] == [
            sign for sign in text(row.tokens) if sign in "WXYZ"
        ][1:]
    alone = sequences.direct(WRITER, given, 6, 200, np.random.default_rng(0))
    assert {text(row.tokens) for row in alone[:4]} == {
        f"Q: {s}\nA: {s.upper()}\n\n" for s in "wxyz"
    }
    assert all(text(row.targets)[1] == text(row.tokens)[-3] for row in alone)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" 42\n\n", True),
        (" 42\nQ", True),
        (" 42 \n", False),
        (" 4\n\n ", False),
        (" 43\n\n", False),
    ],
)
def test_a_free_answer_is_right_up_to_the_end_of_its_line(written, right):
    answer = WRITER.answer("42")
    assert WRITER.ends_alike(answer, list(written.encode())[: len(answer)]) == right


def test_an_answer_may_end_the_text():
    tokenizer = smoke.Bytes()
    tokenizer.eos = 0
    writer = sequences.Writer(tokenizer)
    assert writer.ends_alike(writer.answer("8"), [32, 56, 0, 7])
    assert not WRITER.ends_alike(WRITER.answer("8"), [32, 56, 0, 7])


TASKS = {"a": {"chance": 0.5}, "b": {"chance": 0.25}, "c": {"chance": 0.5}}
SHOWN = {"a": "1110", "b": "1000", "c": "1111"}
MADE = {"a": "1111", "b": "0110", "c": "0011"}


def test_gains_and_harm_are_counted_over_tasks_and_queries():
    # b does not beat chance.
    assert table.learned_from(TASKS, SHOWN) == ["a", "c"]
    found = table.summary(TASKS, {"bits": MADE}, SHOWN)
    whole, part = found["all"], found["learned_from"]
    assert whole["accuracy"][0] == pytest.approx(200 / 3) and whole["gain"][0] == pytest.approx(0)
    assert whole["tasks_harmed"] == pytest.approx(1 / 3)
    assert whole["queries_harmed"] == pytest.approx(3 / 12)
    assert whole["queries_mended"] == pytest.approx(3 / 12)
    assert (part["tasks"], part["gain"][0], part["tasks_harmed"]) == (2, -12.5, 0.5)
    low, high = part["gain"][1:]
    assert low == -50.0 and high == 25.0
    assert table.summary({"b": TASKS["b"]}, {"bits": MADE}, SHOWN)["learned_from"] is None


def test_the_interval_is_that_of_resampled_means():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    mean, low, high = table.interval(values)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert table.interval(values) == [mean, low, high]


def test_the_table_has_a_column_per_row():
    rows = [{"way": "in_context", "bits": SHOWN}]
    rows.append({"way": "adapted", "bits": MADE, "rate": 1e-3, "steps": 8})
    rows = [row | {"summary": table.summary(TASKS, row, SHOWN)} for row in rows]
    lines = table.lines(json.loads(json.dumps({"tasks": TASKS, "rows": rows})))
    assert lines[0].split() == ["task", "chance", "in_context", "adapted", "0.001x8"]
    assert lines[1].split() == ["a", "50.0", "75.0", "100.0"]
    assert lines[5].split() == ["gain", "+0.0", "+0.0"]
    assert lines[-1].split() == ["tasks", "harmed", "0", "%", "50", "%"]
