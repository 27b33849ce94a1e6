"""The PyTorch peers compute what the library computes: equal weights, equal results."""

import contextlib

import jax
import numpy as np
import pytest
from flax import traverse_util

import ttt_jax as ttt
from benchmarks import vision, works
from ttt_jax import losses, models

torch = pytest.importorskip("torch", reason="torch is no dependency; its peers are checked with it")

EXACT = contextlib.nullcontext
RENAMED = {"scale": "weight", "kernel": "weight"}


def filled(init):
    """Parameters of real shapes with NumPy's random values."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.ones(leaf.shape, np.float32) * (path[-1].key in ("scale", "var"))
            + rng.normal(scale=0.2, size=leaf.shape).astype(np.float32)
        ),
        shapes,
    )


def loaded(net, arrays):
    """The net with these parameters; none is missing or left over."""
    net.load_state_dict({name: torch.tensor(np.asarray(a)) for name, a in arrays.items()})
    return net


def vit_arrays(params):
    """Parameters of ``models.ViT`` under the names and in the layouts of the PyTorch net."""
    flat, arrays = traverse_util.flatten_dict(params, sep="/"), {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        if parents[0] == "rotation_head" or "attention" in parents:
            continue
        parents = [p.replace("patch_embed", "embed").replace("block_", "blocks.") for p in parents]
        name = ".".join([*parents, RENAMED.get(last, last)])
        name = name.replace("decoder.pixels", "pixels").replace("decoder.mask", "mask")
        arrays[name] = leaf.T if last == "kernel" else leaf
    for path in flat:
        if not path.endswith("attention/query/kernel"):
            continue
        block = path.removesuffix("/attention/query/kernel")
        here = block.replace("/block_", ".blocks.")
        width = flat[path].shape[0]
        sides = [f"{block}/attention/{name}" for name in ("query", "key", "value")]
        kernels = [flat[f"{side}/kernel"].reshape(width, width).T for side in sides]
        arrays[f"{here}.qkv.weight"] = np.concatenate(kernels)
        arrays[f"{here}.qkv.bias"] = np.concatenate([flat[f"{s}/bias"].ravel() for s in sides])
        out = flat[f"{block}/attention/out/kernel"].reshape(width, width)
        arrays[f"{here}.out.weight"], arrays[f"{here}.out.bias"] = (
            out.T,
            flat[f"{block}/attention/out/bias"],
        )
    return arrays


def test_masked_autoencoder():
    from benchmarks import torch_mae

    sizes = works.ViTSizes(8, 2, 8, 1, 2, 4, 1, 2, classes=3, copies=3)
    program = works.mae(sizes, "float32", 1)
    variables = filled(program.init)
    module = models.ViT(8, 2, 3, 8, 1, 2, 3, 4, 4, 1, 2)
    net = torch_mae.Mae(sizes)
    net.load_state_dict(
        {name: part for name, part in net.state_dict().items() if "positions" in name}
        | {name: torch.tensor(a) for name, a in vit_arrays(variables["params"]).items()}
    )
    image = np.random.default_rng(1).normal(size=(8, 8, 3)).astype(np.float32)
    seen = []

    def reconstruct(params, images, keep):
        seen.append(keep)
        return models.from_linen(module, "reconstruct")(params, images, keep)

    def objective(params):
        loss = losses.masked_reconstruction(reconstruct, patch=2, num_masks=3)
        return loss(params, image, jax.random.key(3)), seen.pop()

    ours = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (value, keep), gradient = ours(variables)
    order = [[*row, *np.setdiff1d(np.arange(sizes.tokens), row)] for row in np.asarray(keep)]
    loss = net.loss(torch.tensor(image), torch.tensor(np.asarray(order)), sizes.visible)
    loss.backward()
    np.testing.assert_allclose(loss.item(), value, rtol=1e-5)
    wanted = vit_arrays(gradient["params"])
    for name, parameter in net.encoder.named_parameters(prefix="encoder"):
        np.testing.assert_allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)
    logits = net.classify(torch.tensor(image)[None]).detach()
    predicted = jax.jit(models.from_linen(module))(variables, image[None])
    np.testing.assert_allclose(logits, predicted, rtol=1e-4, atol=1e-5)


def test_loop_and_vmap_take_the_same_steps(monkeypatch):
    from benchmarks import torch_mae

    sizes = works.ViTSizes(8, 4, 8, 1, 2, 4, 1, 2, classes=3, copies=2)
    # One order for all, since the two ways draw in different places.
    order = torch.tensor([[2, 0, 1, 3], [1, 3, 0, 2]])
    monkeypatch.setattr(torch_mae, "masks", lambda sizes, device: order)
    torch.manual_seed(0)
    net, images = torch_mae.Mae(sizes), torch.rand(2, 8, 8, 3)
    written_out = torch_mae.Mae(sizes, torch_mae.products)
    written_out.load_state_dict(net.state_dict())
    apart = torch_mae.loop(net, images, sizes, 3, EXACT)
    together = torch_mae.func_vmap(written_out, images, sizes, 3, EXACT)
    np.testing.assert_allclose(apart, together, atol=1e-6)
    with torch.no_grad():
        source = net.classify(images)
    assert (apart - source).abs().max() > 1e-3


def resnet_arrays(params):
    """Parameters of ``models.ResNet(norm="batch")`` under the names of the PyTorch net."""
    arrays = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        first, *middle, last = path.replace("bn", "norm").split("/")
        branch = "rotation" if first.startswith("rotation_") else "main"
        first = first.removeprefix("rotation_")
        parents = {
            "conv1": ["shared", "0"],
            "layer1": ["shared", "1"],
            "layer2": ["shared", "2"],
            "layer3": [branch, "layer"],
        }.get(first, [branch, first])
        name = ".".join([*parents, *middle, RENAMED.get(last, last)])
        turned = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        arrays[name] = np.transpose(leaf, turned)
    return arrays


def test_tent_of_the_package():
    pytest.importorskip("torch_ttt.engine.tent_engine", reason="torch-ttt is no dependency")
    from benchmarks import torch_peers

    sizes = vision.WORKS["tent_batch"].smoke._replace(image_size=8, batch=4)
    program = works.tent(sizes, "float32", 1)
    variables = filled(program.init)
    net = loaded(torch_peers.Net(sizes), resnet_arrays(variables["params"]))
    images = np.random.default_rng(1).uniform(size=(2, 4, 8, 8, 3)).astype(np.float32)
    keys = ttt.sample_keys(jax.random.key(0), np.arange(2))
    predicted, info = jax.jit(program.predict)(variables, images, keys)
    assert bool(info.updated.all())
    channels_first = torch.tensor(images.reshape(8, 8, 8, 3)).permute(0, 3, 1, 2)
    with torch.no_grad():
        source = torch.cat([net(part) for part in channels_first.split(4)])
    theirs = torch_peers.torch_ttt(net, channels_first, 4, 1, EXACT)
    ours = np.asarray(predicted).reshape(theirs.shape)
    moved = np.abs((theirs - source).numpy()).max()
    assert np.abs(theirs.numpy() - ours).max() < 0.02 * moved
