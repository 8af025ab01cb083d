"""One process, eight virtual CPU devices, one table of tolerances; set before any JAX call."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import pytest

# Tests run the same programs again and again; each is compiled once for all of them.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="tw_jax_programs_")
jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

# Examples are the same on every run, so a failure in CI is a failure at home.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("fixed")

TOLERANCE = {
    "rounding": 1e-6,  # the same sum in another order
    "module": 1e-5,  # one module against its oracle, float32
    "model": 1e-4,  # a whole forward pass against another implementation, float32
    "gradient": 1e-4,  # gradients of a whole model, relative
    "equality_loss": 1e-5,  # packed tries against calls one by one, relative
    "equality_gradient": 1e-5,  # the same, relative L2 over all parameters
    "sharded": 1e-5,  # one device against eight, relative
    "sampler_logp": 1e-4,  # sampler against loss, absolute, nats
    "bf16_most": 2e-2,  # 99 % of the entries in bfloat16
    "bf16_all": 6e-2,  # every entry in bfloat16
}


@pytest.fixture(scope="session")
def tolerance() -> dict[str, float]:
    """The one table; a test names the row it uses and never relaxes it."""
    return TOLERANCE
