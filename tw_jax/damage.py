"""Damage of stored files: one error for it, told apart from the troubles of a healthy store.

A reader of files is run by `judged`, which turns what it says of damaged files into a sentence;
`agreed` makes all processes of a job see the same. This file does not know what is read.
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
    """What is stored of a checkpoint is not what was written."""


def damage(path: Any, fault: str) -> str:
    """The sentence about one checkpoint."""
    return f"Checkpoint {path} is damaged: {fault}."


def judged(path: Any, read: Callable[[], T]) -> T:
    """What `read` returns; turns what orbax says of damaged files into a DamagedError.

    Errors of memory, devices and disks are not damage and pass.
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
    """An unraisable hook that drops what orbax's abandoned readers say, and nothing else."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self.hook = hook

    def __call__(self, unraisable: Any) -> None:
        name = getattr(unraisable.object, "__qualname__", "")
        if "Event loop is closed" in str(unraisable.exc_value) or name.startswith("_read_array"):
            return
        self.hook(unraisable)


def _silence_readers() -> None:
    """Keeps tracebacks off the screen after a restore that failed and has been told as a sentence.

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
    """The first line of what an error says, without the full stop, and not too long."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (line if len(line) <= 240 else line[:240] + "...").rstrip(".")


def agreed(read: Callable[[], T]) -> T:
    """Reads in every process; where one of them finds damage, all raise a DamagedError."""
    return hosts.together(read, DamagedError)


def os_error_code(error: Exception) -> int | None:
    """The number of the system error that made a save fail, None where it was something else."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore raises ValueErrors
    return int(found[1]) if found else None
