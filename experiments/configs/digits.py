"""Scikit-learn's digits under 15 corruptions: the demo.

Command: ``make demo``, that is train, adapt and report with this config.

Cost: about three minutes on two CPU cores after the install; nothing is downloaded.

Expect: a BatchNorm model, as most deployed ones are. It errs on about 3 % of the clean test
images and on 47 % under severity-5 corruption (30 to 47 % by seed); test-time augmentation over
shifts does not help. Blending the statistics of the one image (``norm_prior``) takes off 2 points;
rotation TTT and MEMO on top of that take off 2 and 5 more. The composition, whose prediction blends
the statistics of all nine shifts, is at 38 %; ``norm_prior_views`` is the same without its gradient
steps, and as good. ``make demo-seeds`` repeats it for three seeds (about nine minutes) and reports
mean and standard error.

Other kinds of CPU give other figures: compilers round differently, and 1300 training steps let
that grow into another model. The corrupted error of seed 0 was 47.4 % on one CPU and 50.6 % on
another. On one machine the rows are the same each time, bit for bit.

Training uses the first 1257 of the 1437 training images. The last 180, under the four
validation corruptions, choose every tuple-valued setting below. Within a run, test
images and the 15 reported corruptions choose nothing. The candidates themselves, the model and the
fixed settings were set by hand after exploration that also saw test errors (the prior of 32 became
a candidate after a clean test error): a demonstration, not an unbiased benchmark.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the demo."""
    config = ml_collections.ConfigDict()
    config.seeds = (0,)
    config.data = ml_collections.ConfigDict(
        {
            "name": "tfds:digits",
            "dir": "",
            "in_memory": True,
            "train": "train[:1257]",
            "validation": "train[1257:]",
            "test": "test",
            "mean": 0.5,
            "std": 0.5,
        }
    )
    config.model = ml_collections.ConfigDict(
        {"name": "resnet", "depth": 8, "width": 8, "norm": "batch", "branch": 2}
    )
    config.views = ml_collections.ConfigDict({"padding": 1, "flip": False})
    config.train = ml_collections.ConfigDict(
        {
            "num_steps": 1300,
            "batch_size": 64,
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "aux_weight": 1.0,
            "statistics_momentum": 0.95,
            "log_every": 100,
            "save_every": 500,
        }
    )
    config.adapt = ml_collections.ConfigDict(
        {
            "severity": 5,
            "batch_size": 180,
            "chunk_size": 180,
            "corruption_seed": 0,
            # shuffled, sorted_by_label or dirichlet (correlated labels)
            "stream": "shuffled",
            "dirichlet_gamma": 0.1,
            # As many as there are validation corruptions: one program serves both.
            "parallel_streams": 4,
        }
    )
    config.methods = ml_collections.ConfigDict(
        {
            "source": {},
            "augmented": {"num_views": 48},
            "norm_prior": {"method": "source", "prior": 16},
            "norm_prior_views": {"method": "every_view", "prior": (16, 32)},
            "rotation": {
                "method": "ttt_rotation",
                "trace": True,
                "probe": "rotation",
                "copies": 8,
                "num_steps": 2,
                "learning_rate": (0.01, 0.03),
                "prior": 16,
                "select": "all",
            },
            "memo": {
                "trace": True,
                "probe": "memo",
                "num_views": 16,
                "num_steps": 1,
                "learning_rate": (0.01, 0.03),
                "prior": 16,
                "select": "all",
            },
            "rotation_memo_augmented": {
                "method": "rotation_memo",
                "serve": "every_view",
                "probe": "rotation",
                "copies": 8,
                "num_views": 8,
                "memo_weight": (0.3, 1.0),
                "num_steps": 2,
                "learning_rate": (0.003, 0.01),
                "prior": (16, 32),
                "select": "all",
            },
            "rotation_online": {
                "method": "ttt_rotation_online",
                "probe": "rotation",
                "copies": 8,
                "num_steps": 1,
                "learning_rate": (0.001, 0.003),
                "prior": 16,
                "select": "all",
            },
        },
        convert_dict=True,
    )
    return config


def sweep(add) -> None:
    """Three seeds."""
    for seed in range(3):
        add(seeds=(seed,))
