"""Right calls of diagnostics, metrics, audits, evaluation, tuning and training."""

import jax
import numpy as np
import optax

from tests.core import models
from tests.core.fuzz import things, use
from tests.core.fuzz.calls import Table
from ttt_jax import audit, diagnostics, evaluation, metrics, task, training, tuning

TABLE = Table()
add = TABLE.add
SELECT = {"select": things.FEW}
LOSSES = {"main_loss": things.main_loss, "aux_loss": things.entropy}
TREE = {"a": things.LOGITS}
MANY = dict(params=things.PARAMS, xs=things.IMAGES, keys=things.KEYS)

for name in ("gradient_alignment", "secant_smoothness", "shared_parameters"):
    do = None if name == "shared_parameters" else use.labeled
    add(f"diagnostics.{name}", getattr(diagnostics, name), do, **LOSSES, **SELECT)
ALIGNMENT = diagnostics.Alignment(*(np.float32(v) for v in (1.0, 0.5, 2.0, 1.0)))
add(
    "diagnostics.guaranteed_step",
    diagnostics.guaranteed_step,
    alignment=ALIGNMENT,
    smoothness=2.0,
    kinds={"alignment": "record", "smoothness": "number"},
    ranges={"smoothness": (0.0, -1.0, np.float32(-1.0))},
    allowed="smoothness: vector",
)
add(
    "diagnostics.feature_shift",
    diagnostics.feature_shift,
    traced=True,
    source=things.MOMENTS,
    target=things.MOMENTS,
    count=4,
    kinds={"source": "record", "target": "record"},
    ranges={"count": 1},
)
for name in ("step_size_map", "probe"):
    own = (
        dict(apply=things.one)
        if name == "step_size_map"
        else dict(classify=things.one, aux_loss=things.entropy, **SELECT)
    )
    add(
        f"diagnostics.{name}",
        getattr(diagnostics, name),
        use.predictor if name == "step_size_map" else use.pair,
        make=things.make,
        learning_rates=np.array([0.1, 0.2], np.float32),
        num_steps=1,
        **own,
        kinds={"classify": "apply", "accuracy": "function"},
        allowed="learning_rates: nan",
    )
for name in ("effective_classes", "predicted_classes"):
    add(
        f"diagnostics.{name}",
        getattr(diagnostics, name),
        logits=things.LOGITS,
        traced=True,
        allowed="logits: higher rank",
    )
add(
    "diagnostics.agreement",
    diagnostics.agreement,
    traced=True,
    logits=things.LOGITS,
    pristine_logits=things.OTHER_LOGITS,
    allowed="logits: higher rank, logits: nan, pristine_logits: nan",
)
add(
    "diagnostics.harm",
    diagnostics.harm,
    adapted_logits=things.LOGITS,
    pristine_logits=things.OTHER_LOGITS,
    labels=things.LABELS,
    allowed="adapted_logits: higher rank, adapted_logits: nan, pristine_logits: nan",
)
add("diagnostics.drift", diagnostics.drift, params=things.PARAMS, adapted=things.PARAMS, **SELECT)
add(
    "diagnostics.auxiliary_accuracy",
    diagnostics.auxiliary_accuracy,
    lambda accuracy: accuracy(things.PARAMS, things.IMAGE),
    apply=models.turn,
    kinds={"apply": "model"},
)
add(
    "diagnostics.lowest_entropy",
    diagnostics.lowest_entropy,
    lambda f: f(things.MAP),
    floor=1.0,
    ranges={"floor": -1.0},
)
add(
    "diagnostics.largest_change",
    diagnostics.largest_change,
    lambda f: f(things.MAP),
    threshold=0.5,
    ranges={"threshold": 90.0},
)
add(
    "diagnostics.oracle_select",
    diagnostics.oracle_select,
    outputs=things.MAP,
    labels=things.LABELS,
    allowed="outputs: nan",
)
add(
    "diagnostics.select_label_free",
    diagnostics.select_label_free,
    traced=True,
    outputs=things.MAP,
    criterion=diagnostics.largest_change(threshold=0.0),
    allowed="outputs: nan",
)
SHAPES = jax.eval_shape(
    jax.vmap(
        diagnostics.probe(
            things.one,
            things.entropy,
            things.make,
            select=things.FEW,
            learning_rates=[0.1, 0.2],
            num_steps=1,
        ),
        in_axes=(None, 0, 0),
    ),
    things.PARAMS,
    (things.IMAGES, things.LABELS),
    things.KEYS,
)
PROBES, INFO = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), SHAPES)
add(
    "diagnostics.summary",
    diagnostics.summary,
    only_refusals=True,
    probes=PROBES,
    info=INFO,
    labels=things.LABELS,
    rate_index=0,
    kinds={"probes": "record", "info": "record"},
    ranges={"classes_kept": 90.0, "rate_index": 5},
)

