"""Packed sets: the order of everything that belongs to an image, and files that are kept."""

import subprocess
import sys

import numpy as np

from experiments.prepare import shuffle


def packed(**more):
    """Five images of 1 to 5 bytes, image i of i + 1 times the byte i."""
    lengths = np.arange(1, 6)
    return {
        "header": np.zeros(5, np.uint8),
        "data": np.repeat(np.arange(5, dtype=np.uint8), lengths),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "labels": np.arange(5) * 10,
        **more,
    }


def test_what_belongs_to_an_image_stays_with_it():
    domains = np.array(list("abcde"))
    source = packed(ids=np.arange(100, 105), domains=domains, class_names=np.array(list("vwxyz")))
    found = shuffle.shuffled(source, seed=1)
    order = found["ids"] - 100
    assert sorted(order) == list(range(5)) and list(order) != list(range(5))
    np.testing.assert_array_equal(found["labels"], order * 10)
    np.testing.assert_array_equal(found["domains"], domains[order])
    for place, image in enumerate(order):
        start, stop = found["offsets"][place : place + 2]
        np.testing.assert_array_equal(found["data"][start:stop], np.full(image + 1, image))
    for name in ("header", "class_names"):
        np.testing.assert_array_equal(found[name], source[name])
    np.testing.assert_array_equal(shuffle.shuffled(packed(), seed=1)["ids"], order)


def run(source, target):
    command = [sys.executable, "-m", "experiments.prepare.shuffle"]
    arguments = [f"--source={source}", f"--target={target}", "--title=Five"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_the_program(tmp_path):
    source = tmp_path / "source.npz"
    np.savez(source, **packed())
    before = source.read_bytes()
    for target in (source, tmp_path / "target"):
        found = run(source, target)
        assert found.returncode == 2 and "is an .npz file other than --source" in found.stderr
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]
    found = run(source, tmp_path / "new" / "target.npz")
    assert found.returncode == 0 and "5 images in" in found.stdout
    with np.load(tmp_path / "new" / "target.npz") as archive:
        assert str(archive["title"]) == "Five" and len(archive["ids"]) == 5
