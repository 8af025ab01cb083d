"""The door to orbax: what a run keeps so that it can go on, and what evaluation reads of it.

A checkpoint is a folder named by its step. It holds the state, a pytree of arrays, and for each
process a JSON object with all else (the position in the data, the config). It appears whole or not
at all. This file does not know what a state is made of; a state whose parameters others should find
has them at `params`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tw_jax import hosts
from tw_jax.contracts import Params

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run, in one folder; every process of a job makes its own.

    Saving copies the state off the devices and goes on in the background, so the state may be
    donated to the next step at once. What goes wrong there is raised by the next call.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        """Opens the folder, and makes it where it does not exist.

        What an interrupted save has left is deleted, so only one job may write here at a time.

        Args:
          directory: a local or mounted folder, or a URL that orbax reads (gs://bucket/run).
          keep: how many checkpoints to keep; the oldest go once a newer one is complete.
        """
        if keep < 1:
            raise ValueError(f"keep = {keep}: want at least 1 checkpoint.")
        self.directory = _normalised(directory)
        self._saving = (0, 0)
        """Step and bytes of the latest save."""
        self._remove_halves()
        self._manager = _open(
            self.directory, max_to_keep=keep, cleanup_tmp_directories=not _is_local(self.directory)
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def note(self) -> dict[str, Any] | None:
        """What process 0 kept beside the state in the newest checkpoint whose note can be read.

        Returns:
          Its `extra`; None where there is no checkpoint, or no note that can be read.
        """
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            args = ocp.args.Composite(extra=ocp.args.JsonRestore())
            with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
                return self._manager.restore(step, args=args)["extra"]["processes"][0]
        return None

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts to save a checkpoint; waits for the save before it.

        Args:
          step: larger than every step saved before.
          state: pytree of arrays, sharded in any way, with typed PRNG keys.
          extra: what JSON can hold; each process gets its own back.

        Raises:
          OSError: this save would not find room, or the save before it failed. Complete
            checkpoints are as they were.
          ValueError: an old step, or another one than that of another process.
        """
        self.wait()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"step = {step}: {self.directory} already has step {latest}. Delete what is newer "
                "than the step to go on from, or choose another folder."
            )
        hosts.agree(step=str(step))
        self._saving = (step, _num_bytes(state))
        # Asked before, for a save that fills the disk takes the run's other files down with it.
        if min(hosts.gather(_free_bytes(self.directory))) < self._saving[1]:
            raise self._disk_error(errno.ENOSPC)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            extra=ocp.args.JsonSave({"processes": hosts.gather(extra)}),
        )
        with self._disk_errors():
            self._manager.save(step, args=args, force=True)

    def restore(self, step: int | None, abstract: T) -> tuple[T, dict[str, Any]]:
        """Reads a checkpoint onto the devices that the abstract state names.

        Args:
          step: which one; None for the newest.
          abstract: the state's tree with `jax.ShapeDtypeStruct`s, or arrays, for leaves. Their
            shardings decide where the arrays go, whatever the mesh was that wrote them.

        Returns:
          The state, and this process's `extra`.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: a leaf is missing, or of another shape or dtype; or another number of
            processes wrote the checkpoint.
        """
        self.wait()
        step = _existing(self._manager, step, self.directory)
        place = f"{self.directory}/{step}"
        _refuse_misfit(place, _metadata(self._manager, step), abstract)
        args = ocp.args.Composite(state=_reading(abstract), extra=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        extras = restored["extra"]["processes"]
        if len(extras) != jax.process_count():
            raise ValueError(
                f"{place} was written by {len(extras)} processes, this job has "
                f"{jax.process_count()}, and each process has its own position in the data. "
                f"Run with {len(extras)}, or start a new run from these parameters."
            )
        return restored["state"], extras[jax.process_index()]

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          OSError: it could not be written. Earlier checkpoints are as they were.
        """
        with self._disk_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        with self._disk_errors():
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns a failure to write into an OSError with a sentence; takes half a save away."""
        try:
            yield
        except Exception as error:
            code = _os_error_code(error)
            if code is None:
                raise
            self._manager.reload()  # orbax believes in the step it could not save
            told = self._disk_error(code)
            self._remove_halves()
            raise told from error

    def _remove_halves(self) -> None:
        # orbax would do so in the background of the first save, too late to count the free bytes.
        if _is_local(self.directory) and hosts.is_first():
            for half in Path(self.directory).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)

    def _disk_error(self, code: int) -> OSError:
        step, needed = self._saving
        latest = self.latest()
        return OSError(
            code,
            f"Checkpoint {step} could not be written to {self.directory}: {os.strerror(code)}. It "
            f"needs about {needed:,} bytes, and {_free_bytes(self.directory):,} are free. Free "
            "some space, or set the workdir elsewhere and move the run there; the same command "
            + ("then starts anew." if latest is None else f"then resumes from step {latest}."),
        )


