"""Every config, diagnose and the benchmarks once, cut down to what two CPU cores do in two minutes.

Usage::

    python -m experiments.smoke [--only=digits,pacs] [--nosubstitute]

Trains, adapts and reports every ``experiments/configs/*.py`` with tiny networks, few steps and a
few images of its data, then runs diagnose on the default config and on the standard table's,
feature_shift on TTT++'s, and bench. A method that an earlier config ran on the same kind of network
is left out of the later ones. A config whose data are absent runs on noise, or with
``--nosubstitute`` is skipped by name. It shows that all still runs; its numbers mean nothing. A new
config is covered as soon as its file is there.
"""

import contextlib
import importlib.util
import io
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags

from experiments import adapt, diagnose, feature_shift, launch, report, train
from ttt_jax import data

FOLDER = launch.DEFAULT_CONFIG.parent
ROLES = {"train": 64, "validation": 4, "test": 4}
# Wherever a config has the key.
TINY: dict[str, Any] = {
    "data.imbalance": 2,
    "data.chunk": 8,
    "data.chunks": 2,
    "data.tasks": 4,
    "data.frames": 4,
    "train.num_steps": 2,
    "train.batch_size": 8,
    "train.warmup_steps": 1,
    "train.steps_per_call": 1,
    "train.log_every": 1,
    "train.save_every": 1,
    "adapt.batch_size": 4,
    "adapt.chunk_size": 2,
    # A CPU emulates bfloat16; the benchmark's networks keep it.
    "model.dtype": "float32",
    "model.width": 4,
    "model.groups": 2,
    "model.heads": 1,
    "model.decoder_width": 4,
    "model.decoder_depth": 1,
    "model.projection": 4,
    "views.padding": 1,
}
DEPTHS = {"resnet": 8, "vit": 1, "byte_decoder": 1}
# Wherever a method has the option.
TINY_METHOD = {"copies": 2, "num_views": 2, "num_masks": 1, "num_steps": 1}
# Compiling is most of the work: with these it takes a third of the time.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
# The demo's config and those that committed results of these programs are of; diagnose takes a
# method that no earlier config runs.
DIAGNOSED = {launch.DEFAULT_CONFIG.stem: "rotation", "cifar10c_level5": "rotation_jump"}
SHIFTED = "cifar10c_contrastive"
_NOT_DATA = ("train", "adapt", "report", "diagnose", "bench", "smoke")


def discover(only: Sequence[str] = ()) -> dict[str, pathlib.Path]:
    """The config files by name, all of the folder's or some.

    Raises:
      UserError: a name without a file.
    """
    found = {path.stem: path for path in sorted(FOLDER.glob("[!_]*.py"))}
    for name in only:
        if name not in found:
            raise launch.UserError(f"there is no config {name!r}; choose from {', '.join(found)}.")
    return {name: found[name] for name in only} if only else found


def _with_count(split: str, count: int, taken: dict[str, int]) -> str:
    """The next ``count`` rows of the file that a split is of."""
    base = split.partition("[")[0]
    start = taken.get(base, 0)
    taken[base] = start + count
    return f"{base}[{start}:{start + count}]"


