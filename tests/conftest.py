"""Eight virtual CPU devices, one table of tolerances; set before any JAX call."""

import gc
import json
import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import pytest
from closeness import Close

# Tests run the same programs again and again; each is compiled once for all of them. The process
# that starts the workers owns the folder; they and the processes of their tests inherit its name.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="tw_jax_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
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
    "bf16_sums": 1e-3,  # sums of bfloat16 gradients over chunks, relative L2
    "rope": 1e-5,  # rotations by angles of up to some hundred
    "sharded_moments": 1e-4,  # parameters after two steps that divide by moments near zero
    "newton_schulz": 1e-3,  # five rounds of a polynomial of matrices
    "finite_difference": 2e-2,  # a slope against a difference of float32 losses
    "parity_curve": 1e-3,  # losses of some training steps in two frameworks, nats
}
_CLOSE = Close(TOLERANCE)


@pytest.fixture(scope="session")
def close() -> Close:
    """Compares numbers by a row of the table: `close("module", got, want)`."""
    return _CLOSE


@pytest.fixture(scope="session")
def tolerance() -> dict[str, float]:
    """The bounds of the table, where something must differ by more; `close` compares."""
    return TOLERANCE


def pytest_addoption(parser):
    parser.addoption("--worst", help="run what compares numbers; write the worst errors here")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--worst"):
        others = [item for item in items if "close" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


def pytest_sessionfinish(session):
    folder = session.config.getoption("--worst")
    if folder and _CLOSE.worst:
        name = os.environ.get("PYTEST_XDIST_WORKER", "main")
        pathlib.Path(folder, f"{name}.json").write_text(json.dumps(_CLOSE.worst), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A program stays in memory as long as its function does; few are of use to another file."""
    yield
    jax.clear_caches()
    gc.collect()
