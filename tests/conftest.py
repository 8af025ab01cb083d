"""Eight virtual CPU devices, one table of tolerances; set before any JAX call."""

import ctypes
import gc
import json
import os
import pathlib
import resource
import tempfile
from typing import NamedTuple

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
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

# Examples are the same on every run, so a failure in CI is a failure at home.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("fixed")


class Row(NamedTuple):
    """A tolerance, and the worst errors that `make tolerances` saw; docs/contributing.md.

    Each is at least three times all of the errors: with the compiler's own choice of instructions,
    with those of AVX2 alone, with those of SSE4_2 alone, and with one thread for each product.
    """

    bound: float
    default: float
    avx2: float
    sse4_2: float
    one_thread: float


TABLE = {
    # The same sum in another order: a share of its largest number, or of the sum of its terms.
    "rounding": Row(1e-6, 1.7e-07, 1.7e-07, 1.7e-07, 1.7e-07),
    # One module against its oracle, float32; log-probs and entropies of it in nats.
    "module": Row(1e-5, 1.7e-06, 1.7e-06, 1.2e-06, 1.7e-06),
    # A whole forward pass against another implementation, float32.
    "model": Row(1e-4, 1.6e-06, 1.6e-06, 1.8e-06, 1.6e-06),
    # Gradients of a whole model, and means over what a policy drew.
    "gradient": Row(1e-4, 2.2e-06, 2.2e-06, 1.8e-06, 2.2e-06),
    # Packed tries against calls one by one; a loss as a share of the sum of its terms' sizes.
    "equality_loss": Row(1e-5, 9.1e-07, 9.1e-07, 1.7e-06, 9.1e-07),
    # The same, relative L2 over all parameters.
    "equality_gradient": Row(1e-5, 9.0e-07, 9.0e-07, 1.8e-06, 9.0e-07),
    # One device against eight.
    "sharded": Row(1e-5, 2.2e-06, 2.2e-06, 2.2e-06, 2.2e-06),
    # Sampler against loss, nats.
    "sampler_logp": Row(1e-4, 9.1e-06, 9.1e-06, 9.5e-06, 9.1e-06),
    # 99 % of the entries in bfloat16.
    "bf16_most": Row(2e-2, 2.3e-03, 2.3e-03, 2.3e-03, 2.3e-03),
    # Every entry in bfloat16.
    "bf16_all": Row(6e-2, 8.4e-03, 8.4e-03, 8.4e-03, 8.4e-03),
    # Sums over chunks of gradients that are bfloat16 at the end, relative L2.
    "bf16_sums": Row(1e-3, 0, 0, 0, 0),
    # A slope against a difference of two float32 losses.
    "finite_difference": Row(1e-3, 5.0e-05, 5.0e-05, 5.0e-05, 5.0e-05),
    # Losses of some training steps in two frameworks, nats.
    "parity_curve": Row(1e-3, 4.8e-07, 4.8e-07, 4.8e-07, 4.8e-07),
}
TOLERANCE = {name: row.bound for name, row in TABLE.items()}
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
    parser.addoption("--worst", help="folder that the worst numerical errors are written to")


# Each process takes the next file when it is done with one; what takes longest goes first. All of
# tests/programs goes to one process, because they share the runs that fixtures make.
_LONGEST = (
    "tests/programs/",
    "tests/test_equalities.py",
    "tests/attention/test_exam.py",
    "tests/train/test_pgrpo.py",
    "tests/models/",
    "tests/sample/",
)


def _rank(nodeid):
    return next((n for n, name in enumerate(_LONGEST) if nodeid.startswith(name)), len(_LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return _LONGEST[0] if _rank(nodeid) == 0 else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config, items):
    if config.getoption("numprocesses", None):
        items.sort(key=lambda item: _rank(item.nodeid))


def pytest_sessionfinish(session):
    folder = session.config.getoption("--worst")
    if folder and _CLOSE.worst:
        name = os.environ.get("PYTEST_XDIST_WORKER", "main")
        pathlib.Path(folder, f"{name}.json").write_text(json.dumps(_CLOSE.worst), encoding="utf-8")


_STATM, _LARGE = pathlib.Path("/proc/self/statm"), 1200 * 2**20


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A program stays in memory as long as its function does; few are of use to another file."""
    yield
    if _STATM.exists() and int(_STATM.read_text().split()[1]) * resource.getpagesize() < _LARGE:
        return
    jax.clear_caches()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps what was freed
        libc.malloc_trim(0)
