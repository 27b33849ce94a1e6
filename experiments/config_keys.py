"""Every key of a config in one table: its rule, what it means, and what its absence means.

:mod:`experiments.config_check` holds a config against it. A file of ``experiments/tasks`` has
``KEYS``, a table of the same form, for what only its task reads.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be: ``says`` after "must", and whether a value ``holds`` to it."""

    says: str
    holds: Callable[[Any], bool]

    def sentence(self, name: str, value: Any) -> str:
        """What is wrong with a value that does not hold."""
        says = self.says
        if says.startswith("be at least") and not _is_whole(value):
            says = says.replace("be ", "be an integer of ", 1)
        return f"{name} must {says}; got {value!r}."


class Key(NamedTuple):
    """A key of a config.

    Attributes:
      rule: of its value.
      meaning: what it sets, for a person.
      default: what its absence means; :data:`NEEDED` where it must be there, and :data:`ABSENT`
        where nothing takes its place.
      needed_with: ``(key, value)``: it must be there where the other key has that value.
    """

    rule: Rule
    meaning: str
    default: Any
    needed_with: tuple[str, Any] | None = None


NEEDED, ABSENT = object(), object()


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole(least: int, most: int | None = None) -> Rule:
    """An integer within bounds."""
    says = f"at least {least}" + ("" if most is None else f" and at most {most}")
    top = math.inf if most is None else most
    return Rule(f"be {says}", lambda value: _is_whole(value) and least <= value <= top)


def number(least: float, most: float = math.inf) -> Rule:
    """A finite number within bounds."""
    upper = f" and at most {most:g}" if most < math.inf else ""
    says = f"be a finite number of at least {least:g}{upper}"
    return Rule(says, lambda value: _is_number(value) and least <= value <= most)


def share() -> Rule:
    """A share that leaves something on both sides."""
    return Rule(
        "be a number between 0 and 1, neither included",
        lambda value: _is_number(value) and 0 < value < 1,
    )


def among(*names: str) -> Rule:
    """One of some values."""
    return Rule(
        f"be one of {list(names)}",
        lambda value: isinstance(value, type(names[0])) and value in names,
    )


def either(*names: str | None, rule: Rule) -> Rule:
    """One of some words, or what another rule says."""
    says = f"{rule.says}, or {' or '.join(map(repr, names))}"
    return Rule(says, lambda value: rule.holds(value) or value in names)


def per_channel(least: float) -> Rule:
    """A number, or one for each channel of the images; ``least`` is not included if positive."""
    above = "above 0" if least else "finite"

    def fits(value: Any) -> bool:
        return _is_number(value) and (not least or value > 0)

    def holds(value: Any) -> bool:
        if isinstance(value, tuple | list):
            return len(value) > 0 and all(map(fits, value))
        return fits(value)

    return Rule(f"be a number or one per channel, such as (0.5, 0.5, 0.5), {above}", holds)


def _are_seeds(value: Any) -> bool:
    if not isinstance(value, tuple | list) or not value:
        return False
    return all(_is_whole(seed) and seed >= 0 for seed in value) and len({*value}) == len(value)


TEXT = Rule("be a text", lambda value: isinstance(value, str))
NAME = Rule("be a text that is not empty", lambda value: isinstance(value, str) and value != "")
FLAG = Rule("be True or False", lambda value: isinstance(value, bool))
ANY = Rule("be anything", lambda value: True)
_SPLIT = Rule("be a split such as 'test' or 'train[:1000]'", NAME.holds)
_SEEDS = Rule("list at least one integer from 0 on, each once", _are_seeds)

