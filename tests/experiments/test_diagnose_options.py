"""The options of the diagnostics program: the method, its settings, and what is refused."""

import json

import pytest

from experiments import diagnose, diagnosis, launch
from experiments.tasks import images
from tests.experiments import tiny_config

OPTIONS = diagnose.Options(severities=(5,), corruptions=("fog",), num_images=3)


def test_several_candidates_need_the_choice_of_adapt(tmp_path):
    config = tiny_config.get_config()
    name, grid = diagnosis.candidates_of(config, "rotation", images.task(config))
    assert name == "ttt_rotation"
    with pytest.raises(launch.UserError, match=r"2 candidates.*run experiments\.adapt"):
        diagnosis.settings_of(tmp_path, "rotation", grid)
    chosen = {"copies": 2, "num_steps": 2, "learning_rate": 0.01, "prior": 16, "select": "all"}
    chosen |= {"method": "ttt_rotation", "trace": True, "probe": "rotation"}
    (tmp_path / "selection.json").write_text(
        json.dumps({"chosen": {"rotation": chosen}, "tried": []})
    )
    assert diagnosis.settings_of(tmp_path, "rotation", grid) == chosen


@pytest.mark.parametrize("name", ["rotation_jump", "source", "rotation_online"])
def test_a_method_that_does_not_fit_is_refused(name):
    config = tiny_config.get_config()
    with pytest.raises(launch.UserError, match=rf"\(rotation\); got '{name}'"):
        diagnosis.candidates_of(config, name, images.task(config))


def test_the_map_always_has_the_learning_rate_of_the_config():
    settings = {"learning_rate": 0.001}
    assert diagnosis.rates_of(settings, None) == (0.0003, 0.001, 0.003, 0.01)
    assert diagnosis.rates_of(settings, (0.1,)) == (0.001, 0.1)


def test_numbers_may_come_as_text():
    options = diagnose.checked(OPTIONS._replace(severities=["5", "1"], learning_rates=["1e-3"]))
    assert options.severities == (5, 1) and options.learning_rates == (0.001,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_images": 0}, "--num_images must be at least 1; got 0"),
        ({"corruptions": ("fogg",)}, "unknown --corruptions value 'fogg'; choose from"),
        ({"corruptions": ()}, "unknown --corruptions value ''; choose from"),
        ({"corruptions": ("fog", "fog")}, "--corruptions value 'fog' is there twice"),
        ({"severities": (6,)}, "unknown --severities value '6'; choose from 1, 2"),
        ({"severities": ["a"]}, "unknown --severities value 'a'; choose from 1, 2"),
        ({"severities": ()}, "unknown --severities value ''; choose from 1, 2"),
        ({"severities": (1, 1)}, "--severities value '1' is there twice"),
        ({"learning_rates": ["abc"]}, "--learning_rates must .* each once; got 'abc'"),
        ({"learning_rates": []}, "--learning_rates must list at least one .* got ''"),
        ({"learning_rates": ["nan", "0.1"]}, "--learning_rates must .* got 'nan,0.1'"),
        ({"learning_rates": (0.0, 0.1)}, "--learning_rates must .* got '0.0,0.1'"),
        ({"learning_rates": (0.1, 0.1)}, "--learning_rates must .* got '0.1,0.1'"),
    ],
)
def test_impossible_options_are_refused(tmp_path, changed, message):
    with pytest.raises(launch.UserError, match=message):
        diagnose.run(tiny_config.get_config(), str(tmp_path / "W"), OPTIONS._replace(**changed))
    assert not list(tmp_path.iterdir())


def test_no_seeds_are_refused(tmp_path):
    config = tiny_config.get_config()
    config.seeds = ()
    with pytest.raises(launch.UserError, match=r"config\.seeds must list .* got \(\)"):
        diagnose.run(config, str(tmp_path / "W"), OPTIONS)
    assert not list(tmp_path.iterdir())
