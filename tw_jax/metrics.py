"""What a run reports: numbers per step, progress, where the time goes, what was recompiled.

`Metrics` is the only writer: one JSONL line per step, and TensorBoard. `progress` is a bar for
people and a line now and then for log files. `Clock` measures, `count_compiles` counts. Only
process 0 of a job writes or shows anything. This file does not know what the numbers mean; `read`
hands the lines on to plots and tests.
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
"""Time between two lines of progress where no terminal shows a bar."""


class Metrics:
    """Writes one line of numbers per step to `workdir/metrics.jsonl`, and TensorBoard events.

    A line is strict JSON: {"step": 3, "wall_seconds": 12.5, "loss": 0.7}. What is not finite is the
    string "nan", "inf" or "-inf". `wall_seconds` goes on from where an earlier attempt stood.
    """

    def __init__(self, workdir: str | Path, *, step: int = 0) -> None:
        """Opens the files; what an earlier attempt wrote at `step` or later is dropped.

        Args:
          workdir: folder of the run; it is made where it does not exist.
          step: the first step that this attempt will write.
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
          step: larger than every step written before.
          values: scalars by name, of Python, numpy or JAX; all of a step in one call.
        """
        if self._file is None:
            return
        if step <= self._step:
            raise ValueError(
                f"step = {step}: want more than {self._step}, for a step has one line. "
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
        """Returns itself; the end of the block closes the files."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """Reads a metrics file.

    Args:
      path: a file that `Metrics` wrote. Its last line may be cut off, as a crash leaves it.

    Returns:
      A dict per step: `step` is an int, all else floats; nan and infinities are numbers again.

    Raises:
      ValueError: a line other than the last is not what `Metrics` writes.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    parsed = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is cut off
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
    """A progress bar on stderr; where stderr is no terminal, a line every ten seconds instead.

    Args:
      iterable: what to go through; None where the caller calls `update(n)`.
      desc: what is being done.
      total: number of items, where `iterable` has no length.
      start: items done before, in an attempt that is resumed.
      unit: what an item is.

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
    """Where time goes, and what it bought, between two readings.

    JAX returns before a computation is done: read the clock after something that waits for the
    results, as `Metrics.write` does.
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
        """Adds amounts: `count(tokens=4096)` is read as `tokens_per_second`."""
        for name, amount in amounts.items():
            self._counts[name] = self._counts.get(name, 0.0) + amount

    def read(self) -> dict[str, float]:
        """Returns the seconds and the rates since the last reading, and starts anew."""
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
    """How many programs the backend compiled, and how long that took."""

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Counts the backend's compilations inside the block, of every thread.

    A step that compiles again after its first call is a bug: some shape or static value varies.

    Yields:
      The counter; it is up to date at any time, and keeps its value after the block.
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
    """A file that turns a redrawn bar into lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()


def _number(name: str, value: Any) -> float:
    if name in ("step", "wall_seconds"):
        raise ValueError(f"metric {name!r}: the line has a value of that name. Rename the metric.")
    if np.shape(value):
        raise ValueError(f"metric {name!r} has shape {np.shape(value)}: want a single number.")
    return float(value)


def _json_line(values: Mapping[str, Any]) -> str:
    words = {k: v if math.isfinite(v) else str(float(v)) for k, v in values.items()}
    return json.dumps(words, allow_nan=False) + "\n"