# Of every task.
COMMON: Mapping[str, Key] = {
    "task": Key(NAME, "a file of experiments/tasks, or PACKAGE.MODULE:NAME", "images"),
    "seeds": Key(_SEEDS, "one model per seed", NEEDED),
    "data.name": Key(TEXT, "the set, tfds:NAME or npz:PATH", NEEDED),
    "model.name": Key(NAME, "the model, or PACKAGE.MODULE:NAME", NEEDED),
    "train.aux": Key(
        NAME, "the auxiliary task: rotation, mae, contrastive, none or an import path", "rotation"
    ),
    "train.aux_weight": Key(number(0), "of the auxiliary loss in the sum, 1 left out", ABSENT),
    "train.num_steps": Key(whole(1), "steps of a training", NEEDED),
    "train.batch_size": Key(whole(1), "instances per step", NEEDED),
    "train.optimizer": Key(
        among("sgd", "adamw"), "sgd with train.momentum, or adamw, which decays matrices", "sgd"
    ),
    "train.learning_rate": Key(number(0), "step size at its largest", NEEDED),
    "train.momentum": Key(number(0, 1), "of sgd", ABSENT, needed_with=("train.optimizer", "sgd")),
    "train.weight_decay": Key(number(0), "of all parameters; of matrices for adamw", NEEDED),
    "train.schedule": Key(
        among("cosine", "step"), "of the step size; step: a tenth at 1/2 and at 5/6", "cosine"
    ),
    "train.warmup_steps": Key(whole(0), "steps in which the step size climbs from 0", 0),
    "train.steps_per_call": Key(whole(1), "steps per call, with the set on its device", 1),
    # Of its value, and that it needs an auxiliary task, train speaks.
    "train.main_select": Key(ANY, "the parameters that the main task trains", "all"),
    "train.mask_ratio": Key(share(), "share of the patches that are hidden", 0.75),
    "train.log_every": Key(whole(1), "steps between two lines of metrics.jsonl", NEEDED),
    "train.save_every": Key(whole(1), "steps between two saved states", NEEDED),
    "adapt.batch_size": Key(whole(1), "instances per batch", NEEDED),
    "adapt.chunk_size": Key(
        either("fastest", None, rule=whole(0)),
        "instances at once; 0: as many as fit; None: 'fastest', on a CPU the whole batch",
        None,
    ),
    "adapt.parallel_streams": Key(whole(1), "streams adapted side by side", 16),
}

# Of images, beside what all tasks have.
IMAGES: Mapping[str, Key] = {
    "data.dir": Key(TEXT, "where TFDS sets lie, '' for TFDS's own folder", NEEDED),
    "data.train": Key(_SPLIT, "the split that trains", NEEDED),
    "data.validation": Key(_SPLIT, "the split that chooses settings", NEEDED),
    "data.test": Key(_SPLIT, "the split that is reported", NEEDED),
    "data.in_memory": Key(FLAG, "whether all images are read at once", NEEDED),
    "data.mean": Key(per_channel(0), "subtracted from images in [0, 1]", NEEDED),
    "data.std": Key(per_channel(1), "divides what is left", NEEDED),
    "data.domain": Key(NAME, "what rows call the test images as they are", "clean"),
    "data.imbalance": Key(number(1), "largest class of the training split over the smallest", 1),
    "views.padding": Key(whole(0), "pixels by which crops shift", NEEDED),
    "views.flip": Key(FLAG, "whether views are mirrored at random", NEEDED),
    "views.rim": Key(among("black", "edge"), "what crops show beyond the image", "edge"),
    "train.statistics_momentum": Key(number(0, 1), "of the statistics of BatchNorm", ABSENT),
    "adapt.selection_passes": Key(whole(1), "passes of the streams that choose settings", 1),
    "adapt.severity": Key(whole(1, 5), "of the corruptions", NEEDED),
    "adapt.corruption_seed": Key(whole(0), "of the corruptions' noise", NEEDED),
    "adapt.corruptions": Key(
        among("standard", "none"), "the 15 of the benchmark, or the images as they are", "standard"
    ),
    "adapt.stream": Key(
        among("shuffled", "sorted_by_label", "dirichlet"), "the order of the images", NEEDED
    ),
    "adapt.sequence": Key(
        among("none", "domains", "mixed", "gradual"), "the order of the domains", "none"
    ),
    "adapt.dirichlet_gamma": Key(
        Rule("be a number above 0", lambda value: _is_number(value) and value > 0),
        "how mixed the classes of a dirichlet stream are",
        ABSENT,
        needed_with=("adapt.stream", "dirichlet"),
    ),
    "model.dtype": Key(
        among("float32", "bfloat16", "float16"), "in which the model computes", "float32"
    ),
}

