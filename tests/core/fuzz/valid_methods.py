"""Right calls of every method."""

from tests.core import models
from tests.core.fuzz import things, use
from tests.core.fuzz.calls import Table
from ttt_jax import methods

TABLE = Table()
OWN = {
    "source": dict(classify=models.classify),
    "augmented": dict(classify=models.classify, augment=models.jitter, num_views=2),
    "every_view": dict(classify=models.classify, views=things.views),
    "mean_over_views": dict(classify=models.classify, views=things.views),
    "bn_adapt": dict(classify=models.classify),
    "ttt_rotation": dict(classify=models.classify, rotation=models.turn, copies=2),
    "ttt_rotation_online": dict(classify=models.classify, rotation=models.turn, copies=2),
    "ttt_rotation_statistics": dict(
        classify=models.classify, rotation_statistics=things.turn_statistics, copies=2
    ),
    "ttt_mae": dict(
        classify=models.classify, reconstruct=models.reconstruct, patch=models.PATCH, num_masks=2
    ),
    "ttt_denoising": dict(
        classify=models.classify, denoise=models.decode, noise=0.1, num_copies=2
    ),
    "memo": dict(classify=models.classify, augment=models.jitter, num_views=2),
    "rotation_memo": dict(
        classify=models.classify, rotation=models.turn, augment=models.jitter, copies=2,
        num_views=2,
    ),
    "rotation_memo_online": dict(
        classify=models.classify, rotation=models.turn, augment=models.jitter, copies=2,
        num_views=2,
    ),
    "neighbors": dict(
        classify=models.classify, rotation=models.turn, features=models.features, copies=2, k=2
    ),
    "tent": dict(classify=models.classify),
    "pseudo_label": dict(classify=models.classify),
    "eata": dict(classify=models.classify, num_classes=3),
    "rdumb": dict(classify=models.classify, num_classes=3),
    "sar": dict(classify=models.classify),
    "rpl": dict(classify=models.classify),
    "deyo": dict(classify=models.classify, patches=2),
    "cotta": dict(classify=models.classify, augment=models.jitter, num_views=2),
    "dua": dict(
        classify=models.classify, statistics=models.batch_moments, augment=models.jitter,
        num_views=2,
    ),
    "note": dict(
        classify=models.classify, classify_statistics=things.train_statistics,
        like=things.IMAGE, num_classes=3, capacity=4, update_every=4,
    ),
    "rotta": dict(
        classify=models.classify, classify_statistics=things.train_statistics,
        augment=models.jitter, like=things.IMAGE, num_classes=3, capacity=4, update_every=4,
    ),
    "t3a": dict(features=models.features, linear=things.linear, num_supports=4),
    "lame": dict(classify=models.classify, features=models.features, num_neighbors=2),
    "actmad": dict(classify=models.classify, activations=models.activations, augment=models.jitter,
                   num_views=2),
    "ttt_plus_plus": dict(
        classify=models.classify, features=models.features, project=models.features,
        augment=models.jitter, queue=4, count=8,
    ),
}  # fmt: skip
OUT_OF_RANGE = {
    "ttt_rotation_statistics": {"statistics_momentum": 90.0},
    "ttt_mae": {"mask_ratio": 75.0},
    "ttt_denoising": {"noise": -1.0},
    "pseudo_label": {"threshold": 90.0},
    "eata": {"epsilon": -1.0, "fisher_weight": -1.0, "margin": -1.0, "num_classes": 1},
    "rdumb": {"epsilon": -1.0, "margin": -1.0, "num_classes": 1},
    "sar": {"margin": -1.0, "rho": -1.0},
    "rpl": {"q": (0.0, 1.5)},
    "deyo": {"patches": 1, "entropy_margin": -1.0, "margin": -1.0},
    "cotta": {"threshold": 92.0, "decay": 99.0},
    "dua": {"momentum": 10.0, "decay": 94.0, "floor": 5.0},
    "note": {"momentum": 10.0, "num_classes": 1, "capacity": 0},
    "rotta": {"momentum": 10.0, "decay": 99.0, "timeliness": -1.0, "uncertainty": -1.0},
    "ttt_plus_plus": {"encoder_weight": -1.0, "temperature": 0.0, "queue": 1, "count": 1},
    "lame": {"num_neighbors": 0},
}
# Every selection of the defaults has nothing to choose in a model without such layers; this has.
for name, arguments in OWN.items():
    function = getattr(methods, name)
    table = Table()
    table.add(name, function)
    known = table[name].parameters()
    given = dict(arguments)
    if "select" in known:
        given["select"] = things.FEW
    if "num_steps" in known:
        given["num_steps"] = 1
    in_batches = "batch" in known and known["batch"].default
    if "serve" in known:
        given["serve"] = models.classify if in_batches else things.one
    do = use.of_batch(use.predictor) if in_batches else use.predictor
    if name == "mean_over_views":
        do = lambda serve: serve(things.PARAMS, things.IMAGE)  # noqa: E731
    TABLE.add(
        f"methods.{name}",
        function,
        do,
        ranges=OUT_OF_RANGE.get(name),
        **given,
        # Functions of three arguments, as (params, images, keep) is.
        allowed="reconstruct: predictor, reconstruct: loss",
    )
NOTHING_TO_SLIP = ()
