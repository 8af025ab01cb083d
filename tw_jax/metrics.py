"""Reports of a run: numbers per step, progress, time, and recompilations.

`Metrics` writes one JSONL line per step, and TensorBoard events; `read` reads the lines. `progress`
shows a bar in a terminal and occasional lines in a log file. `Clock` measures time, and
`count_compiles` counts compilations. Only process 0 of a job writes or shows anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import tensorboardX
import tqdm

from tw_jax import files, hosts, strict_json

FILE = "metrics.jsonl"
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
QUIET_SECONDS = 10.0
"""Seconds between two lines of progress if there is no terminal for a bar."""


class Metrics:
    """Writes one line of numbers per step to `workdir/metrics.jsonl`, and TensorBoard events.

    A line is strict JSON: {"step": 3, "wall_seconds": 12.5, "loss": 0.7}. A number that is not
    finite is the string "nan", "inf" or "-inf". `wall_seconds` continues that of earlier attempts.
    """

    def __init__(self, workdir: str | Path, *, step: int = 0) -> None:
        """Opens the files, and drops lines of an earlier attempt from `step` on.

        Args:
          workdir: Folder of the run; it is made if it does not exist.
          step: The first step that this attempt writes.
        """
        self._step = step - 1
        self._file: TextIO | None = None
        if not hosts.is_first():
            return
        path = Path(workdir) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(path) if line["step"] < step] if path.exists() else []
        text = "".join(map(_json_line, kept))
        files.write_text(path, text)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = tensorboardX.SummaryWriter(
            str(Path(workdir) / "tensorboard"), purge_step=step if step else None
        )
        self._start = time.monotonic() - (kept[-1]["wall_seconds"] if kept else 0.0)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers of one step; blocks until they are computed.

        Args:
          step: Greater than every step before.
          values: Python, numpy or JAX scalars by name; all numbers of the step.
        """
        if self._file is None:
            return
        if step <= self._step:
            raise ValueError(
                f"step = {step} must be greater than {self._step}, because a step has one line. "
                "Write all numbers of a step in one call."
            )
        numbers = {name: _number(name, v) for name, v in jax.device_get(dict(values)).items()}
        seconds = time.monotonic() - self._start
        line = _json_line({"step": step, "wall_seconds": round(seconds, 3), **numbers})
        try:
            self._file.write(line)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The metrics of step {step} could not be written to {self._file.name}: "
                f"{error.strerror}. Free some space and run the same command again.",
            ) from error
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)
        self._step = step

    def close(self) -> None:
        """Flushes and closes the files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = None

    def __enter__(self) -> Metrics:
        """Returns the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """Reads a metrics file.

    Args:
      path: A file that `Metrics` wrote. A crash may have cut off its last line.

    Returns:
      A dict per step: `step` is an int, and all other numbers are floats, nan and infinities too.

    Raises:
      ValueError: If a line other than the last is not a line of `Metrics`.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    parsed = []
    for number, line in enumerate(
        lines[:-1], start=1
    ):  # text after the last newline is an incomplete line
        try:
            values = strict_json.parse(line)
            numbers = {k: int(v) if k == "step" else float(v) for k, v in values.items()}
            _ = numbers["step"]
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
            raise ValueError(
                f"{path}:{number}: this line is not a JSON object of numbers with a step: "
                f"{line[:80]!r}. Delete it."
            ) from None
        parsed.append(numbers)
    return parsed


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int | None = None,
    start: int = 0,
    unit: str = "it",
) -> tqdm.tqdm:
    """A progress bar on stderr, or a line every ten seconds if stderr is not a terminal.

    Args:
      iterable: Items to iterate over; None if the caller calls `update(n)`.
      desc: Description of the work.
      total: Number of items if `iterable` has no length.
      start: Items that an earlier attempt has done.
      unit: Name of an item.

    Returns:
      The bar: iterate over it, or `update(n)`; `set_postfix(loss=0.7)` shows numbers; `close()`.
    """
    shared = {
        "desc": desc,
        "total": total,
        "initial": start,
        "unit": unit,
        "disable": not hosts.is_first(),
    }
    if sys.stderr.isatty():
        return tqdm.tqdm(iterable, dynamic_ncols=True, **shared)
    return tqdm.tqdm(
        iterable,
        file=_Lines(sys.stderr),
        mininterval=QUIET_SECONDS,
        maxinterval=QUIET_SECONDS,
        delay=QUIET_SECONDS,
        ncols=0,
        **shared,
    )


class Clock:
    """Measures seconds and rates between two readings.

    JAX returns before a computation is done. Read the clock after a call that waits for the
    results, such as `Metrics.write`.
    """

    def __init__(self) -> None:
        """Starts the clock."""
        self._reset()

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `<name>_seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - start

    def count(self, **amounts: float) -> None:
        """Adds amounts; `count(tokens=4096)` is reported as `tokens_per_second`."""
        for name, amount in amounts.items():
            self._counts[name] = self._counts.get(name, 0.0) + amount

    def read(self) -> dict[str, float]:
        """Returns the seconds and the rates since the last reading, and restarts the clock."""
        elapsed = time.perf_counter() - self._start
        values = {f"{name}_seconds": seconds for name, seconds in self._spent.items()}
        values |= {f"{name}_per_second": n / elapsed for name, n in self._counts.items()}
        self._reset()
        return values

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._spent: dict[str, float] = {}
        self._counts: dict[str, float] = {}


@dataclasses.dataclass
class Compiles:
    """Number of programs that the backend compiled, and the seconds that this took."""

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Counts the backend's compilations inside the block, in all threads.

    A step that compiles again after its first call is a bug, because a shape or a static value
    varies.

    Yields:
      The counter. It is always up to date, and keeps its value after the block.
    """
    compiles = Compiles()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            compiles.count += 1
            compiles.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class _Lines:
    """A text file that writes each redraw of a bar as a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()


def _number(name: str, value: Any) -> float:
    if name in ("step", "wall_seconds"):
        raise ValueError(
            f"metric {name!r} has the name of another field of the line. Rename the metric."
        )
    if np.shape(value):
        raise ValueError(
            f"metric {name!r} has shape {np.shape(value)}, but must be a single number."
        )
    return float(value)


def _json_line(values: Mapping[str, Any]) -> str:
    words = {k: v if math.isfinite(v) else str(float(v)) for k, v in values.items()}
    return json.dumps(words, allow_nan=False) + "\n"
