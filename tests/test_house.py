"""The rules of the house: sizes, floors, and public names that are on their page."""

import ast
import functools
import importlib
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_MOST_LINES = 400
_MOST_PROGRAM_LINES = 200
_MOST_SCRIPT_LINES = 200
_MOST_FUNCTION_LINES = 80
_MOST_PARAMETERS = 8
# Python, JavaScript and CSS of experiments/.
_MOST_EXPERIMENT_LINES = 12715

# What is still too large. An entry goes when its file is mended; none is added.
_LARGE_FILES: set[str] = set()
_LARGE_PROGRAMS: set[str] = set()
_LARGE_FUNCTIONS = {
    "experiments/configs/cifar10c_level5.py:get_config",
    "experiments/configs/digits.py:get_config",
    "ttt_jax/methods/rotta.py:rotta",
}
_MANY_PARAMETERS: set[str] = set()
# The arrays of a formula and the choices of a layer are an argument each.
_LAYERS = (
    "ttt_jax/layers/ttt.py:ttt_",
    "ttt_jax/layers/decode.py:ttt_prefill",
    "ttt_jax/layers/fast_weights.py:fast_weight",
    "ttt_jax/layers/nnx.py:__init__",
)

# Each floor may import what stands below it, and its own members; top first. Names without a
# folder or file (yet) are of the design.
_FLOORS = (
    ("experiments", "benchmarks"),
    ("tuning", "evaluation", "training", "_programs", "_devices", "_chunks"),
    ("task", "metrics"),
    ("methods",),
    (
        *("audit", "_audit_task", "_audit_rows", "_audit_scores", "_audit_corpus", "_findings"),
        *("diagnostics", "meta"),
    ),
    (
        *("serving", "generation", "predictors", "online", "resets", "batching", "inner"),
        "budget",
    ),
    (
        "adapters",
        "_optimizers",
        "optimizers",
        "running_statistics",
        "losses",
        "select",
        "source",
        "neighbors",
        "passages",
        "rewards",
        "votes",
    ),
    ("views",),
    ("models", "data", "checkpoint", "readers"),
    ("layers",),
    ("kernels",),
    # The contract holds types alone, which models and checkpoints name too.
    ("base", "_contract", "_rules", "_arguments", "_grids"),
    ("_trees", "_checks", "_mixed", "_scans", "_varying", "_names", "_extras", "_version"),
)
_FLOOR = {name: height for height, names in enumerate(reversed(_FLOORS)) for name in names}
# Arrows that go up today.
_UPWARD = set()


def _sources(*tops):
    return sorted(
        path
        for top in tops
        for path in (_ROOT / top).rglob("*.py")
        if "__pycache__" not in path.parts
    )


def _name(path):
    return path.relative_to(_ROOT).as_posix()


def _length(path):
    return len(path.read_text(encoding="utf-8").splitlines())


@functools.cache
def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


_CODE = _sources("ttt_jax", "experiments", "benchmarks")


def test_no_file_is_too_long():
    large = {_name(path) for path in [*_CODE, *_sources("tests")] if _length(path) > _MOST_LINES}
    assert large == _LARGE_FILES


def test_programs_are_short():
    paths = {
        name: _ROOT / "experiments" / f"{name}.py"
        for name in ("train", "adapt", "sweep", "diagnose")
    }
    paths["report"] = _ROOT / "experiments" / "report" / "__main__.py"
    large = {name for name, path in paths.items() if _length(path) > _MOST_PROGRAM_LINES}
    assert large == _LARGE_PROGRAMS


def test_the_script_of_the_page_only_joins_libraries():
    path = _ROOT / "experiments" / "report" / "page.js"
    assert _length(path) <= _MOST_SCRIPT_LINES
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100


def test_experiments_only_shrink():
    kinds = {".py", ".js", ".css"}
    total = sum(
        _length(path)
        for path in (_ROOT / "experiments").rglob("*")
        if path.suffix in kinds and "results" not in path.parts
    )
    assert total <= _MOST_EXPERIMENT_LINES


def _functions():
    for path in _CODE:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{_name(path)}:{node.name}", node


def _statement_lines(node):
    """Lines of a function without its docstring: what documents its arguments is no length."""
    documented = ast.get_docstring(node) is not None
    doc = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - doc


def test_no_function_is_too_long():
    large = {name for name, node in _functions() if _statement_lines(node) > _MOST_FUNCTION_LINES}
    assert large == _LARGE_FUNCTIONS


def test_no_function_has_too_many_parameters():
    def count(node):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return sum(argument.arg not in ("self", "cls") for argument in every)

    # A method's settings are one keyword each, with the published default.
    many = {
        name
        for name, node in _functions()
        if count(node) > _MOST_PARAMETERS and not name.startswith(("ttt_jax/methods/", *_LAYERS))
    }
    assert many == _MANY_PARAMETERS


def _imported(path):
    """The modules that a file imports at run time, dotted."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "ttt_jax":
                yield from (f"ttt_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def _member(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "ttt_jax" and len(parts) > 1 else parts[0]


def test_imports_only_go_down():
    upward, unknown = set(), set()
    for path in _sources("ttt_jax"):
        here = path.relative_to(_ROOT / "ttt_jax").parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        unknown |= {here} - _FLOOR.keys()
        for module in _imported(path):
            there = _member(module)
            if there in _FLOOR and _FLOOR[there] > _FLOOR.get(here, len(_FLOORS)):
                upward.add((_name(path), there))
    assert unknown == set(), "give it a floor"
    assert upward == _UPWARD


def test_the_library_never_imports_the_programs():
    for path in _sources("ttt_jax"):
        assert not {_member(module) for module in _imported(path)} & {"experiments", "benchmarks"}


def test_the_experiments_never_import_the_benchmarks():
    for path in _sources("experiments"):
        assert "benchmarks" not in {_member(module) for module in _imported(path)}


def test_pallas_is_imported_by_kernels_alone():
    def outside(path):
        return not _name(path).startswith("ttt_jax/kernels/")

    users = {
        _name(path)
        for path in _CODE
        if outside(path) and any("pallas" in module for module in _imported(path))
    }
    assert users == set()


def _public_modules():
    names = {"ttt_jax"}
    for path in _sources("ttt_jax"):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        if parts[-1] == "__init__" or len(parts) == 2:
            if not any(part.startswith("_") and part != "__init__" for part in parts):
                names.add(".".join(parts).removesuffix(".__init__"))
    return sorted(names)


@pytest.mark.parametrize("name", _public_modules())
def test_public_names_are_listed(name):
    """``__all__`` says what a module gives, and each of it exists."""
    module = importlib.import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    for public in module.__all__:
        getattr(module, public)
