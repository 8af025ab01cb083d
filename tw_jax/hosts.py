"""The processes of one job: how they join and agree, and which of them writes.

`tw sft CONFIG.gin --hosts` starts one process of a job on each host. Each process has its own
devices and its own share of the data, and all run the same program. In a single-process run these
functions do nothing and return the local value.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

LOST_SECONDS = 60
"""Seconds without a heartbeat after which a process counts as lost and the others end as well."""

JOIN_SECONDS = 300
"""Seconds that a process waits for the others to join."""

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Joins this process to the others of its job, before anything asks JAX for devices.

    The launcher sets JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (from 0). If none of them is set, JAX finds them itself on Cloud TPU, GKE, SLURM
    and Open MPI. JAX aborts the process if the others do not join within `JOIN_SECONDS`; Python
    cannot catch that.

    Raises:
      ValueError: If nothing tells which process this is, or a variable is wrong.
    """
    named = _named()
    try:
        jax.distributed.initialize(
            **named,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"--hosts: no launcher says which process of which job this is ({error}). Start it "
            f"by one that JAX supports (Cloud TPU, GKE, SLURM, Open MPI), or set "
            f"{', '.join(_NAMES)} on every host. Without --hosts, tw runs on this host alone."
        ) from error


def _named() -> dict[str, Any]:
    """Arguments from the environment variables; none if JAX shall find them itself."""
    given = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    if not given:
        return {}
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise ValueError(
            f"{', '.join(given)} without {', '.join(missing)}: set all of {', '.join(_NAMES)}, "
            "or none if JAX finds them itself."
        )
    address, count, index = given.values()
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"JAX_NUM_PROCESSES = {count}, JAX_PROCESS_ID = {index}: the first must be the number "
            "of processes, and the second a different number below it, from 0, for each process."
        )
    if not address.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS = {address!r} must be host:port of process 0, the same on "
            "every host."
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def require_alone() -> None:
    """Refuses to run alone if the environment says that the job has more processes.

    Raises:
      ValueError: If JAX_NUM_PROCESSES is above 1.
    """
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    if count not in ("", "1"):
        raise ValueError(
            f"JAX_NUM_PROCESSES = {count}, and --hosts is not given: each process would take the "
            "run for its own. Give --hosts on every host, or unset the variable."
        )


def require_joined() -> None:
    """Refuses the devices of a job that this process has not joined, such as one host of a slice.

    Raises:
      ValueError: If there are other processes and this one is not connected to them.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"These devices are those of {jax.process_count()} hosts, and this process has not "
            "joined the others. Give --hosts on every host, or use a slice of one host."
        )


def is_first() -> bool:
    """Whether this process writes and prints for its job."""
    # In this order a single-process run does not start a backend only to print.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in order, to every process; waits for all of them.

    Args:
      value: A JSON value.

    Raises:
      TypeError: If JSON cannot represent the value.
    """
    text = json.dumps(value)
    if not jax.distributed.is_initialized():
        return [json.loads(text)]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def together(work: Callable[[], T], *faults: type[Exception]) -> T:
    """Does some work in every process, and fails in all of them if it fails in one.

    Args:
      work: It may differ in each process, but must not wait for the others.
      *faults: Errors that stop all processes. A process that did not fail itself raises the first
        class with the message of the first process that failed.

    Returns:
      The result of `work` in this process.
    """
    result, fault = None, None
    try:
        result = work()
    except faults as error:
        fault = error
    messages = [text for text in gather(None if fault is None else str(fault)) if text is not None]
    if messages:
        raise fault or faults[0](messages[0])
    return cast(T, result)


def divide(work: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any]) -> list[Any]:
    """Divides a list among the processes and returns all results, in order, to each of them.

    Args:
      work: Returns one JSON value for each of its items.
      items: The same list in every process.
    """
    is_alone = not jax.distributed.is_initialized()
    first, count = (0, 1) if is_alone else (jax.process_index(), jax.process_count())
    done: list[Any] = [None] * len(items)
    for index, share in enumerate(gather(list(work(items[first::count])))):
        done[index::count] = share
    return done


def to_host(tree: Any) -> Any:
    """Copies a tree of global arrays to the host of every process."""
    if not jax.distributed.is_initialized():
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def agree(**facts: str) -> None:
    """Stops every process of the job unless all pass the same texts.

    Args:
      facts: Texts by name; they are compared in order.

    Raises:
      ValueError: In every process, if a text differs. It names the first such text, the processes
        that differ from process 0, and the first line that differs.
    """
    stated = gather(facts)
    for name, wanted in stated[0].items():
        odd = [index for index, other in enumerate(stated) if other.get(name) != wanted]
        if not odd:
            continue
        here, there = _first_difference(wanted, stated[odd[0]].get(name) or "")
        raise ValueError(
            f"The processes of this job do not agree in {name}: process {odd[0]} has {there!r} "
            f"where process 0 has {here!r}; {len(odd)} of {len(stated)} differ from process 0 "
            f"({', '.join(map(str, odd))}). Start the same command, with the same files and "
            "packages, on every host."
        )


def require_shared(folder: Path) -> None:
    """Stops every process unless all of them see the same folder; makes the folder if necessary.

    Raises:
      OSError: If the folder cannot be made or written to.
      ValueError: In every process, if one of them does not see the file of another.
    """
    mine = secrets.token_hex(8)
    marks = [folder / f".shared_{token}" for token in gather(mine)]
    # All processes write, so that a folder that one cannot write to stops all of them.
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f".shared_{mine}"
    own.touch()
    gather("written")
    seen = gather([mark.exists() for mark in marks])
    own.unlink()
    for index, sees in enumerate(seen):
        if not all(sees):
            raise ValueError(
                f"{folder} is not one folder for all hosts: process {index} of {len(seen)} does "
                f"not see what process {sees.index(False)} wrote there. Use a disk that all hosts "
                "mount, because all of them write a checkpoint."
            )


def is_asked_to_stop(step: int) -> bool:
    """Whether all processes stop after this step because one of them got a SIGTERM.

    Args:
      step: Number of the step. Every process must ask after each step, with the same numbers.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def _first_difference(one: str, other: str) -> tuple[str, str]:
    pairs = itertools.zip_longest(one.splitlines(), other.splitlines(), fillvalue="")
    return next((pair for pair in pairs if pair[0] != pair[1]), (one, other))