add(
    "metrics.classes",
    metrics.classes,
    logits=things.LOGITS,
    allowed="logits: higher rank, logits: lower rank, logits: nan",
)
for name in ("error", "helped", "harmed"):
    add(f"metrics.{name}", getattr(metrics, name), use.metric, label=None, kinds={"label": None})
add("metrics.agreement", metrics.agreement, use.metric)
add("metrics.mean", metrics.mean, use.metric, of=lambda out, source, examples: out[:, 0])
add(
    "metrics.ratio",
    metrics.ratio,
    use.metric,
    of=lambda out, source, examples: (out[:, 0], np.ones(len(out))),
)
add("metrics.by_step", metrics.by_step, use.metric, of_steps=lambda out, examples: out)
add(
    "metrics.cross_entropy",
    metrics.cross_entropy,
    use.metric,
    logits=lambda out: out,
    kinds={"logits": "function", "label": None},
)
add(
    "metrics.predicted_classes",
    metrics.predicted_classes,
    use.metric,
    num_classes=3,
    prediction=lambda out, source: metrics.classes(out),
    ranges={"num_classes": 0},
)
add(
    "metrics.bits_per_byte",
    metrics.bits_per_byte,
    use.metric,
    nats=lambda out: out[:, 0],
    count=lambda examples: np.ones(4),
    kinds={"count": "function"},
)
add("metrics.solved", metrics.solved, use.metric, answer=metrics.classes)
add("metrics.mean_iou", metrics.mean_iou, use.metric, num_classes=3, ranges={"num_classes": 0})

AUDIT = dict(num_steps=1, only_refusals=True, **MANY)
add("audit.check", audit.check, predictor=things.PREDICT, **AUDIT)
add("audit.check_adapter", audit.check_adapter, adapter=things.ADAPTER, apply=things.one, **AUDIT)
add("audit.differences", audit.differences, predictor=things.PREDICT, only_refusals=True, **MANY)
add(
    "audit.adapter_differences",
    audit.adapter_differences,
    adapter=things.ADAPTER,
    apply=things.one,
    **AUDIT,
)
add(
    "audit.copied_frozen",
    audit.copied_frozen,
    predictor=things.PREDICT,
    selection=things.FEW,
    only_refusals=True,
    **MANY,
)
add("audit.everything_but", audit.everything_but, use.selection, selection=things.FEW)
add(
    "audit.check_task",
    audit.check_task,
    task=things.TASK,
    kinds={"task": "task"},
    only_refusals=True,
)
for name, pair in (
    ("distance", ("a", "b")),
    ("relative_distance", ("a", "b")),
    ("require_close", ("actual", "expected")),
):
    add(
        f"audit.{name}",
        getattr(audit, name),
        **dict.fromkeys(pair, TREE),
        ranges={pair[0]: {"a": things.LOGITS[:2]}, pair[1]: {"b": things.LOGITS}},
    )
add("audit.scale", audit.scale, tree=TREE)
FOUND = audit.findings({"loop": 0.0})
add("audit.findings", audit.findings, values={"loop": 0.0}, ranges={"values": {"strange": 0.0}})
add("audit.require", audit.require, found=FOUND, ranges={"found": [0.5]})
add("audit.tolerance", audit.tolerance, num_steps=2)

