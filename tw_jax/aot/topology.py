"""TPU topologies that need not be present: their devices, their memory, and compilation for them.

libtpu describes the devices of a topology and compiles for them on any host. This module is the
only importer of `jax.experimental.topologies`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

HBM = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
"""Published bytes of memory of one chip, by generation. A program gets a few per cent less."""


def hbm_bytes(topology: str) -> int:
    """Bytes of memory of one chip of a topology such as "v5p:2x2x4"."""
    return HBM[topology.partition(":")[0]]


def devices(topology: str) -> list[Any]:
    """The devices of a topology, as libtpu describes them.

    Raises:
      ValueError: If libtpu does not have this topology.
      NotImplementedError: If libtpu is not installed.
    """
    # Without these libtpu asks the cloud about its host. The accelerator type is that of any host
    # with TPUs. Nothing runs on a chip, so other processes may load libtpu at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except RuntimeError as error:
        if "not installed" not in str(error):
            raise ValueError(f"Aot.topology = {topology!r}: {error}") from error
        raise NotImplementedError(
            "tw aot needs libtpu, which compiles for TPUs on any host. Install the tpu extra with "
            "`pip install -e '.[tpu]'`."
        ) from error
    return list(description.devices)


def compile_for(program: Any, arguments: tuple[Any, ...]) -> tuple[dict[str, Any], float]:
    """Compiles a jitted function for the devices of its arguments' shardings.

    Args:
      program: A function under `jax.jit`.
      arguments: Its arguments as `ShapeDtypeStruct`s with shardings.

    Returns:
      Figures for `tw aot`: `ok`, `error` and, if the program fits, bytes of one chip. And the
      seconds that lowering and compiling took.
    """
    began = time.monotonic()
    # A program from the compilation cache would not tell how long it takes to compile.
    with _without_compilation_cache():
        lowered = program.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            figures = {"ok": False, "error": str(error).splitlines()[0]}
        else:
            memory = compiled.memory_analysis()
            figures = {
                "ok": True,
                "error": None,
                "peak_bytes_per_chip": memory.peak_memory_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
            }
    return figures, time.monotonic() - began


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
