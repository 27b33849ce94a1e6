"""Reference models (Flax Linen), bridges for Linen and NNX, importers; needs flax."""

from ttt_jax.models._instance_norm import InstanceAware
from ttt_jax.models.activations import linen_activations
from ttt_jax.models.decoder import Decoder
from ttt_jax.models.demo import demo
from ttt_jax.models.grid_completion import GridCompletion, complete_grids
from ttt_jax.models.grid_decoder import GridDecoder
from ttt_jax.models.importers import load_resnet26_npz
from ttt_jax.models.initialize import init
from ttt_jax.models.linen import from_linen, linen_statistics
from ttt_jax.models.low_rank import low_rank, pad_rank
from ttt_jax.models.nnx import from_nnx, nnx_statistics
from ttt_jax.models.pretrained import Pretrained, load_gguf, load_hugging_face
from ttt_jax.models.reader import decoder_function, hidden_reader, reader
from ttt_jax.models.resnet import ResNet
from ttt_jax.models.vit import ViT, patchify, unpatchify

__all__ = [
    "Decoder",
    "GridCompletion",
    "GridDecoder",
    "InstanceAware",
    "Pretrained",
    "ResNet",
    "ViT",
    "complete_grids",
    "decoder_function",
    "demo",
    "from_linen",
    "from_nnx",
    "hidden_reader",
    "init",
    "linen_activations",
    "linen_statistics",
    "load_gguf",
    "load_hugging_face",
    "load_resnet26_npz",
    "low_rank",
    "nnx_statistics",
    "pad_rank",
    "patchify",
    "reader",
    "unpatchify",
]
