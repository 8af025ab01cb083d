"""The folder of a run: one job at a time holds its lock, and `config.gin` records the config.

A job locks the folder until it ends. The operating system releases the lock when the process dies,
however it dies, so nothing has to be cleaned up after a crash. `config.gin` is written once a run
has started, and earlier ones are kept. `train/identity.py` decides which changes of a config a
resumed run may have.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tw_jax import files, hosts
from tw_jax.config import operative

PATIENCE_SECONDS = 10.0
"""Seconds that a job waits for the lock, because a large killed process needs time to end."""

LOCK = ".lock"
CONFIG = "config.gin"

_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_held: dict[str, dict[str, Any]] = {}
"""Locks of this process by resolved folder; the system would grant them to it a second time."""


@contextlib.contextmanager
def held(folders: Sequence[str], command: str) -> Iterator[None]:
    """Reserves folders for this job until the block ends; makes those that do not exist.

    Process 0 of a job takes the lock for all of its processes. It is a POSIX lock on the file
    `.lock`, which also holds between hosts that share the folder by NFS. Where the file system has
    no locks, a warning says so and the program runs.

    Args:
      folders: Folders that the program writes.
      command: The command, for the error message of other jobs.

    Raises:
      ValueError: In every process, if another job holds a folder, if a folder is a URL, or if the
        hosts of this job do not share it.
      OSError: If a folder cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        for folder in {os.path.realpath(_local(folder)): folder for folder in folders}.values():
            hosts.require_shared(Path(folder))
            stack.enter_context(_locked(Path(folder), command))
        yield


def record(cfg: Any) -> None:
    """Writes `config.gin` into the workdir of a config: the whole config and what produced it.

    A program calls this after its checks have passed, so a command that is refused leaves the file
    as it was. An earlier `config.gin` that differs is kept as `config.1.gin`, `config.2.gin` and so
    on, the newest with the highest number. Process 0 writes for its job.

    Args:
      cfg: The root config of a program, with the field `workdir`.
    """
    if not hosts.is_first():
        return
    folder = Path(cfg.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    file, verb = folder / CONFIG, type(cfg).__name__.lower()
    text = f"# {origin()}\n# The same run again: tw {verb} {file}\n\n{operative(cfg)}"
    before = file.read_text(encoding="utf-8") if file.exists() else text
    if before != text:
        numbers = [int(n) for p in folder.glob("config.*.gin") if (n := p.name[7:-4]).isdecimal()]
        files.write_text(folder / f"config.{max(numbers, default=0) + 1}.gin", before)
    files.write_text(file, text)


def origin() -> str:
    """The version of this package and, in a git checkout of it, the commit."""
    try:
        version = f"tw_jax {importlib.metadata.version('tw_jax')}"
    except importlib.metadata.PackageNotFoundError:
        version = "tw_jax, not installed"
    package = Path(__file__).resolve().parent
    try:
        # An installed package may lie inside the checkout of another project.
        if Path(_git(package, "rev-parse", "--show-toplevel")) != package.parent:
            return version
        commit = _git(package, "rev-parse", "HEAD")
        is_changed = _git(package, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}, commit {commit}{' with local changes' if is_changed else ''}"


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


# The lock.


def _local(folder: str) -> str:
    if "://" in folder:
        raise ValueError(
            f"workdir = {folder!r} is a URL, and a workdir must be a folder. Mount the bucket, or "
            "a disk that all hosts share, and name the place where it is mounted."
        )
    return folder


@contextlib.contextmanager
def _locked(folder: Path, command: str) -> Iterator[None]:
    """Holds the lock of one folder; all processes of the job raise if process 0 cannot lock it."""
    # Other processes must neither start without the lock nor wait for a process that has failed.
    descriptor = hosts.together(
        lambda: _take(folder, command) if hosts.is_first() else None, ValueError, OSError
    )
    try:
        yield
    finally:
        if descriptor is not None:
            _release(folder, descriptor)


def _take(folder: Path, command: str) -> int:
    """Locks the lock file, writes this process's name into it, and returns its descriptor.

    Raises:
      ValueError: If another job holds the folder.
      OSError: If the file cannot be opened.
    """
    if holder := _held.get(os.path.realpath(folder)):
        raise ValueError(_in_use(folder, holder))
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _wait_for(descriptor, folder):
            os.ftruncate(descriptor, 0)
            holder = _holder(command)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
            os.fsync(descriptor)
            _held[os.path.realpath(folder)] = holder
            return descriptor
        text = os.pread(descriptor, 65536, 0)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    try:
        holder = json.loads(text)
    except ValueError:
        holder = {}  # the holder has not written its name yet
    if not isinstance(holder, dict) or holder.keys() != _holder("").keys():
        holder = {}  # another program wrote the file
    raise ValueError(_in_use(folder, holder))


def _wait_for(descriptor: int, folder: Path) -> bool:
    """Locks the file; False if another process still holds it after `PATIENCE_SECONDS`."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            # Not flock, because a child that inherited the file would keep that lock alive.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _CANNOT_LOCK:
                warnings.warn(
                    f"{folder} cannot be locked ({os.strerror(error.errno)}). Make sure that no "
                    "other job writes there.",
                    stacklevel=2,
                )
                return True
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)


def _release(folder: Path, descriptor: int) -> None:
    # The file is not deleted, because other jobs may already wait for its lock.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)
    del _held[os.path.realpath(folder)]


def _holder(command: str) -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": started,
        "command": command,
    }


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    who = "another job"
    if holder:
        who = "process {process} on {host}, started {started}: {command}".format(**holder)
    return (
        f"{folder} is in use by {who}. Two jobs would overwrite each other's results. Wait until "
        "that one ends, stop it, or choose another workdir."
    )
