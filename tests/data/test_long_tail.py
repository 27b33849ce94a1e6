"""Long-tailed parts of a set: sizes by hand, ids, order, what is refused."""

import numpy as np
import pytest

from ttt_jax import data
from ttt_jax.data import long_tail


def test_sizes_are_those_of_cifar10_lt():
    # Cao et al. 2019 with 5000 images per class; the sum 12406 is the size of CIFAR-10-LT.
    sizes = long_tail.class_sizes(np.full(10, 5000), 100)
    assert sizes.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert sizes.sum() == 12406


def test_a_small_class_makes_all_smaller():
    # 10^(-c/2): shares 1, 0.3162, 0.1; the middle one has 60 / 0.3162 = 189.7 for the first.
    assert long_tail.class_sizes(np.array([200, 60, 200]), 10).tolist() == [189, 60, 18]


def test_a_part_keeps_ids_order_images_and_split(tfds_dir):
    source = data.load("tfds:digits", "train[100:1000]", data_dir=tfds_dir)
    part = data.long_tailed(source, imbalance=5, seed=0)
    available = np.bincount(source.labels())
    expected = long_tail.class_sizes(available, 5)
    np.testing.assert_array_equal(np.bincount(part.labels()), expected)
    assert (np.diff(part.ids) > 0).all() and part.split == source.split
    whole = data.load("tfds:digits", "train", data_dir=tfds_dir)
    for held in (part, part.in_memory()):
        assert len(held) == expected.sum() == len(held.arrays().label)
        for place in (0, 17, len(held) - 1):
            one, original = held[place], whole[held[place].id]
            assert one.label == original.label
            np.testing.assert_array_equal(one.image, original.image)
    assert part.in_memory().fingerprint == part.fingerprint != source.fingerprint
    other = data.long_tailed(source, imbalance=5, seed=1)
    assert set(other.ids) != set(part.ids)
    again = data.long_tailed(source, imbalance=5, seed=0)
    np.testing.assert_array_equal(again.ids, part.ids)


def test_a_subset_has_the_order_it_was_asked_for(digits):
    part = digits.subset([7, 2])
    assert part.ids.tolist() == [digits[7].id, digits[2].id]
    assert part.subset([1])[0].id == digits[2].id
    np.testing.assert_array_equal(part.arrays().image, digits.take([7, 2]).image)
    for indices, error in (([3, 3], ValueError), ([], ValueError), ([len(digits)], IndexError)):
        with pytest.raises(error):
            digits.subset(indices)


@pytest.mark.parametrize(
    ("available", "imbalance", "words"),
    [
        ([10, 10], 0.5, "at least 1; got 0.5"),
        ([10], 2, "at least two classes; got 1"),
        ([10, 10], 100, "class 1 would be empty"),
    ],
)
def test_impossible_tails(available, imbalance, words):
    with pytest.raises(ValueError, match=words):
        long_tail.class_sizes(np.array(available), imbalance)
