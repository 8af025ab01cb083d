"""Checkpoints, by orbax: a run saves and resumes them, and other programs read them.

A checkpoint is a folder named by its step. It holds the state, a pytree of arrays, and a JSON
object: its step, for each process all else (the position in the data, the config), and a checksum
of every array and of the object itself, which every restore verifies. A checkpoint appears whole or
not at all. A state can be any pytree; other programs find its parameters only if they are at
`params`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tw_jax import files, hosts
from tw_jax.checksums import checksums
from tw_jax.contracts import Params
from tw_jax.damage import DamagedError, agreed, damage, first_line, judged, os_error_code

T = TypeVar("T")

_NAMES = ocp.path.step.standard_name_format()


class Checkpoints:
    """The checkpoints of one run, in one folder; every process of a job makes its own.

    Saving copies the state off the devices and continues in the background, so the state can be
    donated to the next step at once. An error in the background is raised by the next call.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        """Opens the folder, and makes it if it does not exist.

        Remains of an interrupted save are deleted, so only one job may write here at a time. An
        entry that has the name of a step and cannot be one is renamed, after a warning.

        Args:
          directory: a local or mounted folder, or a URL that orbax reads (gs://bucket/run).
          keep: how many checkpoints to keep; the oldest go once a newer one is complete.

        Raises:
          DamagedError: there are such entries and no other checkpoint. Nothing is changed.
        """
        if keep < 1:
            raise ValueError(f"keep = {keep} must be at least 1.")
        self.directory = _normalised(directory)
        self._saving = (0, 0)
        """Step and bytes of the latest save."""
        self._remove_halves()
        self._set_aside_strays()
        self._manager = _open(
            self.directory, max_to_keep=keep, cleanup_tmp_directories=not _is_local(self.directory)
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def note(self) -> dict[str, Any] | None:
        """What process 0 kept beside the state in the newest checkpoint whose note can be read.

        Returns:
          Its `extra`; None where there is no checkpoint, or no note that can be read.
        """
        self.wait()
        for path in reversed(_paths(self.directory).values()):
            with contextlib.suppress(DamagedError):
                return _read_extra(path)["processes"][0]
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
                f"step = {step}: {self.directory} already has step {latest}. Delete the "
                "checkpoints after the step to resume from, or choose another folder."
            )
        hosts.agree(step=str(step))
        self._saving = (step, _num_bytes(state))
        # Checked before, because a save that fills the disk would break the run's other files too.
        if min(hosts.gather(_free_bytes(self.directory))) < self._saving[1]:
            raise self._disk_error(errno.ENOSPC)
        content = {"step": step, "processes": hosts.gather(extra), "arrays": _described(state)}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            extra=ocp.args.JsonSave({**content, "sha256": _seal(content)}),
        )
        with self._disk_errors():
            self._manager.save(step, args=args, force=True)

    def restore(self, step: int | None, abstract: T) -> tuple[T, dict[str, Any]]:
        """Reads a checkpoint onto the devices that the abstract state names, and verifies it.

        Args:
          step: which one; None for the newest that is sound. Damaged ones that are newer are then
            renamed, `12` to `12.damaged`, after a warning about each of them.
          abstract: the state's tree with `jax.ShapeDtypeStruct`s, or arrays, for leaves. Their
            shardings decide where the arrays go, whatever the mesh was that wrote them.

        Returns:
          The state, and this process's `extra`.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          DamagedError: it is damaged; or, where `step` is None, all are. Nothing is changed.
          ValueError: a leaf is missing, or of another shape or dtype; or another number of
            processes wrote the checkpoint.
        """
        self.wait()
        if step is not None:
            path = _existing(self.directory, step)
            try:
                return _restored_state(path, abstract)
            except DamagedError as error:
                raise _for_readers(error, path) from error
        _existing(self.directory, None)
        paths = _paths(self.directory)
        faults: dict[str, str] = {}
        for candidate in reversed(hosts.gather(list(paths))[0]):
            path = paths[candidate]
            try:
                found = _restored_state(path, abstract)
            except DamagedError as error:
                faults[path.name] = str(error)
                continue
            if faults:
                self._set_aside(faults, f"The run goes on from step {candidate}.")
                self._manager.reload()
            return found
        raise self._hopeless(list(faults.values()))

    def wait(self) -> None:
        """Waits until all saves are on disk.

        Raises:
          OSError: it could not be written. Earlier checkpoints are as they were.
        """
        with self._disk_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for all saves and closes the folder."""
        with self._disk_errors():
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns a failed write into an OSError with advice, and deletes the incomplete save."""
        try:
            yield
        except Exception as error:
            code = os_error_code(error)
            if code is None:
                raise
            self._manager.reload()  # orbax believes in the step it could not save
            disk_error = self._disk_error(code)
            self._remove_halves()
            raise disk_error from error

    def _remove_halves(self) -> None:
        # orbax would do this during the first save, after the free bytes are counted.
        if _is_local(self.directory) and hosts.is_first():
            for half in Path(self.directory).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)

    def _set_aside_strays(self) -> None:
        """Renames what has the name of a step and would stop orbax, or the next save of that step.

        Only entries that orbax cannot even list are touched here; `restore` judges the others.
        """
        if not _is_local(self.directory):
            return
        faults: dict[str, str] = {}
        for path in sorted(Path(self.directory).glob("[0-9]*")):
            if path.name.isdecimal() and not path.is_dir():
                faults[path.name] = f"{path} has the name of a checkpoint and is not a folder."
        for found in _NAMES.find_all(self.directory):
            try:
                _ = found.commit_timestamp  # orbax asks each of them when it opens the folder
            except Exception as error:
                faults[found.path.name] = damage(found.path, first_line(error))
        faults = hosts.gather(faults)[0]
        if not faults:
            return
        if not any(path.name not in faults for path in _paths(self.directory).values()):
            raise self._hopeless(list(faults.values()))
        self._set_aside(faults, "The run goes on without it.")

    def _set_aside(self, faults: Mapping[str, str], then: str) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again, and says so."""
        folder = _folder(self.directory)
        for name, fault in faults.items() if hosts.is_first() else ():
            numbers = itertools.chain([""], map(".{}".format, itertools.count(2)))
            kept = next(
                folder / f"{name}.damaged{number}"
                for number in numbers
                if not (folder / f"{name}.damaged{number}").exists()
            )
            (folder / name).rename(kept)
            warnings.warn(f"{fault} It is kept as {kept.name}. {then}", stacklevel=4)
        hosts.gather("renamed")

    def _hopeless(self, faults: list[str]) -> DamagedError:
        return DamagedError(
            f"{' '.join(faults)} {self.directory} has no sound checkpoint. Put back a copy of one, "
            "or move these elsewhere to start the run from its beginning."
        )

    def _disk_error(self, code: int) -> OSError:
        step, needed = self._saving
        latest = self.latest()
        return OSError(
            code,
            f"Checkpoint {step} could not be written to {self.directory}: {os.strerror(code)}. It "
            f"needs about {needed:,} bytes, and {_free_bytes(self.directory):,} are free. Free "
            "some space, or set the workdir elsewhere and move the run there; the same command "
            + ("then starts again." if latest is None else f"then resumes from step {latest}."),
        )


def newest(directory: str | Path) -> int:
    """The step of the newest complete checkpoint of a run, which may be going on.

    Raises:
      FileNotFoundError: there is no such folder, or no checkpoint in it.
    """
    return int(_existing(_normalised(directory), None).name)


def identity(directory: str | Path, *, step: int | None = None) -> str:
    """Names the parameters of a checkpoint by their content; no array is read.

    Args:
      directory: the folder of a `Checkpoints`.
      step: which checkpoint; None for the newest.

    Returns:
      16 hexadecimal digits, which depend on names, shapes, dtypes and values of the parameters, and
      neither on the place of the folder, nor on the mesh, nor on the rest of the state.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      DamagedError: its record is damaged.
      ValueError: its state has no `params`.
    """
    path = _existing(_normalised(directory), step)
    try:
        arrays = _read_extra(path)["arrays"]
    except DamagedError as error:
        raise _for_readers(error, path) from error
    _require_params(path, arrays)
    params = {name: told for name, told in arrays.items() if name.startswith("params.")}
    return _seal(params)[:16]


def read_note(directory: str | Path, *, step: int | None = None) -> dict[str, Any]:
    """Returns what process 0 kept beside the state of one checkpoint; no array is read.

    Args:
      directory: the folder of a `Checkpoints`.
      step: which checkpoint; None for the newest.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      DamagedError: its record is damaged.
    """
    path = _existing(_normalised(directory), step)
    try:
        return _read_extra(path)["processes"][0]
    except DamagedError as error:
        raise _for_readers(error, path) from error


def write_beside(directory: str | Path, contents: Mapping[str, bytes]) -> None:
    """Writes files that belong to all checkpoints of a folder, each in one move, by process 0.

    A file that has this content already is not touched.

    Args:
      directory: the folder of a `Checkpoints`. It is made if it does not exist.
      contents: content by name ("tokenizer.json"), which must not begin with a digit.

    Raises:
      OSError: in every process, if a file cannot be written.
    """
    folder = _folder(_normalised(directory))

    def write() -> None:
        for name, content in contents.items() if hosts.is_first() else ():
            file = folder / name
            if file.exists() and file.read_bytes() == content:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            if not _is_local(directory):
                file.write_bytes(content)  # an object of a bucket appears whole
                continue
            with files.replacing(Path(file)) as part:
                part.write_bytes(content)

    hosts.together(write, OSError)


def read_beside(directory: str | Path, name: str) -> bytes | None:
    """The content of a file that `write_beside` wrote; None where there is none.

    Raises:
      ValueError: it is a link that leads out of the folder, or no regular file.
    """
    folder = _folder(_normalised(directory))
    file = folder / name
    if _is_local(directory) and os.path.lexists(file):
        files.require_own(Path(file), Path(folder))
    return file.read_bytes() if file.exists() else None


def restore_params(
    directory: str | Path,
    *,
    step: int | None = None,
    abstract: Params | None = None,
    core: Params | None = None,
) -> Params:
    """Reads and verifies the parameters of a checkpoint, without those of the optimiser.

    Nothing is written, renamed or deleted, so the run that owns the folder may be going on. A
    damaged checkpoint is never replaced by an older one here: results of another model than the
    one asked for would be worse than none.

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
      DamagedError: the checkpoint is damaged.
      ValueError: the state has no `params`, or a leaf that does not fit `abstract`.
    """
    path = _existing(_normalised(directory), step)
    try:
        arrays = agreed(lambda: _read_extra(path)["arrays"])
        _require_params(path, arrays)
        stored = {name: told for name, told in arrays.items() if name.startswith("params.")}
        if core is not None and _leaves({"params": core}).keys() == stored.keys():
            abstract = core
        if abstract is not None:
            _refuse_misfit(path, stored, {"params": abstract})
        return _restored(path, arrays, abstract and {"params": abstract}, part="params.")["params"]
    except DamagedError as error:
        raise _for_readers(error, path) from error


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


def _folder(directory: str) -> Any:
    """The folder of checkpoints as a path that reads and writes URLs, too."""
    return ocp.path.step.build_step_path(directory, _NAMES, 0).parent


def _paths(directory: str) -> dict[int, Any]:
    """The folders of all complete checkpoints by step, from the oldest to the newest."""
    found = {one.step: one.path for one in _NAMES.find_all(directory)}
    return dict(sorted(found.items()))


def _existing(directory: str, step: int | None) -> Any:
    """The folder of one checkpoint; of the newest where `step` is None."""
    if _is_local(directory) and not os.path.isdir(directory):
        raise FileNotFoundError(f"{directory}: no such folder of checkpoints.")
    paths = _paths(directory)
    if not paths:
        raise FileNotFoundError(f"{directory} has no checkpoint.")
    if step is not None and step not in paths:
        known = ", ".join(map(str, paths))
        raise FileNotFoundError(f"{directory} has no checkpoint of step {step}. It has {known}.")
    return paths[max(paths) if step is None else step]


def _restored_state(path: Any, abstract: T) -> tuple[T, dict[str, Any]]:
    """The state of one checkpoint and this process's `extra`; raises as `restore`."""
    content = agreed(lambda: _read_extra(path))
    arrays, extras = content["arrays"], content["processes"]
    _refuse_misfit(path, arrays, abstract)
    if len(extras) != jax.process_count():
        raise ValueError(
            f"{path} was written by {len(extras)} processes, this job has "
            f"{jax.process_count()}, and each process has its own position in the data. "
            f"Run with {len(extras)}, or start a new run from these parameters."
        )
    return _restored(path, arrays, abstract), extras[jax.process_index()]


