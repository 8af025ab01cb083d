"""`tw aot`: compiles a program for a TPU topology that need not be present, and reports its memory.

libtpu compiles without hardware, so any host can tell whether a model, a mesh and a row length fit
a pod. The last line is one JSON object. It holds no execution times, because nothing is executed.
"""

from __future__ import annotations

import json
from typing import Any

from tw_jax import sharding
from tw_jax.aot import topology
from tw_jax.aot.steps import PgrpoStep, Sampling, SftStep, prepare
from tw_jax.config import configurable
from tw_jax.models.transformer import Model
from tw_jax.sharding import Mesh, Rules


@configurable
class Aot:
    """A program and the devices that it is compiled for.

    Attributes:
      topology: A generation and its chips, such as "v5p:2x2x4".
      model: The model.
      program: The program to compile.
      mesh: How the chips are laid out.
      rules: Which logical axis is split over which axis of the mesh.
    """

    topology: str
    model: Model
    program: SftStep | PgrpoStep | Sampling
    mesh: Mesh = Mesh()
    rules: Rules = Rules()

    def check(self) -> None:
        """Refuses generations that are not in `topology.HBM`."""
        if self.topology.partition(":")[0] not in topology.HBM:
            raise ValueError(
                f"Aot.topology = {self.topology!r} must be one of {', '.join(topology.HBM)}, a "
                "colon and the chips, such as 'v5p:2x2x4'."
            )


def run(cfg: Aot) -> None:
    """Compiles the program and prints one JSON object on the last line.

    Raises:
      NotImplementedError: If libtpu is not installed.
    """
    mesh = sharding.make_mesh(cfg.mesh, topology.devices(cfg.topology))
    prepared = prepare(cfg.program, cfg.model, mesh=mesh, rules=cfg.rules)
    with sharding.use(mesh, prepared.rules):
        memory, seconds = topology.compile_for(prepared.program, prepared.arguments)
    result: dict[str, Any] = {
        "program": type(cfg.program).__name__,
        "topology": cfg.topology,
        "chips": mesh.size,
        "hbm_bytes_per_chip": topology.hbm_bytes(cfg.topology),
        **memory,
    }
    if memory["ok"] and "kv_bytes_per_chip" in prepared.figures:
        result["temp_over_kv"] = memory["temp_bytes"] / prepared.figures["kv_bytes_per_chip"]
    print(json.dumps({**result, "compile_seconds": round(seconds, 1), **prepared.figures}))
