"""What every program shares: seeds, choices, files that are there."""

import pytest

from experiments import config_check, launch
from tests.experiments import tiny_config


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,), (0.5,)])
def test_impossible_seeds(seeds):
    config = tiny_config.get_config()
    config.seeds = seeds
    with pytest.raises(launch.UserError, match="at least one integer from 0 on, each once; got"):
        config_check.check(config)


def test_choices_are_some_and_each_once():
    assert launch.chosen("way", ["a", "b"], "abc") == ("a", "b")
    with pytest.raises(launch.UserError, match="way 'a' is there twice; name each once"):
        launch.chosen("way", ["a", "b", "a"], "abc")
    with pytest.raises(launch.UserError, match="unknown way ''; choose from a, b, c"):
        launch.chosen("way", [], "abc")


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    path = launch.new_file(tmp_path / "new" / "out.json")
    path.write_text("measured")
    with pytest.raises(launch.UserError, match=r"out\.json exists and is not replaced"):
        launch.new_file(path)
