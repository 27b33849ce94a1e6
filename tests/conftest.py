"""Shared test settings: four CPU devices, exact matmuls, a compilation cache."""

import gc
import os
import pathlib

# Must be set before jax starts. On an accelerator the first flag only adds host devices; the
# others make the CPU compiler more than twice as fast on small programs, and compiling is most of
# what the tests do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_TEST_CACHE", str(_CACHE)))
# Writing a program into the cache takes longer than compiling most of them, and few come twice.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 5)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many small objects that live on; looking through all of them is a tenth of the time.
gc.set_threshold(50_000, 20, 50)
