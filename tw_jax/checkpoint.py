"""Checkpoints, by orbax: a run saves and resumes them, and other programs read them.

A checkpoint is a folder named by its step. It holds the state, which is a pytree of arrays, and a
JSON object. The object has the step, a note of each process (such as its position in the data), and
checksums of all arrays and of itself. Every restore verifies them. A checkpoint appears whole or
not at all. A state can be any pytree, but other programs find its parameters only at `params`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from tw_jax import files, folders, hosts
from tw_jax.checksums import (
    array_records,
    array_types,
    json_digest,
    num_bytes,
    types_of_records,
)
from tw_jax.contracts import Params
from tw_jax.damage import DamagedError, agreed, damage, first_line, judged, os_error_code

T = TypeVar("T")

_NAMES = ocp.path.step.standard_name_format()


class Checkpoints:
    """The checkpoints of one run, in one folder; every process of a job makes its own.

    Saving copies the state to the host and continues in the background, so the state can be donated
    to the next step at once. An error in the background is raised by the next call.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        """Opens the folder, and creates it if it does not exist.

        Remains of an interrupted save are deleted, so only one job may write here at a time. An
        entry that is named like a step but cannot be a checkpoint is renamed, with a warning.

        Args:
          directory: A local or mounted folder, or a URL that orbax reads (gs://bucket/run).
          keep: Number of checkpoints to keep. Older ones are deleted after a newer one is complete.

        Raises:
          DamagedError: If there are such entries and no other checkpoint. Nothing is changed then.
        """
        if keep < 1:
            raise ValueError(f"keep = {keep} must be at least 1.")
        self.directory = _normalised(directory)
        self._saving = (0, 0)
        """Step and bytes of the latest save."""
        self._remove_partial_saves()
        self._rename_strays()
        self._manager = _open(
            self.directory,
            max_to_keep=keep,
            cleanup_tmp_directories=not folders.is_local(self.directory),
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def note(self) -> dict[str, Any] | None:
        """The `extra` of process 0 in the newest checkpoint whose note can be read.

        Returns:
          None if there is no checkpoint, or no note that can be read.
        """
        self.wait()
        for path in reversed(_paths(self.directory).values()):
            with contextlib.suppress(DamagedError):
                return _read_extra(path)["processes"][0]
        return None

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts to save a checkpoint, after waiting for the save before it.

        Args:
          step: Larger than every step saved before.
          state: Pytree of arrays, sharded in any way. PRNG keys must be typed.
          extra: A JSON object. Each process gets its own back.

        Raises:
          OSError: If there is not enough space, or the save before it failed. Complete checkpoints
            are unchanged.
          ValueError: If the step is not larger, or differs from the step of another process.
        """
        self.wait()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"step = {step}: {self.directory} already has step {latest}. Delete the "
                "checkpoints after the step to resume from, or choose another folder."
            )
        hosts.agree(step=str(step))
        self._saving = (step, num_bytes(state))
        # This is checked first, because a full disk would also break the run's other files.
        if min(hosts.gather(folders.free_bytes(self.directory))) < self._saving[1]:
            raise self._disk_error(errno.ENOSPC)
        content = {"step": step, "processes": hosts.gather(extra), "arrays": array_records(state)}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            extra=ocp.args.JsonSave({**content, "sha256": json_digest(content)}),
        )
        with self._disk_errors():
            self._manager.save(step, args=args, force=True)

    def restore(self, step: int | None, abstract: T) -> tuple[T, dict[str, Any]]:
        """Reads a checkpoint onto the devices that the abstract state names, and verifies it.

        Args:
          step: Which checkpoint to read; None takes the newest that is not damaged. Newer ones that
            are damaged are then renamed, `12` to `12.damaged`, with a warning about each of them.
          abstract: The state's tree with `jax.ShapeDtypeStruct`s or arrays as leaves. Their
            shardings decide where the arrays go. The mesh may differ from the one that wrote them.

        Returns:
          The state, and this process's `extra`.

        Raises:
          FileNotFoundError: If there is no such checkpoint.
          DamagedError: If it is damaged or, if `step` is None, all are. Nothing is changed then.
          ValueError: If a leaf is missing or has another shape or dtype, or if another number of
            processes wrote the checkpoint.
        """
        self.wait()
        if step is not None:
            path = _existing(self.directory, step)
            try:
                return _restored_state(path, abstract)
            except DamagedError as error:
                raise _with_advice(error, path) from error
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
                self._rename_damaged(faults, f"The run continues from step {candidate}.")
                self._manager.reload()
            return found
        raise self._none_sound(list(faults.values()))

    def wait(self) -> None:
        """Waits until all saves are on disk.

        Raises:
          OSError: If a save could not be written. Earlier checkpoints are unchanged.
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
            self._manager.reload()  # orbax still lists the step that it could not save
            disk_error = self._disk_error(code)
            self._remove_partial_saves()
            raise disk_error from error

    def _remove_partial_saves(self) -> None:
        # orbax would do this during the first save, which is after the free bytes are counted.
        if folders.is_local(self.directory) and hosts.is_first():
            for partial in Path(self.directory).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)

    def _rename_strays(self) -> None:
        """Renames entries named like a step that would stop orbax or the next save of that step.

        Only entries that orbax cannot list are renamed here; `restore` judges the others.
        """
        if not folders.is_local(self.directory):
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
            raise self._none_sound(list(faults.values()))
        self._rename_damaged(faults, "The run continues without it.")

    def _rename_damaged(self, faults: Mapping[str, str], then: str) -> None:
        """Renames damaged checkpoints with a warning, so that their steps can be saved again."""
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

    def _none_sound(self, faults: list[str]) -> DamagedError:
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
            f"needs about {needed:,} bytes, and {folders.free_bytes(self.directory):,} are free. "
            "Free some space, or set the workdir elsewhere and move the run there. The same "
            "command "
            + ("then starts again." if latest is None else f"then resumes from step {latest}."),
        )


