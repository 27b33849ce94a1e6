"""Right calls of adapters, predictors, losses, selections, resets and their helpers."""

import jax
import jax.numpy as jnp
import numpy as np

import ttt_jax as ttt
from tests.core import models
from tests.core.fuzz import things, use
from tests.core.fuzz.calls import Table
from ttt_jax import budget, inner, losses, neighbors, predictors, resets, select

TABLE = Table()
add = TABLE.add
SELECT = {"select": things.FEW}

add(
    "gradient_adapter",
    ttt.gradient_adapter,
    use.adapter,
    loss=things.entropy,
    optimizer=things.SGD,
    anchor=0.1,
    kinds={"anchor": "number"},
    ranges={"anchor": -1.0},
    **SELECT,
)
add(
    "sharpness_aware_adapter",
    ttt.sharpness_aware_adapter,
    use.adapter,
    loss=things.entropy,
    optimizer=things.SGD,
    rho=0.1,
    ranges={"rho": -1.0},
    **SELECT,
    peak_loss=lambda params: things.entropy,
    kinds={"peak_loss": "function"},
)
add(
    "statistics_adapter",
    ttt.statistics_adapter,
    use.of_batch(use.adapter),
    collect=models.batch_moments,
    momentum=0.9,
    kinds={"collect": "function"},
    ranges={"momentum": (-0.1, 90.0)},
)
add("filtered", ttt.filtered, use.adapter, adapter=things.ADAPTER, keep=things.always)
for module, name in ((ttt, "inner_loop"), (inner, "inner.observed_loop")):

    def steps(result):
        return result(things.PARAMS, things.ADAPTER.init(things.PARAMS), things.IMAGE, things.KEY)

    add(name, getattr(module, name.split(".")[-1]), steps, adapter=things.ADAPTER, num_steps=1)
add("inner.guarded", inner.guarded, use.adapter, adapter=things.ADAPTER)
add("inner.check_num_steps", inner.check_num_steps, num_steps=2, kinds={"num_steps": "count"})
add("source", ttt.source, use.predictor, apply=things.one)
add("augmented", ttt.augmented, use.predictor, apply=things.one, augment=models.jitter, num_views=2)
add("episodic", ttt.episodic, use.predictor, adapter=things.ADAPTER, apply=things.one, num_steps=1)
add(
    "vote",
    ttt.vote,
    use.predictor,
    predictor=things.PREDICT,
    num_votes=2,
    combine=lambda outputs: outputs.mean(0),
)
add(
    "online",
    ttt.online,
    use.predictor,
    adapter=things.ADAPTER,
    apply=things.one,
    reset=things.RESET,
)
add("episode", ttt.episode, use.predictor, stream=things.STREAM)
add("unroll", ttt.unroll, use.of_batch(use.predictor), stream=things.STREAM, remat=2)
add(
    "batched",
    ttt.batched,
    use.many,
    predictor=things.PREDICT,
    chunk_size=4,
    mesh=jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
)
add(
    "unbatched",
    ttt.unbatched,
    lambda apply: apply(things.PARAMS, things.IMAGE),
    apply=models.classify,
    # It takes functions of any number of arguments.
    allowed="apply: predictor, apply: loss",
)
add(
    "sample_keys",
    ttt.sample_keys,
    key=things.KEY,
    ids=np.arange(4),
    ranges={"ids": (np.array([-1, 0]), jnp.array([-1, 0]), np.array([2**32]))},
)
add(
    "source_statistics",
    ttt.source_statistics,
    fn=lambda params, batch: batch.mean(0),
    params=things.PARAMS,
    data=things.Batches(),
    kinds={"data": "record", "fn": "function"},
)

LOSS = {
    "rotation": dict(apply=models.turn, copies=2, augment=models.jitter),
    "masked_reconstruction": dict(apply=models.reconstruct, patch=models.PATCH, mask_ratio=0.5),
    "entropy": dict(apply=models.classify, weight=lambda logits: jnp.ones(logits.shape[0])),
    "marginal_entropy": dict(apply=models.classify, augment=models.jitter, num_views=2),
    "pseudo_label": dict(apply=models.classify, threshold=0.5),
    "denoising": dict(apply=models.decode, noise=0.1, num_copies=2),
    "contrastive": dict(apply=models.features, augment=models.jitter, bank=things.VECTORS),
    "reliable_entropy": dict(apply=models.classify, margin=0.5),
    "sample_adaptive_entropy": dict(apply=models.classify, num_classes=3, epsilon=0.5),
    "activation_matching": dict(
        collect=models.activations,
        source=losses.activation_moments(models.activations)(things.PARAMS, things.IMAGES),
        augment=models.jitter, num_views=3,
    ),
    "moment_matching": dict(
        features=models.features, source=things.MOMENTS, mean_weight=1.0, covariance_weight=1.0,
        queue=4,
    ),
}  # fmt: skip
OUT_OF_RANGE = {
    "rotation": {"copies": 0},
    "masked_reconstruction": {"mask_ratio": (0.0, 1.0, 75.0), "patch": 0, "num_masks": 0},
    "marginal_entropy": {"num_views": 0},
    "pseudo_label": {"threshold": 90.0},
    "denoising": {"noise": -0.1, "num_copies": 0},
    "contrastive": {"temperature": (0.0, -1.0)},
    "reliable_entropy": {"margin": -0.4},
    "sample_adaptive_entropy": {"epsilon": -1.0, "num_classes": 1, "decay": 90.0, "margin": -1.0},
    "activation_matching": {"num_views": 0},
    "moment_matching": {"mean_weight": -1.0, "covariance_weight": -1.0},
}
for name, arguments in LOSS.items():
    function = getattr(losses, name)
    # A model function that takes a key may take more by default; batch is a promise about x.
    add(
        f"losses.{name}",
        function,
        use.loss,
        ranges=OUT_OF_RANGE.get(name),
        **arguments,
        kinds={"bank": "array", "reference": "params"},
        # Functions of three arguments, as (params, images, keep) is.
        allowed="apply: predictor, apply: loss" if name == "masked_reconstruction" else "",
    )
