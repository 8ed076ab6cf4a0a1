"""Eight virtual CPU devices for every test, and one compilation cache for all of them; set before JAX starts."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs of tests run for milliseconds and compile for seconds, so little is spent on optimising them.
FLAGS = (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # many tests run the same small programs
    cache = tempfile.TemporaryDirectory(prefix="grpo_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
