"""How long each fused convolution kernel takes, layer by layer, to choose its tiles.

``python -m experiments.bench_kernels --out=kernels.json`` times the three kernels of
:mod:`ttt_jax.models.fused_conv` on the layers of a ResNet of width 16, each on the work of one
inner step of ``experiments.bench``'s ``rotation``: 128 instances with kernels of their own and 32
images each. ``--tiles=forward:16:128:2`` times a result kernel of 16 outputs in programs of 128
positions and two warps beside the module's own choice, ``--tiles=weights:16:8:64:9:1`` a weight
gradient in tiles as in ``fused_limits.WEIGHT_GRADIENT``; values are compared with the module's own.
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
from ttt_jax.models import fused_conv, fused_limits as limits

GROUPS = 8
# Other tiles are tried by changing these for a while.
TABLES: dict[str, dict[int, Any]] = {"forward": limits.FORWARD, "weights": limits.WEIGHT_GRADIENT}


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
      affine: that GroupNorm, ``(a, b, mean, rstd)``, each float32 ``[I, N, channels]``.
    """

    x: jax.Array
    dy: jax.Array
    w: jax.Array
    gamma: jax.Array
    affine: tuple[jax.Array, ...]


def operands(key: jax.Array, layer: Layer, instances: int, images: int, dtype: Any) -> Operands:
    """Random feature maps, gradients and kernels; the normalization is that of the maps."""
    keys = jax.random.split(key, 4)
    positions = layer.side**2
    shape = (instances, images, positions, layer.channels)
    x = jax.random.normal(keys[0], shape).astype(dtype)
    dy = jax.random.normal(keys[1], (*shape[:2], positions // layer.stride**2, layer.outputs))
    w = jax.random.normal(keys[2], (instances, limits.TAPS, layer.channels, layer.outputs))
    gamma = 1 + jax.random.normal(keys[3], (instances, layer.channels)) / 10
    grouped = x.astype(jnp.float32).reshape(*shape[:3], GROUPS, -1)
    mean, rstd = grouped.mean((2, 4)), 1 / jnp.sqrt(grouped.var((2, 4)) + 1e-5)
    mean, rstd = (jnp.repeat(v, layer.channels // GROUPS, axis=-1) for v in (mean, rstd))
    a = rstd * gamma[:, None]
    return Operands(x, dy.astype(dtype), w.astype(dtype) / 10, gamma, (a, -mean * a, mean, rstd))


def kernels(layer: Layer, interpret: bool) -> dict[str, Callable[[Operands], Any]]:
    """The three kernels of a layer, as functions of one instance's operands."""
    size = {"height": layer.side, "width": layer.side, "stride": layer.stride}
    size["interpret"] = interpret
    return {
        "forward": lambda o: fused_conv.forward(o.x, *o.affine[:2], o.w, None, **size),
        "input gradient": lambda o: fused_conv.input_gradient(
            o.dy, o.w, o.x, o.affine, o.gamma, None, groups=GROUPS, **size
        ),
        "weights": lambda o: fused_conv.weight_gradient(o.x, *o.affine[:2], o.dy, **size),
    }


def tile(text: str) -> tuple[str, int, tuple[int, ...]]:
    """``KERNEL:CHANNELS:N:...`` as the kernel, its channels and its tile.

    Raises:
      UserError: an unknown kernel, unknown channels, a tile of the wrong length, positions that are
        no power of two (the kernels would take a smaller one), or taps that are no divisor of 9.
    """
    kernel, *numbers = text.split(":")
    table = TABLES.get(kernel)
    try:
        channels, *sizes = map(int, numbers)
        if table is None or len(sizes) != len(table[channels]) or min(sizes) < 1:
            raise KeyError(kernel)
        positions, taps = (sizes[0], 1) if kernel == "forward" else sizes[1:3]
        if positions & (positions - 1) or limits.TAPS % taps:
            raise KeyError(kernel)
    except (ValueError, KeyError) as error:
        raise launch.UserError(
            "a tile is forward:OUTPUTS:POSITIONS:WARPS or weights:CHANNELS:IMAGES:POSITIONS:TAPS:"
            f"WARPS, for channels among {limits.CHANNELS}, positions a power of two, and 1, 3 "
            f"or 9 taps; got {text!r}."
        ) from error
    return kernel, channels, tuple(sizes)


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


def distance(found: Any, wanted: Any) -> float:
    """The largest relative distance of their arrays, by Euclidean norm."""

    def one(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32).ravel(), b.astype(jnp.float32).ravel()
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return max(map(one, jax.tree.leaves(found), jax.tree.leaves(wanted)))


def run(out: str, settings: ml_collections.ConfigDict) -> dict[str, Any]:
    """Times every kernel of every layer; writes and returns the record.

    Args:
      out: the JSON file.
      settings: ``dtypes``, ``tiles`` and ``smoke``.

    Raises:
      UserError: no NVIDIA GPU, an unknown dtype, a file that is there, or a tile that there is
        not.
    """
    smoke = settings.smoke
    launch.chosen("dtype", settings.dtypes, ("bfloat16", "float32"))
    tiles = [tile(text) for text in settings.tiles]
    if not smoke and jax.default_backend() != "gpu":
        raise launch.UserError(
            f"the kernels are for a GPU, and this is {jax.default_backend()}; --smoke interprets "
            "small ones."
        )
    launch.new_file(out)
    instances, images, repeats = (2, 4, 1) if smoke else (128, 32, 10)
    rows: list[dict[str, Any]] = []
    for dtype in settings.dtypes:
        for layer in LAYERS:
            # An interpreted kernel of the true side would take minutes.
            timed = layer._replace(side=2 * layer.stride * 2) if smoke else layer
            arguments = operands(jax.random.key(0), timed, instances, images, jnp.dtype(dtype))
            for name, kernel in kernels(timed, smoke).items():
                wide = layer.outputs if name == "forward" else max(layer.channels, layer.outputs)
                mine = [sizes for which, width, sizes in tiles if (which, width) == (name, wide)]
                own = None
                for sizes in (None, *mine):
                    table = TABLES.get(name, {})
                    kept = table.get(wide)
                    try:
                        if sizes is not None:
                            table[wide] = sizes
                        program = jax.jit(jax.vmap(kernel)).lower(arguments).compile()
                    finally:
                        if kept is not None:
                            table[wide] = kept
                    result, ms = measure(program, arguments, repeats)
                    own = result if own is None else own
                    rows.append(
                        {"layer": str(layer), "kernel": name, "compute_dtype": dtype, "ms": ms}
                        | {"tile": list(sizes or kept or ()), "chosen": sizes is None}
                        | {"distance": distance(result, own)}
                    )
                    at = ":".join(map(str, rows[-1]["tile"]))
                    print(f"{dtype:9} {layer!s:22} {name:15} {at:12} {ms:7.3f} ms", flush=True)
    record = provenance.of(settings) | {"instances": instances, "images": images, "rows": rows}
    launch.write_json(out, record)
    return record


def main(argv: Sequence[str]) -> None:
    """The program."""
    del argv
    run(
        _OUT.value,
        ml_collections.ConfigDict(
            {"dtypes": tuple(_DTYPES.value), "tiles": tuple(_TILES.value), "smoke": _SMOKE.value}
        ),
    )


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    _DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Compute dtypes.")
    _TILES = flags.DEFINE_list("tiles", [], "Other tiles to time, see the module.")
    _SMOKE = flags.DEFINE_bool("smoke", False, "Small kernels, interpreted: for a CPU.")
    launch.run(main)
