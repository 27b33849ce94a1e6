"""Every default of the methods for one instance is its published setting."""

import inspect

import pytest

from tests.core import golden
from ttt_jax import methods, select

from .test_defaults_batch import CHECKS, NEVER

ALL = select.everything()
REQUIRED = inspect.Parameter.empty
TTT = {"augment": None, "copies": 32, "optimizer": golden.SGD(1e-3), "select": ALL}
MEMO = {"num_views": 32, "select": ALL}
EPISODIC, ONLINE = {"trace": False, "serve": None}, {"reset": NEVER, "predict": "after"}

# Sources: the papers and the authors' code, named in each docstring. Sun et al. 2020 (standard
# and online, CIFAR-10), Gandelsman et al. 2022, Zhang et al. 2022 (CIFAR-10), Hardt and Sun 2024.
PUBLISHED = {
    "source": {"batch": False, "serve": None},
    "augmented": {
        "augment": REQUIRED,
        "num_views": 32,
        "include_identity": True,
        "mean": "probability",
    },
    "every_view": {"views": REQUIRED},
    "bn_adapt": {"batch": True, "serve": None},
    "ttt_rotation": {**TTT, **EPISODIC, "num_steps": 10},
    "ttt_rotation_online": {**TTT, **ONLINE, "num_steps": 1, "serve": None},
    "ttt_rotation_statistics": {**TTT, **EPISODIC, "num_steps": 10, "statistics_momentum": 0.9},
    "ttt_mae": {
        **EPISODIC,
        "patch": REQUIRED,
        "mask_ratio": 0.75,
        "num_masks": 128,
        "optimizer": golden.SGD(5e-3, 0.9),
        "select": REQUIRED,
        "num_steps": 20,
    },
    "memo": {
        **MEMO,
        **EPISODIC,
        "augment": REQUIRED,
        "optimizer": golden.SGD(5e-3),
        "num_steps": 1,
    },
    "rotation_memo": {
        **TTT,
        **MEMO,
        **EPISODIC,
        "augment": REQUIRED,
        "memo_weight": 1.0,
        "num_steps": 1,
    },
    "rotation_memo_online": {
        **TTT,
        **MEMO,
        **ONLINE,
        "augment": REQUIRED,
        "memo_weight": 1.0,
        "num_steps": 1,
        "serve": None,
    },
    "neighbors": {**TTT, **EPISODIC, "k": 20, "num_steps": 1},
    # No test-time setting of this loss is published.
    "ttt_denoising": {
        **EPISODIC,
        "noise": REQUIRED,
        "num_copies": REQUIRED,
        "optimizer": golden.SGD(1e-3),
        "select": ALL,
        "num_steps": 1,
    },
}
HEADS = {"classify", "rotation", "rotation_statistics", "reconstruct", "features", "denoise"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults(name):
    parameters = inspect.signature(getattr(methods, name)).parameters
    settings = {key: p.default for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(settings) == set(PUBLISHED[name])
    for key, default in settings.items():
        published = PUBLISHED[name][key]
        if key in CHECKS and published is not REQUIRED:
            CHECKS[key](default, published)
        else:
            assert default is published or default == published, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_but_model_functions_is_keyword_only(name):
    parameters = inspect.signature(getattr(methods, name)).parameters.values()
    heads = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert heads[0] == "classify" and set(heads) <= HEADS
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters)


def test_every_method_has_a_row():
    """Here, or beside those over batches and documents; a function to serve with is none."""
    from .test_defaults_batch import PUBLISHED as BATCHES
    from .test_defaults_text import PUBLISHED as TEXT

    rows = set(PUBLISHED) | set(BATCHES) | set(TEXT)
    assert rows == set(methods.__all__) - {"mean_over_views"}
