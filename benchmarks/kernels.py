"""How long each fused convolution kernel takes, layer by layer, to choose its tiles.

``python -m benchmarks.kernels --out=kernels.json`` times the three kernels of
:mod:`ttt_jax.kernels.conv.passes` on the layers of a ResNet of width 16, each on the work of one
inner step of :mod:`benchmarks.vision`: 128 instances with kernels of their own and 32
images each. ``--tiles=forward:16:16:1:taps:128:2:1,weights:16:32:2:taps:8:64:9:1:3`` times other
tiles beside the module's own choice: the kernel, the layer's channels, outputs and stride, the
form, and the fields of that form's class in ``ttt_jax/kernels/conv/tiles.py``. Values are compared
with those of the module's own choice.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from experiments import launch, provenance
from ttt_jax.kernels.conv import patches, taps, tiles
from ttt_jax.kernels.conv.convolution import Affine, Convolution

GROUPS = 8
# By kernel: its name in the modules of both forms, and the tiles of each form.
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "forward": (
        "forward",
        {"patches": tiles.ForwardPatches, "taps": tiles.ForwardTaps},
    ),
    "input": (
        "input_gradient",
        {"patches": tiles.InputPatches, "taps": tiles.InputTaps},
    ),
    "weights": (
        "weight_gradient",
        {"patches": tiles.WeightPatches, "taps": tiles.WeightTaps},
    ),
}


class Layer(NamedTuple):
    """A convolution: the side of its input, its channels, outputs and stride."""

    side: int
    channels: int
    outputs: int
    stride: int

    def __str__(self) -> str:
        strided = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.channels} to {self.outputs} at {self.side}{strided}"


LAYERS = (
    Layer(32, 16, 16, 1),
    Layer(32, 16, 32, 2),
    Layer(16, 32, 32, 1),
    Layer(16, 32, 64, 2),
    Layer(8, 64, 64, 1),
)


class Operands(NamedTuple):
    """What the kernels of a layer take, for I instances of N images.

    Attributes:
      x: ``[I, N, side^2, channels]``, of the compute dtype.
      dy: ``[I, N, side^2 / stride^2, outputs]``, of the compute dtype.
      w: ``[I, 9, channels, outputs]``, of the compute dtype.
      gamma: float32 ``[I, channels]``, the scale of the GroupNorm before the convolution.
      affine: that GroupNorm, each float32 ``[I, N, channels]``.
    """

    x: jax.Array
    dy: jax.Array
    w: jax.Array
    gamma: jax.Array
    affine: Affine


def operands(key: jax.Array, layer: Layer, instances: int, images: int, dtype: Any) -> Operands:
    """Random feature maps, gradients and kernels; the normalization is that of the maps."""
    keys = jax.random.split(key, 4)
    positions = layer.side**2
    shape = (instances, images, positions, layer.channels)
    x = jax.random.normal(keys[0], shape).astype(dtype)
    dy = jax.random.normal(keys[1], (*shape[:2], positions // layer.stride**2, layer.outputs))
    w = jax.random.normal(keys[2], (instances, tiles.TAPS, layer.channels, layer.outputs))
    gamma = 1 + jax.random.normal(keys[3], (instances, layer.channels)) / 10
    grouped = x.astype(jnp.float32).reshape(*shape[:3], GROUPS, -1)
    mean, rstd = grouped.mean((2, 4)), 1 / jnp.sqrt(grouped.var((2, 4)) + 1e-5)
    mean, rstd = (jnp.repeat(v, layer.channels // GROUPS, axis=-1) for v in (mean, rstd))
    a = rstd * gamma[:, None]
    affine = Affine(a, -mean * a, mean, rstd)
    return Operands(x, dy.astype(dtype), w.astype(dtype) / 10, gamma, affine)


def own(kernel: str, layer: Layer, dtype: Any) -> Any:
    """The tile that the module chooses."""
    side, *key = layer
    three = tiles.choose(*key, jnp.dtype(dtype).itemsize, (side, side))
    return getattr(three, KERNELS[kernel][0])


def call(kernel: str, layer: Layer, chosen: Any, interpret: bool) -> Callable[[Operands], Any]:
    """A kernel of a layer in a tile, as a function of one instance's operands."""
    name, forms = KERNELS[kernel]
    module = patches if isinstance(chosen, forms["patches"]) else taps
    run = getattr(module, name)
    conv = Convolution(layer.side, layer.side, layer.stride, GROUPS, interpret=interpret)
    if kernel == "forward":
        return lambda o: run(conv, chosen, o.x, o.affine.a, o.affine.b, o.w, None)
    if kernel == "weights":
        return lambda o: run(conv, chosen, o.x, o.affine.a, o.affine.b, o.dy)
    return lambda o: run(conv, chosen, o.dy, o.w, o.x, o.affine, o.gamma, None)