# Of reference models; the model says which of them it has.
MODEL: Mapping[str, Key] = {
    **{
        f"model.{name}": Key(whole(1), f"{name.replace('_', ' ')} of the model", ABSENT)
        for name in (
            *("depth", "width", "groups", "rotation_classes", "patch", "heads"),
            *("decoder_width", "decoder_depth"),
        )
    },
    **{
        f"model.{name}": Key(whole(0), f"{name.replace('_', ' ')} of the model", ABSENT)
        for name in ("branch", "projection", "head_depth", "num_prompts")
    },
    "model.decoder_heads": Key(
        either(None, rule=whole(1)), "attention heads of the decoder", ABSENT
    ),
}

# Settings of methods: of the optimizer and of the program, then counts of the methods themselves.
METHOD: Mapping[str, Key] = {
    "method": Key(NAME, "a function of ttt_jax.methods, or PACKAGE.MODULE:NAME", ABSENT),
    "episodic": Key(FLAG, "whether a stream is pristine again at each batch", ABSENT),
    "augment": Key(NAME, "a head of the task, or PACKAGE.MODULE:NAME", ABSENT),
    "source_examples": Key(
        either(None, rule=whole(1)), "training examples that are measured", ABSENT
    ),
    "source_batch": Key(whole(1), "how many of them at once", ABSENT),
    "optimizer": Key(NAME, "sgd or adam", ABSENT),
    "learning_rate": Key(number(0), "step size", ABSENT),
    "momentum": Key(either(None, rule=number(0, 1)), "of sgd", ABSENT),
    "nesterov": Key(FLAG, "whether it is Nesterov's", ABSENT),
    "weight_decay": Key(either(None, rule=number(0)), "added to the gradient", ABSENT),
    "b2": Key(number(0, 1), "of adam: how much of the second moment is kept", ABSENT),
    "eps": Key(number(0), "of adam: added to the root of the second moment", ABSENT),
}
# Of the functions of ttt_jax.methods alone: one of a user's own may mean something else by them.
ARGUMENTS: Mapping[str, Rule] = {
    **dict.fromkeys(("num_views", "num_masks", "num_votes", "num_copies"), whole(1)),
    "copies": either(None, rule=whole(1)),
    "num_steps": whole(0),
    "mask_ratio": share(),
    "trace": FLAG,
    "select": NAME,
    "reset": Rule(
        "be 'never' or an integer of at least 1",
        lambda value: value == "never" or (_is_whole(value) and value >= 1),
    ),
}

# Settings of methods that are arguments of the heads of images.
IMAGE_HEADS: Mapping[str, Key] = {
    "prior": Key(number(0), "weight of the source statistics of BatchNorm", ABSENT),
    "norm": Key(ANY, "statistics of BatchNorm: running, batch or a weight", ABSENT),
    "probe": Key(either(None, rule=NAME), "the auxiliary loss read before and after", ABSENT),
    "serve": Key(NAME, "plain, or every_view: the mean over all views", ABSENT),
    "view_stride": Key(whole(1), "every how many-th view", ABSENT),
}

# Keys that a config may leave out, and what their absence means.
DEFAULTS: dict[str, Any] = {
    name: key.default
    for name, key in {**COMMON, **IMAGES}.items()
    if key.default is not NEEDED and key.default is not ABSENT and name != "task"
}
