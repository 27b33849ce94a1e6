"""Long-tailed training sets: class sizes that fall exponentially.

Cui et al. 2019 ("Class-Balanced Loss Based on Effective Number of Samples", CVPR) and Cao et al.
2019 ("Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS).
"""

import numpy as np

from ttt_jax import _arguments
from ttt_jax.data.sources import Source


def class_sizes(available: np.ndarray, imbalance: float) -> np.ndarray:
    """How many examples each class keeps: ``floor(n * imbalance^(-c / (C - 1)))`` of class c.

    Args:
      available: integer ``[C]``, examples per class.
      imbalance: the largest class over the smallest, at least 1.

    Returns:
      int64 ``[C]``. ``n`` is the largest number for which every class has enough: the size of
      class 0 where all are equally large.

    Raises:
      ValueError: an ``imbalance`` below 1, fewer than two classes, or a class that would be empty.
    """
    if not (np.isfinite(imbalance) and imbalance >= 1):
        raise ValueError(f"imbalance must be finite and at least 1; got {imbalance!r}.")
    if len(available) < 2:
        raise ValueError(f"A long tail needs at least two classes; got {len(available)}.")
    shares = float(imbalance) ** (-np.arange(len(available)) / (len(available) - 1))
    # The nudge keeps floor() from losing an example to rounding.
    sizes = np.floor((available / shares).min() * shares + 1e-6).astype(np.int64)
    if sizes.min() < 1:
        raise ValueError(
            f"With imbalance = {imbalance} class {int(np.argmin(sizes))} would be empty (classes "
            f"have {available.tolist()} examples); lower it."
        )
    return sizes


@_arguments.checked(imbalance=_arguments.number(), seed=_arguments.count(0))
def long_tailed(source: Source, *, imbalance: float, seed: int) -> Source:
    """A part of a set whose class sizes fall exponentially from the first class to the last.

    Args:
      source: a set of about equally large classes, for training: tests stay balanced.
      imbalance: the largest class over the smallest; 10 and 100 are the usual ones.
      seed: which examples of each class stay.

    Returns:
      The part, in the order of ``source``, each example with its id.

    Raises:
      ValueError: as :func:`class_sizes`.
    """
    labels = source.labels()
    sizes = class_sizes(np.bincount(labels, minlength=source.num_classes), imbalance)
    rng = np.random.Generator(np.random.Philox(seed))
    kept = [
        rng.permutation(np.flatnonzero(labels == label))[:size] for label, size in enumerate(sizes)
    ]
    return source.subset(np.sort(np.concatenate(kept)))