def tile(text: str) -> tuple[str, tuple[int, int, int], Any]:
    """``KERNEL:CHANNELS:OUTPUTS:STRIDE:FORM:N:...`` as the kernel, the layer and its tile.

    Raises:
      UserError: an unknown kernel, layer or form, another number of fields, or fields that the
        kernels do not take: positions and cells that are no powers of two (they would take fewer),
        taps that do not divide 9.
    """
    try:
        kernel, channels, outputs, stride, form, *numbers = text.split(":")
        layer = (int(channels), int(outputs), int(stride))
        chosen = KERNELS[kernel][1][form](*map(int, numbers))
        fields = chosen._asdict()
        ahead = fields.pop("ahead", 0)
        powers = [fields.get(name, 1) for name in ("rows", "cells", "positions")]
        if layer not in {known[1:] for known in LAYERS} or min(fields.values()) < 1 or ahead < 0:
            raise KeyError(text)
        if any(n & (n - 1) for n in powers) or fields.get("rows", 1) > 2:
            raise KeyError(text)
        if tiles.TAPS % fields.get("taps", 1):
            raise KeyError(text)
    except (ValueError, KeyError, TypeError) as error:
        raise launch.UserError(
            "a tile is KERNEL:CHANNELS:OUTPUTS:STRIDE:FORM:N:..., a kernel among "
            f"{', '.join(KERNELS)}, a layer of a ResNet of width 16, patches or taps, and the "
            "fields of that form in ttt_jax/kernels/conv/tiles.py, those of positions and cells "
            f"powers of two; got {text!r}."
        ) from error
    return kernel, layer, chosen


def measure(program: Any, arguments: Operands, repeats: int) -> tuple[Any, float]:
    """The result, and the median milliseconds of a call among calls in a row."""
    result, times = jax.block_until_ready(program(arguments)), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            last = program(arguments)
        jax.block_until_ready(last)
        times.append((time.perf_counter() - start) / repeats)
    return result, 1e3 * statistics.median(times)


def distance(result: Any, expected: Any) -> float:
    """The largest relative distance of their arrays, by Euclidean norm."""

    def of_arrays(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32).ravel(), b.astype(jnp.float32).ravel()
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return max(map(of_arrays, jax.tree.leaves(result), jax.tree.leaves(expected)))


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Times every kernel of every layer; returns the record, which is written after each row.

    A tile that cannot be run, such as one too large for the card, stands under ``failed``.

    Args:
      out: the JSON file.
      settings: ``dtypes``, ``tiles`` and ``smoke``.

    Raises:
      UserError: no NVIDIA GPU, an unknown dtype, a file that is there, or a tile that there is
        not.
    """
    smoke = settings.smoke
    launch.chosen("dtype", settings.dtypes, ("bfloat16", "float32"))
    given = [tile(text) for text in settings.tiles]
    if not smoke and jax.default_backend() != "gpu":
        raise launch.UserError(
            f"the kernels are for a GPU, and this is {jax.default_backend()}; --smoke interprets "
            "small ones."
        )
    launch.new_file(out)
    instances, images, repeats = (2, 4, 1) if smoke else (128, 32, 10)
    record = provenance.of(settings) | {"instances": instances, "images": images}
    record |= {"rows": [], "failed": []}
    for dtype in settings.dtypes:
        for layer in LAYERS:
            # An interpreted kernel of the true side would take minutes.
            timed = layer._replace(side=2 * layer.stride * 2) if smoke else layer
            arguments = operands(jax.random.key(0), timed, instances, images, jnp.dtype(dtype))
            for kernel in KERNELS:
                mine = [form for which, at, form in given if (which, at) == (kernel, layer[1:])]
                due = None
                for number, one in enumerate((own(kernel, layer, jnp.dtype(dtype)), *mine)):
                    form = f"{type(one).__name__}{tuple(one)}"
                    row = {"layer": str(layer), "kernel": kernel, "compute_dtype": dtype}
                    row |= {"tile": form, "chosen": number == 0}
                    name = f"{dtype:9} {layer!s:22} {kernel:8} {form:32}"
                    try:
                        function = call(kernel, timed, one, smoke)
                        program = jax.jit(jax.vmap(function)).lower(arguments).compile()
                        result, ms = measure(program, arguments, repeats)
                    except RuntimeError as error:
                        record["failed"].append(row | {"message": str(error)[:500]})
                        print(f"{name} failed: {str(error).splitlines()[0][:200]}", flush=True)
                    else:
                        due = result if due is None else due
                        record["rows"].append(row | {"ms": ms, "distance": distance(result, due)})
                        print(f"{name} {ms:7.3f} ms", flush=True)
                    launch.write_json(out, record)
    return record


def main(argv: Sequence[str]) -> int:
    """The program; 1 where a tile failed."""
    del argv
    values = {"dtypes": tuple(_DTYPES.value), "tiles": tuple(_TILES.value), "smoke": _SMOKE.value}
    return 1 if run(_OUT.value, ml_collections.ConfigDict(values))["failed"] else 0


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    _DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Compute dtypes.")
    _TILES = flags.DEFINE_list("tiles", [], "Other tiles to time, see the module.")
    _SMOKE = flags.DEFINE_bool("smoke", False, "Small kernels, interpreted: for a CPU.")
    launch.run(main)
