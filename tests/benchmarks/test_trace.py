"""Kernels of a call from the profiler's trace."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import trace


def test_a_traced_call_has_its_kernels(tmp_path):
    call = jax.jit(lambda a: jnp.tanh(a @ a) @ a)
    a = jnp.ones((200, 200))
    call(a).block_until_ready()
    found = trace.trace(lambda: call(a), tmp_path / "trace")
    assert found[0].seconds > 0 and all(kernel.count > 0 for kernel in found)
    assert [k.seconds for k in found] == sorted((k.seconds for k in found), reverse=True)
    assert not any("::" in kernel.name for kernel in found)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_fusions_of_one_kind_are_one_line():
    events = [("loop_fusion.1", 1e-3), ("loop_fusion_12", 2e-3), ("gemm", 4e-3), ("gemm_2_3", 1e-3)]
    found = trace.summed(events)
    assert [(k.name, k.count) for k in found] == [("gemm", 2), ("loop_fusion", 2)]
    assert [k.seconds for k in found] == pytest.approx([5e-3, 3e-3])
    lines = trace.table(found, most=1).splitlines()
    assert lines == ["     8.000 ms in 4 kernels", "     5.000 ms  62.5 %       2 x gemm"]