def _restored(path: Any, arrays: Mapping[str, str], abstract: Any, part: str = "") -> Any:
    """Reads arrays and compares their checksums with those that were written.

    The handlers are asked, and not a manager, because a manager waits for all processes after a
    restore, and one that finds damage would never come.

    Args:
      path: of the checkpoint.
      arrays: its record.
      abstract: the tree to read, that of all arrays or of those under `part`; None for the tree
        that orbax finds there.
      part: the only field of the state to read, with a dot; "" for all of it.
    """
    arrays = {name: told for name, told in arrays.items() if name.startswith(part)}
    recorded = {name: _shape(told) for name, told in arrays.items()}

    def read() -> Any:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(path / "state").tree
            stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
            if part:
                stored = {part[:-1]: stored[part[:-1]]}
            if _leaves(stored) != recorded:
                raise DamagedError(
                    damage(path, "its metadata and its JSON record name other arrays")
                )
            wanted = stored if abstract is None else abstract
            args = _reading(wanted, **({"partial_restore": True} if part else {}))
            restored = jax.block_until_ready(handler.restore(path / "state", args=args))
        leaves = zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True)
        for one, other in leaves if abstract is not None else ():
            if one.dtype != other.dtype:  # a typed key that came back as its integers
                raise DamagedError(
                    damage(path, f"an array is {one.dtype}, and {other.dtype} was written")
                )
        return restored

    restored = agreed(lambda: judged(path, read))
    for name, told in _described(restored).items():
        if told != arrays[name]:
            raise DamagedError(damage(path, f"the array {name} is not what was written"))
    return restored


