"""The only loop on the host: draws a batch, runs the step, writes a line, saves, and can go on.

Whatever the algorithm, a run is `fit` over a pure step. The device is never waited for without
need: the numbers of a step are read while the next one runs. This file knows neither model nor loss
nor optimiser; a batch is what the iterator yields, and the data position is what it says it is.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from tw_jax import hosts
from tw_jax.checkpoint import Checkpoints
from tw_jax.metrics import Clock, Metrics, count_compiles, progress
from tw_jax.train.state import Step, TrainState

Hook = Callable[[int, TrainState], Mapping[str, float]]
"""(steps taken, state) -> numbers for that step's line; it decides itself when it has any."""


class Batches(Protocol):
    """Batches without end, with a position. What is drawn depends on the position alone."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def get_state(self) -> Mapping[str, Any]:
        """The position after the batches drawn so far, as JSON holds it."""
        ...

    def set_state(self, state: Any, /) -> None:
        """Goes to a position that `get_state` returned."""
        ...


class DivergedError(ValueError):
    """The loss is not a number any more."""


def resume(checkpoints: Checkpoints, abstract: TrainState, batches: Batches) -> TrainState | None:
    """Takes a run up where its newest sound checkpoint left it; damaged ones are put aside.

    Args:
      checkpoints: of the run.
      abstract: `abstract_state` of the mesh to go on with, which may be another than before.
      batches: moved to the position that was saved.

    Returns:
      The state, from which `fit` makes the very steps that it would have made without the
      interruption; None where nothing was saved.

    Raises:
      ValueError: the processes of this job find different checkpoints; or see `restore`.
    """
    latest = checkpoints.latest()
    hosts.agree(checkpoint=f"step {latest}")
    if latest is None:
        return None
    state, extra = checkpoints.restore(None, abstract)
    batches.set_state(extra["batches"])
    return state


def fit(
    state: TrainState,
    step: Step,
    batches: Batches,
    *,
    steps: int,
    save_every: int,
    metrics: Metrics,
    checkpoints: Checkpoints,
    place: Callable[[Any], Any],
    hooks: Sequence[Hook] = (),
    guard: Callable[[int, Mapping[str, float]], None] | None = None,
    note: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains until `steps` steps are taken, counting those that `state` has behind it.

    Each step writes one line of metrics, numbered by the steps taken before it: the numbers of the
    step, those of the hooks, and where time went since the line before: `steps_per_second`,
    `tokens_per_second`, `data_seconds`, `hook_seconds`, `save_seconds`.

    A checkpoint is saved every `save_every` steps, after the last step, and when SIGTERM or SIGINT
    (Ctrl-C) asks to stop; a second SIGINT stops at once.

    Args:
      state: given up where `step` donates it.
      step: compiled; its metrics have `loss` and may have `tokens`.
      batches: drawn from once per step, after the hooks of the step before.
      steps: steps of the whole run.
      save_every: steps from one checkpoint to the next.
      metrics: opened at the step of `state`.
      checkpoints: of the run.
      place: puts a batch on the devices; nothing else is moved there while a step is called.
      hooks: called in order after each step, with the state that it made.
      guard: called with a step and its numbers once its line is written; stops the run by raising.
      note: kept in every checkpoint beside the position, as JSON: the config of the run.

    Returns:
      The state after the last step; its checkpoint is on disk.

    Raises:
      DivergedError: the loss is not finite; the line that says so is written, and nothing saved.
      ValueError: the batches ended.
      KeyboardInterrupt: a signal asked to stop; the checkpoint is on disk.
    """
    first = int(state.step)
    bar = progress(desc="train", total=steps, start=first, unit="step")
    log = _Log(metrics, checkpoints, bar, guard)
    clock, late = log.clock, None
    with _signals() as caught, count_compiles() as compiles, contextlib.closing(log.bar):
        for index in range(first, steps):
            with clock.spend("data"):
                batch = place(_draw(batches, index, steps))
            if index == first:
                step = _ready(step, state, batch)
            before = compiles.count
            with jax.transfer_guard("disallow"):
                state, values = step(state, batch)
            if index > first and compiles.count > before:
                _warn_of_recompilation(index, batch)
            with clock.spend("hook"):
                extra = {k: v for hook in hooks for k, v in hook(index + 1, state).items()}
            if late is not None:
                log.write(late)
            late = _Line(index, values, extra)
            stops = _stops(caught, index)
            if stops or (index + 1) % save_every == 0 or index + 1 == steps:
                # Read before it is saved: a checkpoint is never one of a run that has diverged.
                log.write(late)
                late = None
                with clock.spend("save"):
                    checkpoints.save(
                        index + 1, state, {**(note or {}), "batches": batches.get_state()}
                    )
            if stops:
                checkpoints.wait()
                raise KeyboardInterrupt(
                    f"Stopped after step {index + 1} of {steps}, which is saved in "
                    f"{checkpoints.directory}. The same command goes on from there."
                )
    checkpoints.wait()
    return state