add(
    "losses.activation_moments",
    losses.activation_moments,
    use.collected,
    collect=models.activations,
)
add("losses.feature_moments", losses.feature_moments, use.collected, features=models.features)
add(
    "losses.fisher_diagonal", losses.fisher_diagonal, use.collected, apply=models.classify, **SELECT
)
add("losses.over_batch", losses.over_batch, use.of_batch(use.loss), loss=things.entropy)
add(
    "losses.weighted",
    losses.weighted,
    use.loss,
    terms=((0.5, things.entropy),),
    kinds={"terms": "record"},
    ranges={
        "terms": (
            ((float("nan"), things.entropy),),
            ((things.entropy, 0.5),),
            ((0.5, losses.entropy),),
            ((0.5, things.ADAPTER),),
            ((np.ones(2), things.entropy),),
        )
    },
)
add(
    "select.paths",
    select.paths,
    use.selection,
    regex=(r"params/norm/.*",),
    kinds={"regex": "text"},
    ranges={"regex": (("(",), ("nothing",))},
)
add(
    "select.union",
    select.union,
    use.selection,
    selections=(things.FEW, select.biases()),
    kinds={"selections": "selection"},
)
add(
    "select.exclude",
    select.exclude,
    use.selection,
    base=select.everything(),
    minus=(things.FEW,),
    kinds={"minus": "selection"},
)
add("select.describe", select.describe, selection=things.FEW, params=things.PARAMS)

add("resets.every", resets.every, use.reset, n=2, kinds={"n": "count"}, ranges={"n": 0})
add(
    "resets.on_collapse",
    resets.on_collapse,
    use.reset,
    threshold=0.5,
    statistic=lambda output, info: info.loss.mean(),
    kinds={"threshold": "number"},
    ranges={"decay": (-0.1, 90.0)},
)
add(
    "resets.stochastic_restore",
    resets.stochastic_restore,
    use.reset,
    p=0.5,
    ranges={"p": (-0.1, 50.0)},
)

add(
    "neighbors.nearest",
    neighbors.nearest,
    features=things.VECTORS[0],
    bank=things.VECTORS,
    k=2,
    kinds={"features": "array"},
    ranges={"k": (0, 9)},
    allowed="features: higher rank, features: nan, bank: nan, swapped with bank",
)
add(
    "neighbors.finder",
    neighbors.finder,
    lambda find: find(things.PARAMS, things.IMAGE),
    features=models.features,
    pool=things.IMAGES,
    bank=things.VECTORS,
    k=2,
    kinds={"bank": "array"},
    ranges={"k": (0, 9)},
    allowed="bank: nan",
)
add(
    "neighbors.with_neighbors",
    neighbors.with_neighbors,
    use.adapter,
    adapter=things.over_batch_adapter(),
    find=things.neighbors_of,
)

add("budget.copy_bytes", budget.copy_bytes, adapter=things.ADAPTER, params=things.PARAMS)
COMPILED = jax.jit(lambda x: x + 1).lower(jnp.ones(2)).compile()
add("budget.used", budget.used, compiled=COMPILED, kinds={"compiled": "record"})
add(
    "budget.largest_chunk",
    budget.largest_chunk,
    compile_for=lambda size: COMPILED,
    limit=2**20,
    most=2,
    ranges={"most": 0, "sizes": ((4, 4), (8, 4), (0, 1), (4.5, 8))},
    allowed="limit: negative",
)
# One instance for which no memory is left: no chunk fits, whatever the limit's sign.
NOTHING_TO_SLIP = ("select.everything", "select.biases", "select.norm_affine", "select.lora",
                   "select.statistics", "resets.never", "budget.free_bytes",
                   "predictors.no_steps")  # fmt: skip
assert predictors.no_steps
