"""Every config trains, adapts and reports, and every benchmark runs, cut down to two CPU cores.

``make smoke`` runs what is marked so, in a few minutes: tiny networks, few steps, a few images,
noise in place of files. It shows that all still runs; its numbers mean nothing. A new config is
covered as soon as its file is there. ``pytest -m smoke tests/test_smoke.py -k NAME`` repeats one.
"""

import collections
import os
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

from experiments import adapt, config_files, diagnose, feature_shift, train
from experiments.report import __main__ as report
from tests.experiments import tiny_decoder

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("[!_]*.py"))
NUM_EXAMPLES = {"train": 64, "validation": 4, "test": 4}
# Wherever a config has the key.
TINY = {
    "data": {
        "imbalance": 2,
        "chunk": 8,
        "chunks": 2,
        "window": 12,
        "least": 2,
        "most": 4,
        "tasks": 4,
        "frames": 4,
    },
    "model": {"width": 4, "groups": 2, "heads": 1, "decoder_width": 4, "decoder_depth": 1}
    # A CPU emulates bfloat16; the benchmark's networks keep it.
    | {"projection": 4, "dtype": "float32", "rank": 2},
    "views": {"padding": 1},
    "train": {"num_steps": 2, "batch_size": 8, "warmup_steps": 1, "steps_per_call": 1}
    | {"log_every": 1, "save_every": 1, "length": 16},
    "adapt": {"batch_size": 4, "chunk_size": 2},
}
DEPTHS = {"resnet": 8, "vit": 1, "byte_decoder": 1, "grid_decoder": 1}
# Wherever a method has the option.
TINY_METHOD = {"copies": 2, "num_views": 2, "num_masks": 1, "num_steps": 1, "every": 1}
# Of grids, whose keys of the same names have other bounds.
TINY_GRIDS = {
    "data": {"tasks": 12, "validation": 3, "reported": 5, "side": 3, "views": 2, "rows": 2},
    "model": {"width": 16, "mlp_width": 16},
}
# The configs that committed results of diagnose and feature_shift are of, and the method diagnosed.
DIAGNOSED = {"digits": "rotation", "cifar10c_level5": "rotation_jump"}
SHIFTED = "cifar10c_contrastive"


def distinct_methods(configs):
    """By config, the methods that no earlier one has on the same kind of network, at least one.

    Compiling is most of the work. Another option may be another program, another value is not.
    """
    seen, kept = set(), {}
    for name, config in configs.items():
        kept[name] = []
        for label, options in config.methods.items():
            network = (config.model.name, config.model.get("norm"))
            program = (*network, options.get("method", label), *sorted(options))
            if program not in seen or label == DIAGNOSED.get(name):
                kept[name].append(label)
            seen.add(program)
        kept[name] = kept[name] or list(config.methods)[:1]
    return kept


METHODS = distinct_methods({path.stem: config_files.config_from(path) for path in CONFIGS})


def tiny(path, folder):
    """A config on a few examples, those of files replaced by noise that is written to a folder."""
    config = config_files.config_from(path)
    config.seeds = tuple(config.seeds)[:1]
    taken = collections.Counter()
    for role, count in NUM_EXAMPLES.items():
        if isinstance(config.data.get(role), str):
            split = config.data[role].partition("[")[0]
            start, taken[split] = taken[split], taken[split] + count
            config.data[role] = f"{split}[{start}:{taken[split]}]"
    if config.data.name.startswith("npz:"):
        config.data.name = f"npz:{folder}/{{split}}.npz"
        # Every file has all ten classes.
        images = np.random.default_rng(0).random((72, 16, 16, 3), np.float32)
        labels = np.arange(len(images), dtype=np.int32) % 10
        for split in taken:
            np.savez(folder / f"{split}.npz", images=images, labels=labels)
    for section, values in TINY.items():
        known = config.get(section, {})
        known.update({name: value for name, value in values.items() if name in known})
    if config.model.name == "grid_decoder":
        for section, values in TINY_GRIDS.items():
            config[section].update(values)
    tiny_decoder.stand_in(config, folder)
    if config.model.name in DEPTHS and "depth" in config.model:
        config.model.depth = DEPTHS[config.model.name]
    config.methods = ml_collections.ConfigDict(
        {label: config.methods[label] for label in METHODS[path.stem]}
    )
    for options in config.methods.values():
        for name, value in options.items():
            # A tuple is a list of candidates: the first one will do.
            if isinstance(value, tuple):
                options[name] = value[:1]
            elif name in TINY_METHOD and value is not None:
                options[name] = min(value, TINY_METHOD[name])
    return config


@pytest.mark.smoke
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, tmp_path):
    config, folder = tiny(path, tmp_path), str(tmp_path / "run")
    train.run(config, folder)
    assert adapt.run(config, folder, devices=1) == 0, "a trial failed"
    assert report.run(folder) == 0, "no page was made"
    if method := DIAGNOSED.get(path.stem):
        few = diagnose.Options(severities=(1, 3, 5), corruptions=("contrast",), num_images=4)
        diagnose.run(config, folder, few._replace(method=method))
    if path.stem == SHIFTED:
        feature_shift.run(config, folder, domains=("contrast",), num_images=4)
    jax.clear_caches()


@pytest.mark.smoke
@pytest.mark.parametrize("command", ["vision", "kernels --dtypes=float32", "bbh", "layers"])
def test_benchmark_runs(command, tmp_path):
    name, *options = command.split()
    # By its command line: it sets up the memory of the device for two libraries.
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--smoke", *options, f"--out={tmp_path}/out"],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_tiny_config_is_tiny(path, tmp_path):
    config = tiny(path, tmp_path)
    assert config.train.num_steps <= 2 and len(config.seeds) == 1
    assert config.methods
    assert path.stem not in DIAGNOSED or DIAGNOSED[path.stem] in config.methods
    for options in config.methods.values():
        assert all((options.get(name) or 0) <= most for name, most in TINY_METHOD.items())
        assert all(len(value) == 1 for value in options.values() if isinstance(value, tuple))


def test_training_and_validation_rows_do_not_overlap(tmp_path):
    config = tiny(ROOT / "experiments" / "configs" / "digits.py", tmp_path)
    splits = [config.data[role] for role in ("train", "validation", "test")]
    assert splits == ["train[0:64]", "train[64:68]", "test[0:4]"]


def test_a_method_runs_once_per_kind_of_network():
    def config(norm, **methods):
        model = {"name": "resnet", "norm": norm}
        return ml_collections.ConfigDict({"model": model, "methods": methods})

    kept = distinct_methods(
        {
            "first": config("group", joint={}, memo={}),
            "second": config("group", joint={}, rotation={}),
            "batch": config("batch", joint={}),
            "nothing new": config("group", joint={}, memo={}),
            "another label": config("group", again={"method": "memo"}, joint={}),
            "another option": config("group", joint={}, rotation={"momentum": 0.9}),
            "another value": config("group", rotation={"momentum": 0.5}, source={}),
        }
    )
    assert kept == {
        "first": ["joint", "memo"],
        "second": ["rotation"],
        "batch": ["joint"],
        "nothing new": ["joint"],
        "another label": ["again"],
        "another option": ["rotation"],
        "another value": ["source"],
    }