EVALUATION = dict(task=things.TASK, params=things.PARAMS, role="validation", seed=0)
add(
    "evaluation.Evaluation",
    evaluation.Evaluation,
    **EVALUATION,
    only_refusals=True,
    allowed="params: function, params: not called",
)
add(
    "evaluation.evaluate",
    evaluation.evaluate,
    methods={"m": things.PREDICT},
    **EVALUATION,
    only_refusals=True,
    allowed="params: function, params: not called",
)
add(
    "evaluation.measured",
    evaluation.measured,
    params=things.PARAMS,
    task=things.TASK,
    seed=0,
    size=4,
    count=4,
    only_refusals=True,
    method=__import__("ttt_jax").FromSource(lambda p, x: x.mean(0), "mean", lambda s: None),
)
add(
    "evaluation.scope_of",
    evaluation.scope_of,
    method=things.PREDICT,
    kinds={"method": "predictor"},
    allowed="method: stream",
)
add("evaluation.source_of", evaluation.source_of, use.predictor, task=things.TASK)
add(
    "tuning.best",
    tuning.best,
    trials=[tuning.Trial({"error": 0.5}), tuning.Trial({"error": 0.1})],
    ranges={"trials": ([], [0.5])},
)
add(
    "tuning.score",
    tuning.score,
    task=things.TASK,
    rows=[things.ROW],
    kinds={"rows": "record"},
    ranges={"rows": ([], [0.5])},
)
add(
    "tuning.tried",
    tuning.tried,
    evaluation=evaluation.Evaluation(**EVALUATION),
    task=things.TASK,
    label="m",
    method=things.PREDICT,
    only_refusals=True,
    kinds={"label": None, "method": "predictor"},
    allowed="method: stream",
)

# Without a mesh its axis has no meaning.
TRYING = dict(
    allowed="axis: text, axis: upper",
    predictor=things.PREDICT,
    only_refusals=True,
    ranges={"max_seconds": -1.0},
    **MANY,
)
if hasattr(tuning, "fastest_chunk"):
    add("tuning.fastest_chunk", tuning.fastest_chunk, **TRYING)
    add("tuning.chunk_seconds", tuning.chunk_seconds, **TRYING)

STATE = (things.PARAMS, things.SGD.init(things.PARAMS["params"]))


def stepped(step):
    return step(*STATE, things.examples()._replace(tags={}), things.KEY)


add(
    "training.make_step",
    training.make_step,
    stepped,
    task=things.TASK,
    optimizer=things.SGD,
    auxiliary=training.Auxiliary("aux", things.over_batch_loss),
    main_select=things.FEW,
    follow=lambda params, views, key: params,
    ranges={
        "auxiliary": (
            training.Auxiliary("aux", models.classify, 1.0),
            training.Auxiliary("aux", things.over_batch_loss, float("nan")),
        )
    },
)
add(
    "training.batches_from",
    training.batches_from,
    data=[things.examples()],
    start=0,
    kinds={"data": "record"},
)
add(
    "training.blocks",
    training.blocks,
    step=lambda p, o, e, k: (p, o, {}),
    state=STATE,
    data=[things.examples()],
    key=things.KEY,
    start=0,
    total=2,
    only_refusals=True,
    kinds={"step": "function", "data": "record"},
)
add("training.learned", training.learned, params=things.PARAMS)
add(
    "task.take",
    task.take,
    examples=things.examples(),
    index=np.array([0, 1]),
    kinds={"index": "record"},
    ranges={"index": 9.5},
    allowed="index: none",
)
add(
    "task.in_batches",
    task.in_batches,
    batches=[things.examples()],
    size=2,
    count=4,
    kinds={"batches": "record"},
    ranges={"size": 0, "count": 0},
)
add("task.joined_tags", task.joined_tags, batches=[things.examples()], ranges={"batches": [0.5]})
add(
    "task.cells",
    task.cells,
    tags={"a": np.array([1, 1])},
    count=2,
    ranges={"count": 5, "tags": {"a": np.array([1, 1]), "b": np.array([1])}},
)
NOTHING_TO_SLIP = ()
assert optax