def newest(directory: str | Path) -> int:
    """The step of the newest complete checkpoint of a run, which may be going on.

    Raises:
      FileNotFoundError: there is no such folder, or no checkpoint in it.
    """
    directory = _normalised(directory)
    if _is_local(directory) and not os.path.isdir(directory):
        raise FileNotFoundError(f"{directory}: no such folder of checkpoints.")
    with contextlib.closing(_open(directory, create=False)) as manager:
        return _existing(manager, None, directory)


def restore_params(
    directory: str | Path,
    *,
    step: int | None = None,
    abstract: Params | None = None,
    core: Params | None = None,
) -> Params:
    """Reads the parameters of a checkpoint, for those who know nothing of the optimiser.

    Nothing is written or deleted, so the run that owns the folder may be going on.

    Args:
      directory: the folder of a `Checkpoints`.
      step: which checkpoint; None for the newest.
      abstract: the parameters' tree with `jax.ShapeDtypeStruct`s for leaves, whose shardings decide
        where the arrays go; None for whatever the checkpoint holds, on the first local device.
      core: a part of `abstract` that also will do, where the checkpoint holds that much and no
        more: what is left out is for the caller to make.

    Returns:
      The nested dict of arrays that was the state's `params`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: the state has no `params`, or a leaf that does not fit `abstract`.
    """
    directory = _normalised(directory)
    if _is_local(directory) and not os.path.isdir(directory):
        raise FileNotFoundError(f"{directory}: no such folder of checkpoints.")
    with contextlib.closing(_open(directory, create=False)) as manager:
        step = _existing(manager, step, directory)
        place = f"{directory}/{step}"
        stored = _metadata(manager, step)
        if "params" not in stored:
            raise ValueError(f"{place} has no params. Its state has {', '.join(sorted(stored))}.")
        if core is not None and _leaves(core).keys() == _leaves(stored["params"]).keys():
            abstract = core
        if abstract is not None:
            _refuse_misfit(place, {"params": stored["params"]}, {"params": abstract})
        wanted = {"params": stored["params"] if abstract is None else abstract}
        args = ocp.args.Composite(state=_reading(wanted, partial_restore=True))
        return manager.restore(step, args=args)["state"]["params"]


def identity(directory: str | Path, *, step: int | None = None) -> str:
    """Stub until the checksums are there."""
    import hashlib

    params = restore_params(directory, step=step)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    digest = hashlib.sha256()
    for path, leaf in leaves:
        digest.update(jax.tree_util.keystr(path).encode() + leaf.tobytes())
    return digest.hexdigest()[:16]


# orbax, its options and its trees.


def _open(directory: str, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "extra": ocp.JsonCheckpointHandler(),
        },
    )


def _normalised(directory: str | Path) -> str:
    return os.path.abspath(directory) if _is_local(directory) else str(directory)


def _existing(manager: ocp.CheckpointManager, step: int | None, directory: str) -> int:
    steps = sorted(manager.all_steps())
    if not steps:
        raise FileNotFoundError(f"{directory} has no checkpoint.")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise FileNotFoundError(f"{directory} has no checkpoint of step {step}. It has {known}.")
    return steps[-1] if step is None else step


def _metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The tree of what is stored, with shapes and dtypes for leaves."""
    tree = manager.item_metadata(step)["state"].tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _reading(abstract: Any, **options: Any) -> ocp.args.PyTreeRestore:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    item = jax.tree.map(placed, abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    return ocp.args.PyTreeRestore(item, restore_args=restore_args, **options)


def _refuse_misfit(place: str, stored: Any, wanted: Any) -> None:
    """Raises a sentence about the first leaf that differs."""
    there, here = _leaves(stored), _leaves(wanted)
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{place} does not fit: {name} is {there.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here. Build the state from the config that the "
                "checkpoint was written with."
            )


def _leaves(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf by its path, whether dict, tuple or dataclass leads there."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        stored = _stored(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        leaves[name] = f"{list(stored.shape)} {stored.dtype}"
    return leaves


def _stored(leaf: Any) -> Any:
    """What of a leaf is stored: a typed key is the integers it is made of."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


# Processes and disks.


def _num_bytes(state: Any) -> int:
    leaves = map(_stored, jax.tree.leaves(state))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _free_bytes(directory: str) -> float:
    return shutil.disk_usage(directory).free if _is_local(directory) else math.inf


def _is_local(directory: str | Path) -> bool:
    return "://" not in str(directory)


def _os_error_code(error: Exception) -> int | None:
    """The number of the system error that made a save fail, None where it was something else."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore raises ValueErrors
    return int(found[1]) if found else None
