"""The chains of digits: right by themselves, apart from the training, and read as they are."""

import jax
import ml_collections
import numpy as np
import pytest

from benchmarks import reinforcement
from experiments import launch
from ttt_jax.generation import Generated


def computed(prompt):
    """From left to right, by Python."""
    value, results = int(prompt[0]), []
    for place in range(1, len(prompt) - 1, 2):
        value = eval(f"({value}){prompt[place]}{prompt[place + 1]}") % 10
        results.append(value)
    return tuple(results)


def test_chains_are_computed_from_left_to_right():
    rng = np.random.default_rng(0)
    signs = set()
    for _ in range(200):
        chain = reinforcement.draw_chain(rng, 5)
        assert chain.results == computed(chain.prompt) and len(chain.results) == 4
        signs |= set(chain.prompt) - set("0123456789=")
    assert signs == set(reinforcement.SIGNS)


def test_solutions_alone_are_learned_from():
    batch = reinforcement.training_batch(np.random.default_rng(0), 6, (2, 4), 16)
    for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
        text = "".join(reinforcement.ALPHABET[token] for token in tokens).rstrip()
        prompt, answer = text.split("=")
        assert tuple(map(int, answer.rstrip(";").split(","))) == computed(prompt + "=")
        wanted = np.zeros(16)
        wanted[len(prompt) + 1 : len(text)] = 1
        np.testing.assert_array_equal(mask, wanted)


def test_problems_are_distinct_and_say_their_results():
    asked = reinforcement.problems(np.random.default_rng(0), 40, 3)
    texts = ["".join(reinforcement.ALPHABET[token] for token in row) for row in asked["tokens"]]
    assert len(set(texts)) == 40
    assert [computed(text)[-1] for text in texts] == asked["truth"].tolist()


@pytest.mark.parametrize(
    ("text", "value"), [("7,4;", 4), ("4;  ", 4), ("7,4 ", None), (";7,4", None), ("7,;4", None)]
)
def test_the_answer_is_the_digit_before_the_stop(text, value):
    tokens = np.array([reinforcement.tokens_of(text)])
    made = reinforcement.answer(None, Generated(tokens, np.ones(tokens.shape, bool), 0.0 * tokens))
    assert bool(made.valid[0]) == (value is not None)
    if value is not None:
        assert int(made.values[0]) == value


def test_shares_are_counted_over_prompts():
    texts = [["1;", "1;", "2;"], ["3;", "4;", "4;"], [" ;", " ;", " ;"]]
    tokens = np.array([[[reinforcement.tokens_of(t) for t in row] for row in texts]])
    made = Generated(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape))
    found = reinforcement.shares(made, np.array([[1, 3, 5]]))
    assert found == {
        "right": pytest.approx(3 / 9),
        "votes_right": pytest.approx(1 / 3),
        "no_answer": pytest.approx(3 / 9),
    }


def settings(**changes):
    values = {"ways": ("ttrl", "form"), "seed": 0, "width": 32, "depth": 1, "num_steps": 3}
    values |= {"rows": 2, "easy_terms": 2, "hard_terms": 3, "sets": 2, "prompts": 2, "held_out": 1}
    values |= {"rank": 2, "rate": 1e-2, "steps": 2, "rollouts": 4, "stop_ratio": 2.0}
    return ml_collections.ConfigDict(values | changes)


def test_the_program_runs_and_keeps_both_columns(tmp_path):
    pytest.importorskip("qwix", reason="low-rank adaptation needs qwix")
    record = reinforcement.run(str(tmp_path / "a.json"), settings())
    assert [row["way"] for row in record["rows"]] == ["ttrl", "form"]
    first, second = record["rows"]
    assert first["trained_before"] == second["trained_before"]
    assert first["held_out_before"] == second["held_out_before"]
    assert len(first["curve"]["majority_ratio"]) == 2 and "label_right" not in second["curve"]
    assert all(jax.tree.leaves([row["ok"] for row in record["rows"]]))
    with pytest.raises(launch.UserError, match=r"larger than easy_terms.*got 3 and 3"):
        reinforcement.run(str(tmp_path / "b.json"), settings(easy_terms=3))
