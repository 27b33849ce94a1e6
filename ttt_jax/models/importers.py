"""Public weights for the reference models."""

import difflib
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ttt_jax import _arguments
from ttt_jax.models.initialize import init
from ttt_jax.models.initializers import xavier_uniform
from ttt_jax.models.resnet import ResNet


@_arguments.checked(
    path=_arguments.path, branch=_arguments.count(), rotation_classes=_arguments.count()
)
def load_resnet26_npz(
    path: str | os.PathLike[str],
    key: jax.Array | None = None,
    *,
    branch: int = 2,
    rotation_classes: int = 4,
    conv: str = "auto",
    dtype: Any = jnp.float32,
) -> tuple[ResNet, dict[str, Any]]:
    """Reads the public CIFAR-10 ResNet-26 with GroupNorm of the MEMO project.

    The file holds one array per parameter, named by its path joined with ``/``; kernels are
    HWIO. Its inputs are ``(x / 255 - 0.5) / 0.5``, NHWC, 32x32 RGB. It has no rotation branch:
    the branch starts as a copy of the layers that follow ``layer{branch}``, with a fresh
    ``rotation_fc``, and wants training before it can drive an adaptation.

    Args:
      path: the ``.npz`` file.
      key: for ``rotation_fc``; ``None`` is ``jax.random.key(0)``.
      branch: see :class:`ttt_jax.models.ResNet`.
      rotation_classes: outputs of the rotation head.
      conv: the form of the convolutions.
      dtype: the compute dtype.

    Returns:
      ``(module, variables)``, the variables float32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no ``.npz``, or its names, shapes or dtypes are not those of this
        network.
    """
    module = ResNet(
        depth=26,
        width=16,
        num_classes=10,
        groups=8,
        branch=branch,
        rotation_classes=rotation_classes,
        conv=conv,
        dtype=dtype,
    )
    key = jax.random.key(0) if key is None else key
    shapes = jax.eval_shape(lambda key: init(module, key, (32, 32, 3)), key)["params"]
    expected = {
        name: leaf
        for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
        if not name.startswith("rotation_")
    }
    loaded = _read(path)
    _check_names(path, set(loaded), set(expected))
    for name, leaf in expected.items():
        if loaded[name].shape != leaf.shape or loaded[name].dtype != np.float32:
            raise ValueError(
                f"{os.fspath(path)}: {name!r} must be float32 {leaf.shape}, the file holds "
                f"{loaded[name].dtype} {loaded[name].shape}: it is another network's."
            )
    params = traverse_util.unflatten_dict(
        {name: jnp.asarray(leaf) for name, leaf in loaded.items()}, sep="/"
    )
    # The rest of the branch is copied, so its head is all that needs random values.
    head = nn.Dense(rotation_classes, kernel_init=xavier_uniform)
    params["rotation_fc"] = head.init(key, jnp.zeros((1, 64)))["params"]
    return module, module.finish_init({"params": params})


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{os.fspath(path)} must be an .npz archive of plain arrays, reading it failed with "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_names(path: str | os.PathLike[str], found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if not missing and not extra:
        return
    name = (missing or extra)[0]
    close = difflib.get_close_matches(name, sorted(extra if missing else expected), n=1, cutoff=0.4)
    hint = f"; the nearest name is {close[0]!r}" if close else ""
    raise ValueError(
        f"{os.fspath(path)} must hold exactly the {len(expected)} parameters of the ResNet-26, but "
        f"{len(missing)} are missing and {len(extra)} unknown, first {name!r}{hint}: it is the "
        "checkpoint of another network."
    )