class _Line(NamedTuple):
    """What one step has to say, some of it not computed yet."""

    index: int  # steps taken before it
    values: Mapping[str, jax.Array]
    extra: Mapping[str, float]


class _Log:
    """Writes lines, moves the bar, and looks at the loss."""

    def __init__(self, metrics: Metrics, checkpoints: Checkpoints, bar: Any, guard: Any) -> None:
        self.clock, self.bar = Clock(), bar
        self._metrics, self._checkpoints, self._guard = metrics, checkpoints, guard

    def write(self, line: _Line) -> None:
        """Waits for the numbers of a step; raises DivergedError where its loss is not finite."""
        numbers = {name: float(value) for name, value in jax.device_get(line.values).items()}
        self.clock.count(steps=1, tokens=numbers.get("tokens", 0.0))
        self._metrics.write(line.index, {**numbers, **line.extra, **self.clock.read()})
        self.bar.set_postfix(loss=numbers["loss"], refresh=False)
        self.bar.update(1)
        if math.isfinite(numbers["loss"]):
            if self._guard is not None:
                self._guard(line.index, numbers)
            return
        good = self._checkpoints.latest()
        since = "no checkpoint was saved; start again"
        if good is not None:
            since = (
                f"the last good checkpoint is {self._checkpoints.directory}/{good}, so look at "
                f"steps {good} to {line.index} and go on from there"
            )
        raise DivergedError(
            f"loss = {numbers['loss']} at step {line.index}: want a finite number; {since}, with a "
            "lower Optim.peak_lr, or without the batch that did it."
        )


def _ready(step: Any, state: TrainState, batch: Any) -> Step:
    """The step, which no process of a job runs before all of them have compiled it."""
    if not jax.distributed.is_initialized():
        return step
    program = step.lower(state, batch).compile()
    # A collective on CPUs waits 30 seconds for the other side, and then the run is lost.
    hosts.gather("compiled")
    return program


def _draw(batches: Batches, index: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"The batches ended after {index} of {steps} steps: want one for each step. Let the "
            "data repeat, or ask for fewer steps."
        ) from None


def _warn_of_recompilation(index: int, batch: Any) -> None:
    shapes = ", ".join(sorted({str(list(leaf.shape)) for leaf in jax.tree.leaves(batch)}))
    warnings.warn(
        f"Step {index} was compiled anew, for a batch of {shapes}: want one program for all steps. "
        "Give all batches one shape and dtype.",
        stacklevel=3,
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them in the middle of a step."""
    caught: list[int] = []
    # Signals reach the main thread only; in a job of many processes JAX itself listens to SIGTERM.
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield caught
        return

    def note(number: int, _: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stops(caught: list[int], index: int) -> bool:
    if jax.process_count() > 1:
        # All processes must save after the same step, whichever of them got the signal.
        return hosts.is_asked_to_stop(index)
    return bool(caught)