def _read_extra(path: Any) -> dict[str, Any]:
    """The JSON object of a checkpoint, whose seal is verified: `step`, `processes`, `arrays`."""

    def read() -> Any:
        with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
            return handler.restore(path / "extra")

    content = judged(path, read)
    if not isinstance(content, dict) or "sha256" not in content:
        raise DamagedError(damage(path, "it has no checksums, as those of earlier versions"))
    seal = content.pop("sha256")
    if seal != _seal(content):
        raise DamagedError(damage(path, "its JSON record is not what was written"))
    if content.get("step") != int(path.name):
        raise DamagedError(damage(path, f"it was saved as step {content.get('step')}"))
    return content


def _described(state: Any) -> dict[str, str]:
    """Shape, dtype and checksum of every array by its name."""
    sums = checksums(jax.tree.leaves(state))
    return {
        name: f"{shape} {checksum}"
        for (name, shape), checksum in zip(_leaves(state).items(), sums, strict=True)
    }


def _shape(told: str) -> str:
    """Shape and dtype of a record's entry, without the checksum."""
    return told.rpartition(" ")[0]


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_params(path: Any, arrays: Mapping[str, str]) -> None:
    if not any(name.startswith("params.") for name in arrays):
        fields = ", ".join(sorted({name.partition(".")[0] for name in arrays}))
        raise ValueError(f"{path} has no params. Its state has {fields}.")


