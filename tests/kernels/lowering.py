"""Programs of kernels as an NVIDIA GPU is given them, on a machine without one."""

import contextlib

import jax


def lowered_for_gpu(function, *arguments):
    """The program that a GPU is given, as text, from a machine without one."""
    with contextlib.ExitStack() as stack:
        # jax 0.12 lowers Triton kernels for a card that it knows by name.
        if hasattr(jax.sharding, "AbstractDevice"):
            card = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=None, platform="gpu")
            mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=card)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
