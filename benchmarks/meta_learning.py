"""Do weights that were trained so that adapting helps do better than jointly trained ones?

``python -m benchmarks.meta_learning --out=FILE`` trains a small vision transformer in three ways:

* ``joint``, as published test-time training does: classification plus the auxiliary loss;
* ``first`` and ``full``: the same, but the classification is that after inner steps on the
  auxiliary loss of the image (:func:`ttt_jax.meta.adapted_loss`), first order and full, once for
  each selection of what adapts: norms, low-rank factors, the last block, all.

All begin from the same joint training and then see the same images in the same order as often. At
test time all take equally many inner steps. What they are trained on are images as they are and
under five corruptions; the four of validation, on images held out of the training, choose the step
sizes (those of the inner steps in training, too); the ten other ones are reported, on test images.

The file has, for every auxiliary loss, training and selection, the share of right predictions
before and after adapting for every seed and shift, the cosine of main and auxiliary gradient under
the shifts of validation, and what ``first`` and ``full`` gain over ``joint`` after adapting, with
an interval by a bootstrap over test images.

Two CPU cores that others use too, ``--data=digits``: 18 minutes. One H200, ``--data=cifar10
--pack=FOLDER``: 6 minutes are expected.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

import ttt_jax as ttt
from benchmarks import meta_images, options
from benchmarks.discovery import interval
from benchmarks.meta_images import Images, Net, Split, floating
from benchmarks.meta_training import Place, adapter_of, runs_of, taken, trained
from experiments import launch, provenance

TRAININGS = ("joint", "first", "full")
LOSSES = ("rotation", "mae", "entropy")
SELECTIONS = ("norms", "low rank", "last block", "all")
# Settings that a flag left out takes from here.
SIZES: dict[str, dict[str, Any]] = {
    "digits": {
        "pretrain_steps": 1000,
        "steps": 200,
        "batch": 16,
        "train_images": 1257,
        "versions": 4,
        "validation_images": 90,
        "test_images": 180,
        "dtype": "float32",
    },
    "cifar10": {
        "pretrain_steps": 6000,
        "steps": 600,
        "batch": 64,
        "train_images": 30000,
        "versions": 1,
        "validation_images": 250,
        "test_images": 1000,
        "dtype": "bfloat16",
    },
}
SMOKE: dict[str, Any] = {
    "pretrain_steps": 4,
    "steps": 2,
    "block": 2,
    "batch": 4,
    "train_images": 40,
    "versions": 1,
    "validation_images": 8,
    "test_images": 8,
    "dtype": "float32",
    "aux": ("rotation",),
    "seeds": 1,
    "rates": ("0.1", "0.3"),
    "train_rates": ("0.1",),
    "selections": ("norms",),
    "chunk": 8,
}


def evaluator(net: Net, aux: str, settings: Any) -> Any:
    """``(params [R], masks [R], rates [R, K], images, ids) -> right [R, K, num_steps + 1, N]``."""

    def one(params: Any, mask: Any, rate: Any, images: Images, keys: Any) -> Any:
        adapter = adapter_of(net, aux, mask, rate)
        predict = ttt.episodic(
            adapter,
            lambda params, x: net.classify(params, x["image"][None])[0],
            num_steps=settings.num_steps,
            trace=True,
        )
        x = {"image": floating(images.image)}
        logits, _ = ttt.batched(predict, chunk_size=settings.chunk)(params, x, keys)
        return (logits.argmax(-1) == images.label[:, None]).T

    each = jax.vmap(jax.vmap(one, (None, None, 0, None, None)), (0, 0, 0, None, None))

    @jax.jit
    def run(params: Any, masks: Any, rates: Any, image: Any, label: Any, ids: Any) -> Any:
        keys = ttt.sample_keys(jax.random.key(1), ids)
        return each(params, masks, rates, Images(image, label, None), keys)

    return run


def candidates(settings: Any, places: list[Place], training: str) -> list[tuple[int, Place]]:
    """Runs that may be chosen for each selection: place in the stack, and what it stands for.

    One jointly trained network serves all selections.
    """
    if training != "joint":
        return list(enumerate(places))
    return [
        (index, place._replace(selection=name))
        for name in settings.selections
        for index, place in enumerate(places)
    ]


def chosen(right: np.ndarray, given: list[tuple[int, Place]], settings: Any) -> dict[str, Any]:
    """For each selection the rates with the most right predictions on validation, over seeds.

    Args:
      right: ``[R, K, N]``, after the last step.
      given: of :func:`candidates`, in the order of ``right``.
      settings: with the ``rates`` of the second axis.
    """
    best_of = {}
    for name in settings.selections:
        shares = {}
        for train_rate in dict.fromkeys(place.rate for _, place in given):
            rows = [
                index
                for index, (_, place) in enumerate(given)
                if place.selection == name and place.rate == train_rate
            ]
            for number, rate in enumerate(map(float, settings.rates)):
                shares[train_rate, rate] = float(right[rows, number].mean()), rows, number
        best = max(shares, key=lambda pair: shares[pair][0])
        table = [{"train_rate": a, "rate": b, "validation": shares[a, b][0]} for a, b in shares]
        best_of[name] = {
            "train_rate": best[0],
            "rate": best[1],
            "rows": shares[best][1],
            "candidates": table,
        }
    return best_of


def measured(
    net: Net, aux: str, made: dict[str, Any], split: Split, settings: Any, programs: Any
) -> Any:
    """Rows of every training: chosen on validation, then read on the reported shifts."""
    evaluate, align = programs
    validation = meta_images.joined(split.validation)
    reported = meta_images.joined(split.reported)
    rates = jnp.asarray(list(map(float, settings.rates)), jnp.float32)
    for training, (places, params, loss) in made["parts"].items():
        given = candidates(settings, places, training)
        stack = taken(params, [index for index, _ in given])
        masks = runs_of(net, [place for _, place in given]).mask
        tried = jnp.broadcast_to(rates, (len(given), len(rates)))
        right = np.asarray(evaluate(stack, masks, tried, *validation))
        choices = chosen(right[:, :, -1], given, settings)
        rows = [row for name in settings.selections for row in choices[name]["rows"]]
        own = jnp.asarray([[choices[given[row][1].selection]["rate"]] for row in rows], jnp.float32)
        picked, masks = taken(stack, rows), taken(masks, rows)
        keys = ttt.sample_keys(jax.random.key(2), validation.id)
        cosine = np.asarray(align(picked, masks, validation.image, validation.label, keys))
        read = np.asarray(evaluate(picked, masks, own, *reported))[:, 0]
        for number, name in enumerate(settings.selections):
            here = slice(number * settings.seeds, (number + 1) * settings.seeds)
            # [seeds, steps + 1, shifts, images].
            each = read[here].reshape(settings.seeds, read.shape[1], len(split.reported), -1)
            choice = {k: v for k, v in choices[name].items() if k != "rows"}
            yield (
                {"aux": aux, "training": training, "selection": name, **choice}
                | {"outer_loss": float(np.mean(loss))}
                | _summary(each, cosine[here], list(split.reported)),
                each[:, -1],
            )


def _summary(right: np.ndarray, cosine: np.ndarray, shifts: list[str]) -> dict[str, Any]:
    by_seed = right.mean((2, 3))
    by_shift = right.mean((0, 3))
    return {
        "before": by_seed[:, 0].tolist(),
        "after": by_seed[:, -1].tolist(),
        "by_step": by_seed.mean(0).tolist(),
        "shifts": {
            name: [float(by_shift[0, at]), float(by_shift[-1, at])]
            for at, name in enumerate(shifts)
        },
        "helped": interval((right[:, -1] * 1.0 - right[:, 0]).mean((0, 1))),
        "cosine": cosine.mean(1).tolist(),
        "cosine_positive": float((cosine > 0).mean()),
    }


def gain(after: np.ndarray, joint: np.ndarray) -> dict[str, Any]:
    """Of one training over the joint one: right predictions ``[seeds, shifts, images]`` of both."""
    change = after * 1.0 - joint
    return {
        "gain": float(change.mean()),
        "interval": interval(change.mean((0, 1))),
        "by_seed": change.mean((1, 2)).tolist(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Percent right before and after, of each training, and the gain over the joint one."""
    layout = "{:9} {:10} {:8} {:>7} {:>7} {:>6} {:>6} {:>7}  {}"
    head = ("aux", "adapts", "training", "before", "after", "rate", "train", "cosine")
    lines = [layout.format(*head, "over joint, after")]
    for row in rows:
        over = ""
        if "over_joint" in row:
            low, high = (100 * end for end in row["over_joint"]["interval"])
            over = f"{100 * row['over_joint']['gain']:+.2f} [{low:+.2f}, {high:+.2f}]"
        numbers = [f"{100 * np.mean(row[name]):.2f}" for name in ("before", "after")]
        numbers += [f"{row['rate']:g}", f"{row['train_rate']:g}", f"{np.mean(row['cosine']):.3f}"]
        lines.append(layout.format(row["aux"], row["selection"], row["training"], *numbers, over))
    return "\n".join(lines)


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Trains and measures with each auxiliary loss, and writes the record after each row."""
    with settings.unlocked():
        for name, value in {**SIZES[settings.data], **(SMOKE if settings.smoke else {})}.items():
            if settings.smoke or settings.get(name) is None:
                settings[name] = value
    launch.chosen("auxiliary loss", settings.aux, LOSSES)
    launch.chosen("training", settings.trainings, TRAININGS)
    launch.chosen("selection", settings.selections, SELECTIONS)
    path = launch.new_file(out)
    config = meta_images.config_of(settings)
    test, split = meta_images.split_of(config, settings)
    net = meta_images.network(config, test, settings.views)
    record = provenance.of(settings) | {"shifts": {"trained": meta_images.TRAINED}}
    record["shifts"] |= {"validation": list(split.validation), "reported": list(split.reported)}
    record |= {"data": test.title, "trainings": [], "rows": []}
    for aux in settings.aux:
        made = trained(net, aux, split.training, settings)
        record["trainings"].append({"aux": aux, **{k: made[k] for k in ("steps", "seconds")}})
        launch.write_json(path, record)
        programs = evaluator(net, aux, settings), meta_images.alignments(net, aux, settings.chunk)
        after: dict[tuple[str, str], np.ndarray] = {}
        for row, right in measured(net, aux, made, split, settings, programs):
            after[row["training"], row["selection"]] = right
            joint = after.get(("joint", row["selection"]))
            if joint is not None and row["training"] != "joint":
                row["over_joint"] = gain(right, joint)
            record["rows"].append(row)
            launch.write_json(path, record)
    print(table(record["rows"]))
    return record


if __name__ == "__main__":
    sizes = ("pretrain_steps", "steps", "batch", "train_images", "versions")
    sizes += ("validation_images", "test_images")
    _FLAGS = {
        "out": flags.DEFINE_string("out", None, "The JSON file to write."),
        "data": flags.DEFINE_enum("data", "digits", list(SIZES), "Which images."),
        "pack": flags.DEFINE_string(
            "pack", "", "Folder of CIFAR-10 as packed JPEG files, or of TFDS for digits."
        ),
        "aux": flags.DEFINE_list("aux", ["rotation"], "Auxiliary losses: " + ", ".join(LOSSES)),
        "trainings": flags.DEFINE_list("trainings", list(TRAININGS), "Ways to train."),
        "selections": flags.DEFINE_list("selections", list(SELECTIONS), "What adapts."),
        "seeds": flags.DEFINE_integer("seeds", 3, "How many, from 0 on.", 1),
        "num_steps": flags.DEFINE_integer("num_steps", 1, "Inner steps.", 1),
        "rates": flags.DEFINE_list(
            "rates", ["0.003", "0.01", "0.03", "0.1", "0.3"], "Step sizes at test time."
        ),
        "train_rates": flags.DEFINE_list(
            "train_rates", ["0.03"], "Step sizes in training, of what is meta-learned."
        ),
        "outer_rate": flags.DEFINE_float("outer_rate", 1e-3, "Of the outer training.", 0.0),
        "views": flags.DEFINE_integer("views", 4, "Masks, and views of the entropy.", 1),
        "severity": flags.DEFINE_integer("severity", 5, "Of shifts to choose on and report.", 1, 5),
        "block": flags.DEFINE_integer("block", 50, "Outer steps of a call.", 1),
        "chunk": flags.DEFINE_integer("chunk", 32, "Images of a run adapted at once.", 1),
        "outer_chunk": flags.DEFINE_integer("outer_chunk", 32, "Of the outer gradient; 0: all.", 0),
        "dtype": flags.DEFINE_string("dtype", None, "Of computation; None: that of the data."),
        "seconds": flags.DEFINE_integer("seconds", 0, "Of a training, at most; 0: no limit.", 0),
        "smoke": flags.DEFINE_bool("smoke", False, "Tiny, for a CPU in seconds."),
        **{name: flags.DEFINE_integer(name, None, "None: that of the data.", 0) for name in sizes},
    }
    flags.mark_flag_as_required("out")
    options.start(run, _FLAGS)