def _reading(abstract: Any, **options: Any) -> ocp.args.PyTreeRestore:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    item = jax.tree.map(placed, abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    return ocp.args.PyTreeRestore(item, restore_args=restore_args, **options)


def _refuse_misfit(path: Any, arrays: Mapping[str, str], wanted: Any) -> None:
    """Raises a sentence about the first leaf that differs from the record of a checkpoint."""
    there, here = {name: _shape(told) for name, told in arrays.items()}, _leaves(wanted)
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{path} does not fit: {name} is {there.get(name, 'missing')} there and "
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
    """The stored form of a leaf: a typed key is stored as its integers."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def _for_readers(error: DamagedError, path: Any) -> Exception:
    """The error with advice for a caller who named this checkpoint."""
    if not path.exists():
        return FileNotFoundError(
            f"{path} was deleted while it was read: its run keeps only the newest checkpoints. "
            "Run the same command again."
        )
    older = [step for step in _paths(str(path.parent)) if step < int(path.name)]
    then = f" to use step {older[-1]}, the newest before it" if older else ""
    return DamagedError(f"{error} Put back a copy of it, or move the folder elsewhere{then}.")


# Processes and disks.


def _num_bytes(state: Any) -> int:
    leaves = map(_stored, jax.tree.leaves(state))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _free_bytes(directory: str) -> float:
    return shutil.disk_usage(directory).free if _is_local(directory) else math.inf


def _is_local(directory: str | Path) -> bool:
    return "://" not in str(directory)
