"""The processes of one job: how they join, what they must agree on, which of them writes.

`tw sft CONFIG.gin --hosts` on every host starts one process of the job. Each holds its own devices
and its own share of the data, and all run the same program. This file does not know which; it hands
on facts from process to process. In a process that has joined nobody all of it is free, and true of
a job of one.
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
"""Without a sign of life for this long, a process is given up and the others end too."""

JOIN_SECONDS = 300
"""How long a process waits for the others of its job to come."""

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Joins this process to the others of its job, before anything asks JAX for devices.

    The launcher says which process this is: by JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0), or, where none of the three is set, as JAX finds
    it on Cloud TPU, GKE, SLURM and Open MPI. JAX aborts a process whose others do not come in
    `JOIN_SECONDS`; Python does not get to say why.

    Raises:
      ValueError: nothing says which process this is, or what says it is wrong.
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
            f"by one that JAX knows (Cloud TPU, GKE, SLURM, Open MPI), or set {', '.join(_NAMES)} "
            "on every host; without --hosts, tw runs on this host alone."
        ) from error


def _named() -> dict[str, Any]:
    """What the environment says by name; nothing where it leaves the matter to JAX."""
    given = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    if not given:
        return {}
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise ValueError(
            f"{', '.join(given)} without {', '.join(missing)}: want all of "
            f"{', '.join(_NAMES)}, or none where JAX finds them by itself."
        )
    address, count, index = given.values()
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"JAX_NUM_PROCESSES = {count}, JAX_PROCESS_ID = {index}: want the number of processes, "
            "and for each of them another number from 0 below it."
        )
    if not address.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS = {address!r}: want host:port of process 0, the same on "
            "every host."
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def require_alone() -> None:
    """Refuses to run as if alone where the environment says that this is one process of many.

    Raises:
      ValueError: JAX_NUM_PROCESSES is above 1.
    """
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    if count not in ("", "1"):
        raise ValueError(
            f"JAX_NUM_PROCESSES = {count}, and --hosts is not given: each process would take the "
            "run for its own. Give --hosts on every host, or unset the variable."
        )


def require_joined() -> None:
    """Refuses devices of a job that this process has not joined, as one host of a TPU slice sees.

    Raises:
      ValueError: there are other processes, and nothing connects them.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"These devices are those of {jax.process_count()} hosts, and this process has not "
            "joined the others. Give --hosts on every host, or use a slice of one host."
        )


def is_first() -> bool:
    """Whether this process writes and prints for its job."""
    # Asked in this order, a run of one process does not start a backend in order to print.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """What every process hands in, in order, known to all; none returns before all have come.

    Args:
      value: what JSON can hold.

    Raises:
      TypeError: JSON cannot hold it.
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
      work: may differ in each process, but must not wait for the others.
      *faults: the errors that stop all processes. One that did not fail itself raises the first
        class, with the words of the first process that failed.

    Returns:
      What `work` returned in this process.
    """
    found, fault = None, None
    try:
        found = work()
    except faults as error:
        fault = error
    told = [text for text in gather(None if fault is None else str(fault)) if text is not None]
    if told:
        raise fault or faults[0](told[0])
    return cast(T, found)


def divide(work: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any]) -> list[Any]:
    """Lets each process do its share of a list; all then know what came of all, in order.

    Args:
      work: as many results as it is handed items; what JSON can hold.
      items: the same in every process.
    """
    is_alone = not jax.distributed.is_initialized()
    first, count = (0, 1) if is_alone else (jax.process_index(), jax.process_count())
    done: list[Any] = [None] * len(items)
    for index, share in enumerate(gather(list(work(items[first::count])))):
        done[index::count] = share
    return done


def to_host(tree: Any) -> Any:
    """A tree of global arrays, whole and on the host in every process."""
    if not jax.distributed.is_initialized():
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def agree(**facts: str) -> None:
    """Stops every process of the job unless all state the same.

    Args:
      facts: texts by name, all that matters in one call; they are compared in order.

    Raises:
      ValueError: in every process, about the first fact that is not the same, with the processes
        that differ from process 0 and the first line that does.
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
    """Stops every process unless all see one and the same folder; makes it where it is not there.

    Raises:
      OSError: the folder cannot be made, or not written to.
      ValueError: in every process, naming one that does not see what another wrote there.
    """
    mine = secrets.token_hex(8)
    marks = [folder / f".shared_{token}" for token in gather(mine)]
    # All of them write, so that a folder that cannot be written to stops all of them.
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
                f"not see what process {sees.index(False)} wrote there. Want a disk that all hosts "
                "mount, for all of them write a checkpoint."
            )


def is_asked_to_stop(step: int) -> bool:
    """Whether all processes stop after this step because one of them got a SIGTERM.

    Args:
      step: every process asks after each of its steps, and all count alike.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def _first_difference(one: str, other: str) -> tuple[str, str]:
    pairs = itertools.zip_longest(one.splitlines(), other.splitlines(), fillvalue="")
    return next((pair for pair in pairs if pair[0] != pair[1]), (one, other))