def newest(directory: str | Path) -> int:
    """The step of the newest complete checkpoint of a run, which may still be running.

    Raises:
      FileNotFoundError: If there is no such folder, or no checkpoint in it.
    """
    return int(_existing(_normalised(directory), None).name)


def identity(directory: str | Path, *, step: int | None = None) -> str:
    """A fingerprint of a checkpoint's parameters. It is made from checksums; no array is read.

    Args:
      directory: The folder of a `Checkpoints`.
      step: Which checkpoint; None for the newest.

    Returns:
      16 hexadecimal digits. They depend on names, shapes, dtypes and values of the parameters, but
      not on the path of the folder, the mesh or the rest of the state.

    Raises:
      FileNotFoundError: If there is no such checkpoint.
      DamagedError: If its record is damaged.
      ValueError: If its state has no `params`.
    """
    path = _existing(_normalised(directory), step)
    try:
        arrays = _read_extra(path)["arrays"]
    except DamagedError as error:
        raise _with_advice(error, path) from error
    _require_params(path, arrays)
    return json_digest(_part(arrays, "params."))[:16]


def read_note(directory: str | Path, *, step: int | None = None) -> dict[str, Any]:
    """Returns the `extra` of process 0 in one checkpoint; no array is read.

    Args:
      directory: The folder of a `Checkpoints`.
      step: Which checkpoint; None for the newest.

    Raises:
      FileNotFoundError: If there is no such checkpoint.
      DamagedError: If its record is damaged.
    """
    path = _existing(_normalised(directory), step)
    try:
        return _read_extra(path)["processes"][0]
    except DamagedError as error:
        raise _with_advice(error, path) from error


def write_beside(directory: str | Path, contents: Mapping[str, bytes]) -> None:
    """Writes files that belong to all checkpoints of a folder, atomically, by process 0.

    A file that already has this content is not written.

    Args:
      directory: The folder of a `Checkpoints`. It is created if it does not exist.
      contents: Content by name ("tokenizer.json"). A name must not begin with a digit.

    Raises:
      OSError: In every process, if a file cannot be written.
    """
    folder = _folder(_normalised(directory))

    def write() -> None:
        for name, content in contents.items() if hosts.is_first() else ():
            file = folder / name
            if file.exists() and file.read_bytes() == content:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            if not folders.is_local(directory):
                file.write_bytes(content)  # an object of a bucket appears whole
                continue
            with files.replacing(Path(file)) as part:
                part.write_bytes(content)

    hosts.together(write, OSError)


def read_beside(directory: str | Path, name: str) -> bytes | None:
    """The content of a file that `write_beside` wrote; None if there is none.

    Raises:
      ValueError: If it is a link that leads out of the folder, or not a regular file.
    """
    folder = _folder(_normalised(directory))
    file = folder / name
    if folders.is_local(directory) and os.path.lexists(file):
        files.require_own(Path(file), Path(folder))
    return file.read_bytes() if file.exists() else None


def restore_params(
    directory: str | Path,
    *,
    step: int | None = None,
    abstract: Params | None = None,
    core: Params | None = None,
) -> Params:
    """Reads and verifies the parameters of a checkpoint, without the state of the optimiser.

    Nothing is written, renamed or deleted, so the run that owns the folder may still be running. A
    damaged checkpoint is an error. No older one is read instead, because the results would then be
    those of another model.

    Args:
      directory: The folder of a `Checkpoints`.
      step: Which checkpoint; None for the newest.
      abstract: The tree of parameters with `jax.ShapeDtypeStruct`s as leaves. Their shardings
        decide where the arrays go. None reads all parameters onto the first local device.
      core: A part of `abstract` that is read if the checkpoint holds exactly this part. The caller
        makes the rest.

    Returns:
      The nested dict of arrays that was the state's `params`.

    Raises:
      FileNotFoundError: If there is no such checkpoint.
      DamagedError: If the checkpoint is damaged.
      ValueError: If the state has no `params`, or a leaf that does not fit `abstract`.
    """
    path = _existing(_normalised(directory), step)
    try:
        arrays = agreed(lambda: _read_extra(path)["arrays"])
        _require_params(path, arrays)
        params = _part(arrays, "params.")
        if core is not None and array_types({"params": core}).keys() == params.keys():
            abstract = core
        if abstract is not None:
            _refuse_misfit(path, params, {"params": abstract})
        return _restored(path, arrays, abstract and {"params": abstract}, part="params.")["params"]
    except DamagedError as error:
        raise _with_advice(error, path) from error


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
    return os.path.abspath(directory) if folders.is_local(directory) else str(directory)