def overrides(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What makes a config tiny, as ``--config.KEY=VALUE`` would: only keys that it has."""
    taken: dict[str, int] = {}
    small: dict[str, Any] = {"seeds": tuple(config.seeds)[:1]}
    for role, count in ROLES.items():
        if role in config.data:
            small[f"data.{role}"] = _with_count(config.data[role], count, taken)
    for key, value in TINY.items():
        section, name = key.split(".")
        if name in config.get(section, {}):
            small[key] = value
    if "depth" in config.model and config.model.name in DEPTHS:
        small["model.depth"] = DEPTHS[config.model.name]
    for method, options in config.methods.items():
        for name, value in options.items():
            # A tuple is a list of candidates: the first one will do.
            if isinstance(value, tuple):
                small[f"methods.{method}.{name}"] = value[:1]
            elif name in TINY_METHOD and value is not None:
                small[f"methods.{method}.{name}"] = min(value, TINY_METHOD[name])
    return small


def leave_out(
    config: ml_collections.ConfigDict, seen: set[tuple[str, ...]], kept: str | None = None
) -> list[str]:
    """Removes the methods that ran already on this kind of network, but never all of them.

    Args:
      config: is changed.
      seen: (model, normalization, function, its options' names) that ran; those of this config
        are added. Another option may be another program.
      kept: a method that stays in any case, since it is diagnosed.

    Returns:
      The names that were removed.
    """
    kind = (config.model.name, str(config.model.get("norm", "")))
    names = list(config.methods)
    programs = {
        name: (*kind, config.methods[name].get("method", name), *sorted(config.methods[name]))
        for name in names
    }
    known = [name for name in names if programs[name] in seen and name != kept]
    removed = known[1:] if len(known) == len(names) else known
    for name in removed:
        del config.methods[name]
    seen.update(programs.values())
    return removed


def as_flags(small: dict[str, Any]) -> str:
    """Overrides as a person would type them."""
    return " ".join(f"--config.{key}='{value}'" for key, value in small.items())


def how_to_make(name: str, configs: dict[str, pathlib.Path]) -> str:
    """The command that makes a config's data: its docstring's, or that of one with equal data."""
    wanted = launch.config_from(configs[name]).data.name
    for path in (configs[name], *configs.values()):
        if launch.config_from(path).data.name != wanted:
            continue
        spec = importlib.util.spec_from_file_location("config", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for command in re.findall(r"``(python -m experiments\.[^`]+)``", module.__doc__ or ""):
            if not command.removeprefix("python -m experiments.").startswith(_NOT_DATA):
                return " ".join(command.split())
    return f"see the docstring of {configs[name].name}"


def _balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """``count`` rows, the first one of every class before the second one of any."""
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return np.argsort(rank, kind="stable")[:count]


def excerpt(config: ml_collections.ConfigDict, folder: pathlib.Path, *, on_noise: bool) -> None:
    """Makes a config of ``npz`` files read a few of their images, or noise in ten classes.

    The images keep every second pixel; the noise is 16 x 16.

    A set of compressed images is decoded as a whole whenever it is opened, which takes longer than
    all the rest.

    Raises:
      FileNotFoundError: a file is missing.
    """
    count = sum(ROLES.values())
    for base in {config.data[role].partition("[")[0] for role in ROLES}:
        path = folder / f"{base}.npz"
        if path.exists():
            continue
        if on_noise:
            images = np.random.default_rng(0).random((count, 16, 16, 3), np.float32)
            labels = np.arange(count, dtype=np.int32) % 10
        else:
            source = data.load(config.data.name.replace("{split}", base), base)
            _, images, labels = source.take(_balanced(source.labels(), count))
            images = images[:, ::2, ::2]
        np.savez(path, images=images, labels=labels)
    config.data.name = f"npz:{folder}/{{split}}.npz"


class Part(NamedTuple):
    """One config, made tiny; or the benchmark, which has no path.

    Attributes:
      name: the config's.
      path: its file.
      removed: methods that another part runs.
      small: the overrides.
    """

    name: str
    path: pathlib.Path | None = None
    removed: tuple[str, ...] = ()
    small: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def config(self) -> ml_collections.ConfigDict:
        """The tiny config."""
        config = launch.config_from(self.path)
        for name in self.removed:
            del config.methods[name]
        config.update_from_flattened_dict(self.small)
        return config

    def describe(self) -> str:
        """What it runs."""
        if self.path is None:
            return self.name
        text = f"{self.name}: {', '.join(self.config().methods)}"
        return f"{text}; elsewhere {', '.join(self.removed)}" if self.removed else text


def plan(
    configs: dict[str, pathlib.Path], workdir: pathlib.Path, *, on_noise: bool
) -> tuple[list[Part], list[str]]:
    """The parts to run, their data made, and a line for each config that lacks its own."""
    parts: list[Part] = []
    lines: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for name, path in configs.items():
        config = launch.config_from(path)
        if config.data.name.startswith("npz:"):
            # Configs of the same data share the excerpt.
            of = re.sub(r"\W+", "_", config.data.name).strip("_")
            rows = launch.open_workdir(str(workdir / of))
            try:
                excerpt(config, rows, on_noise=False)
            except FileNotFoundError as error:
                make = how_to_make(name, discover())
                if not on_noise:
                    lines.append(f"skip   {name}: {error} Make its data: {make}")
                    continue
                lines.append(f"noise  {name}: its data are absent; they are made by: {make}")
                excerpt(config, rows, on_noise=True)
        removed = tuple(leave_out(config, seen, DIAGNOSED.get(name)))
        small = {"data.name": config.data.name, **overrides(config)}
        parts.append(Part(name, path, removed, small))
    return parts, lines


def _run_config(part: Part, folder: str) -> None:
    config = part.config()
    train.run(config, folder)
    if adapt.run(config, folder):
        raise RuntimeError("adapt: a trial failed")
    if report.run(folder):
        raise RuntimeError("report: no page was made")
    if part.name in DIAGNOSED:
        few = diagnose.Options(severities=(1, 3, 5), corruptions=("contrast",), num_images=4)
        diagnose.run(config, folder, few._replace(method=DIAGNOSED[part.name]))
    if part.name == SHIFTED:
        feature_shift.run(config, folder, domains=("contrast",), num_images=4)


def _run_bench(folder: str) -> None:
    # By their command line: bench sets up the memory of the device for two libraries.
    for name, *more in (("bench",), ("bench_kernels", "--dtypes=float32")):
        command = [sys.executable, "-m", f"experiments.{name}", "--smoke", *more]
        command.append(f"--out={folder}/{name}.json")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip()[-500:]
            raise RuntimeError(f"{name} ended with status {done.returncode}: {said}")


def run_part(part: Part, folder: str) -> str | None:
    """Runs a part quietly; None, or all that it said where it failed."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            _run_bench(folder) if part.path is None else _run_config(part, folder)
    except Exception as error:
        again = f"config: --config={part.path} {as_flags(part.small)}"
        return f"{type(error).__name__}: {error}\n{said.getvalue()}{again}"
    finally:
        jax.clear_caches()
    return None


def _start_worker() -> None:
    # What several configs compile alike is compiled once; the cache is also that of the tests.
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def run(
    workdir: str, *, only: Sequence[str] = (), on_noise: bool = False, processes: int = 2
) -> int:
    """Runs the configs and programs; returns the exit status, 1 if one failed.

    Args:
      workdir: where every part has a folder of its own.
      only: names of configs (or ``bench``); all if empty.
      on_noise: whether configs without data run on noise.
      processes: how many run at a time.

    Raises:
      UserError: an unknown name.
    """
    folder = pathlib.Path(workdir)
    configs = discover([name for name in only if name != "bench"])
    parts, lines = plan({} if tuple(only) == ("bench",) else configs, folder, on_noise=on_noise)
    print("\n".join(lines), end="\n" if lines else "", flush=True)
    if not only or "bench" in only:
        parts.append(Part("bench"))
    # A process that was forked would share the threads of jax.
    spawn = multiprocessing.get_context("spawn")
    start, failed = time.monotonic(), []
    with futures.ProcessPoolExecutor(processes, spawn, initializer=_start_worker) as pool:
        running = {pool.submit(run_part, part, str(folder / part.name)): part for part in parts}
        for done in futures.as_completed(running):
            part = running[done]
            # A worker that was killed fails all that were left.
            problem = str(done.exception()) if done.exception() else done.result()
            if problem is not None:
                failed.append(part.name)
            print(f"{'ok    ' if problem is None else 'FAILED'} {part.describe()}", flush=True)
            print(f"{problem}\n" if problem else "", end="", flush=True)
    print(f"{len(parts)} parts in {time.monotonic() - start:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    # For the processes that this one starts.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    settings = {"only": tuple(_ONLY.value), "on_noise": _SUBSTITUTE.value}
    settings["processes"] = _PROCESSES.value
    if _WORKDIR.value:
        return run(_WORKDIR.value, **settings)
    with tempfile.TemporaryDirectory(prefix="ttt_jax_smoke_") as folder:
        return run(folder, **settings)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Kept; default: a folder that is removed.")
    _ONLY = flags.DEFINE_list("only", [], "Names of configs, or bench; default: all.")
    _SUBSTITUTE = flags.DEFINE_bool("substitute", True, "Noise for configs without their data.")
    _PROCESSES = flags.DEFINE_integer("processes", 2, "How many at a time.", 1)
    launch.run(main)
