"""Damaged files: one error for them, distinct from failures of memory, devices and disks.

`judged` runs a reader of files and turns its errors about damaged files into a `DamagedError`.
`agreed` makes all processes of a job fail together.
"""

from __future__ import annotations

import errno
import gc
import logging
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from tw_jax import hosts

T = TypeVar("T")


class DamagedError(ValueError):
    """The stored content of a checkpoint is not what was written."""


def damage(path: Any, fault: str) -> str:
    """The error message about one checkpoint."""
    return f"Checkpoint {path} is damaged: {fault}."


def judged(path: Any, read: Callable[[], T]) -> T:
    """Returns the result of `read`; turns orbax's errors about damaged files into DamagedErrors.

    Errors of memory, devices and disks are not damage; they are raised unchanged.
    """
    try:
        return read()
    except (DamagedError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if os_error_code(error) not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise
        fault = damage(path, f"it cannot be read ({first_line(error)})")
    _silence_readers()
    raise DamagedError(fault)


class _WithoutReaders:
    """An unraisable hook that drops only the errors of orbax's abandoned readers."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self.hook = hook

    def __call__(self, unraisable: Any) -> None:
        name = getattr(unraisable.object, "__qualname__", "")
        if "Event loop is closed" in str(unraisable.exc_value) or name.startswith("_read_array"):
            return
        self.hook(unraisable)


def _silence_readers() -> None:
    """Suppresses tracebacks after a failed restore that is already reported as an error.

    The first array that cannot be read ends orbax's restore. Its readers of the other arrays go on,
    and each prints a traceback when it finishes later or is collected.
    """
    if not isinstance(sys.unraisablehook, _WithoutReaders):
        sys.unraisablehook = _WithoutReaders(sys.unraisablehook)
    tasks = logging.getLogger("asyncio")
    was_disabled, tasks.disabled = tasks.disabled, True
    gc.collect()
    tasks.disabled = was_disabled


def first_line(error: Exception) -> str:
    """The first line of an error's message, without full stop and of at most 240 characters."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (line if len(line) <= 240 else line[:240] + "...").rstrip(".")


def agreed(read: Callable[[], T]) -> T:
    """Reads in every process; if one of them finds damage, all raise a DamagedError."""
    return hosts.together(read, DamagedError)


def os_error_code(error: Exception) -> int | None:
    """The number of the system error that made a save fail; None if the cause is another one."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore raises ValueErrors
    return int(found[1]) if found else None