def _folder(directory: str) -> Any:
    """The folder of checkpoints as a path object that also reads and writes URLs."""
    return ocp.path.step.build_step_path(directory, _NAMES, 0).parent


def _paths(directory: str) -> dict[int, Any]:
    """The folders of all complete checkpoints by step, from the oldest to the newest."""
    found = {one.step: one.path for one in _NAMES.find_all(directory)}
    return dict(sorted(found.items()))


def _existing(directory: str, step: int | None) -> Any:
    """The folder of one checkpoint, or of the newest if `step` is None."""
    if folders.is_local(directory) and not os.path.isdir(directory):
        raise FileNotFoundError(f"{directory}: no such folder of checkpoints.")
    paths = _paths(directory)
    if not paths:
        raise FileNotFoundError(f"{directory} has no checkpoint.")
    if step is not None and step not in paths:
        steps = ", ".join(map(str, paths))
        raise FileNotFoundError(f"{directory} has no checkpoint of step {step}. It has {steps}.")
    return paths[max(paths) if step is None else step]


def _restored_state(path: Any, abstract: T) -> tuple[T, dict[str, Any]]:
    """The state of one checkpoint and this process's `extra`; see `Checkpoints.restore`."""
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

    This uses handlers and not a manager, because a manager waits for all processes after a restore.
    A process that finds damage raises an error, and the others would wait for it forever.

    Args:
      path: Path of the checkpoint.
      arrays: The records of its arrays.
      abstract: The tree to read: that of all arrays, or of those under `part`. None reads the tree
        that orbax finds there.
      part: The only field of the state to read, followed by a dot; "" reads all fields.
    """
    arrays = _part(arrays, part)

    def read() -> Any:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(path / "state").tree
            tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
            if part:
                tree = {part[:-1]: tree[part[:-1]]}
            if array_types(tree) != types_of_records(arrays):
                raise DamagedError(
                    damage(path, "its metadata and its JSON record name different arrays")
                )
            requested = tree if abstract is None else abstract
            args = _restore_args(requested, **({"partial_restore": True} if part else {}))
            restored = jax.block_until_ready(handler.restore(path / "state", args=args))
        leaves = zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True)
        for one, other in leaves if abstract is not None else ():
            if one.dtype != other.dtype:  # a typed key that was read as integers
                raise DamagedError(
                    damage(path, f"an array is {one.dtype}, and {other.dtype} was written")
                )
        return restored

    restored = agreed(lambda: judged(path, read))
    for name, record in array_records(restored).items():
        if record != arrays[name]:
            raise DamagedError(damage(path, f"the array {name} is not what was written"))
    return restored


def _read_extra(path: Any) -> dict[str, Any]:
    """The verified JSON object of a checkpoint: `step`, `processes` and `arrays`."""

    def read() -> Any:
        with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
            return handler.restore(path / "extra")

    content = judged(path, read)
    if not isinstance(content, dict) or "sha256" not in content:
        raise DamagedError(damage(path, "it has no checksums, as those of earlier versions"))
    if content.pop("sha256") != json_digest(content):
        raise DamagedError(damage(path, "its JSON record is not what was written"))
    if content.get("step") != int(path.name):
        raise DamagedError(damage(path, f"it was saved as step {content.get('step')}"))
    return content


def _part(arrays: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name: record for name, record in arrays.items() if name.startswith(prefix)}


def _require_params(path: Any, arrays: Mapping[str, str]) -> None:
    if not any(name.startswith("params.") for name in arrays):
        fields = ", ".join(sorted({name.partition(".")[0] for name in arrays}))
        raise ValueError(f"{path} has no params. Its state has {fields}.")


def _restore_args(abstract: Any, **options: Any) -> ocp.args.PyTreeRestore:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    item = jax.tree.map(placed, abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    return ocp.args.PyTreeRestore(item, restore_args=restore_args, **options)


def _refuse_misfit(path: Any, arrays: Mapping[str, str], abstract: Any) -> None:
    """Raises a ValueError about the first leaf that differs from the record of a checkpoint."""
    there, here = types_of_records(arrays), array_types(abstract)
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{path} does not fit: {name} is {there.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here. Build the state from the config that the "
                "checkpoint was written with."
            )


def _with_advice(error: DamagedError, path: Any) -> Exception:
    """The error with advice for a caller who named this checkpoint."""
    if not path.exists():
        return FileNotFoundError(
            f"{path} was deleted while it was read: its run keeps only the newest checkpoints. "
            "Run the same command again."
        )
    older = [step for step in _paths(str(path.parent)) if step < int(path.name)]
    then = f" to use step {older[-1]}, the newest before it" if older else ""
    return DamagedError(f"{error} Put back a copy of it, or move the folder elsewhere{then}.")
