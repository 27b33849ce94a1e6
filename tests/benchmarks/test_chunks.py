"""The benchmark of chunk sizes: a small run, and the networks it compares."""

import json

import jax
import ml_collections
import pytest

from benchmarks import chunks, imagenet
from experiments import launch
from ttt_jax import tuning


def settings(**changed):
    values = {"works": ("rotation_resnet26",), "torch": False, "smoke": True}
    return ml_collections.ConfigDict(values | {"repeats": 1, "max_seconds": 0.0} | changed)


def test_a_run_has_the_choice_and_the_choices_by_hand(tmp_path, monkeypatch, capsys):
    found = {2: 0.10, 5: 0.12, 1: 0.5}
    monkeypatch.setattr(tuning, "chunk_seconds", lambda *args, **options: found)
    record = chunks.run(tmp_path / "out.json", settings())
    (row,) = record["rows"]
    assert (row["chosen"], row["largest_that_fits"]) == (2, 5)
    # One at once took five times as long, which is not near.
    assert set(row["rates"]) == {2, 5} and min(row["rates"].values()) > 0
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["chosen"] == 2
    assert "chosen 2" in capsys.readouterr().out
    with pytest.raises(launch.UserError, match="is not replaced"):
        chunks.run(tmp_path / "out.json", settings())


def test_resnet50_has_its_published_number_of_parameters():
    """25,557,032: He et al., 2016, as torchvision has it."""
    shapes = jax.eval_shape(imagenet.memo_resnet50("bfloat16").init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 25_557_032


def test_vit_b16_has_its_published_number_of_parameters():
    """86,567,656: Dosovitskiy et al., 2021, less the class token and the learned positions."""
    shapes = jax.eval_shape(imagenet.memo_vit("bfloat16").init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == 86_567_656 - (1 + 197) * 768


class TestTorch:
    """The peers, where torch is."""

    def test_the_net_is_the_same_size(self):
        torch_memo = self.module()
        net = torch_memo.ResNet50()
        assert sum(leaf.numel() for leaf in net.parameters()) == 25_557_032

    def test_loop_and_vmap_take_the_same_step(self):
        torch_memo = self.module()
        import contextlib

        import torch

        torch.manual_seed(0)
        net = torch_memo.ResNet50(((1, 4), (1, 8)), 10)
        images = torch.rand(3, 3, 32, 32)
        drawn = torch_memo.crops(images, 2)
        one_by_one = torch_memo.loop(net, net, images, drawn, contextlib.nullcontext)
        at_once = torch_memo.func_vmap(net, images, drawn, contextlib.nullcontext, 2, None)
        torch.testing.assert_close(one_by_one, at_once, rtol=1e-4, atol=1e-5)

    def module(self):
        pytest.importorskip("torch", reason="torch is no dependency; its peers are checked with it")
        from benchmarks import torch_memo

        return torch_memo
