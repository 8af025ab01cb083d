"""The loop of a run: it runs the step, writes lines, saves checkpoints and can be resumed.

A program iterates over a `TrainingLoop`, which yields the numbers of the steps that are left. The
body makes a batch and calls `step`, `log` where it needs the numbers at once, and `save_when_due`.
A program that does not call `log` never waits for the device: the numbers of a step are then read
while the next step runs. This file does not depend on a model, a loss or an optimiser.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from tw_jax import hosts
from tw_jax.checkpoint import Checkpoints
from tw_jax.metrics import Clock, Metrics, count_compiles, progress
from tw_jax.train.state import Step, TrainState

MAX_NONFINITE = 5
"""Steps in a row whose gradients are not finite before a run stops; fewer in a shorter run.

One such step is skipped and may be an accident of its batch. As with `max_consecutive_errors` of
`optax.apply_if_finite`, many in a row mean that no later step will be better.
"""


class DivergedError(ValueError):
    """The loss, or the gradients of many steps in a row, are not finite any more."""


def resume(checkpoints: Checkpoints, abstract: TrainState) -> tuple[TrainState | None, Any]:
    """Reads the newest sound checkpoint of a run; damaged ones are set aside.

    Args:
      checkpoints: of the run.
      abstract: `abstract_state` of the mesh to continue on, which may differ from the earlier one.

    Returns:
      The state, and the position in the data that was saved with it. A `TrainingLoop` takes the
      same steps from there as it would have taken without the interruption. (None, None) if nothing
      was saved.

    Raises:
      ValueError: the processes of this job find different checkpoints; or see `restore`.
    """
    latest = checkpoints.latest()
    hosts.agree(checkpoint=f"step {latest}")
    if latest is None:
        return None, None
    state, extra = checkpoints.restore(None, abstract)
    return state, extra["batches"]


class TrainingLoop:
    """Iterates over the steps of a run that are left, and owns its state.

    ::

        with TrainingLoop(state, step, ...) as loop:
            for index in loop:
                loop.step(loop.draw(batches, place))
                loop.save_when_due(batches.get_state())

    Each step writes one line of metrics, numbered by the steps taken before it: the numbers of the
    step, those given to `log`, and where time went since the line before: `steps_per_second`,
    `tokens_per_second`, `save_seconds`, and a number of seconds for each name given to `spend`.

    Attributes:
      state: the state after the last step; before it, the state that the loop was given.
    """

    def __init__(
        self,
        state: TrainState,
        step: Step,
        *,
        steps: int,
        save_every: int,
        metrics: Metrics,
        checkpoints: Checkpoints,
        note: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares the steps from that of `state` on; nothing runs yet.

        Args:
          state: donated where `step` donates it.
          step: compiled; its metrics have `loss` and may have `tokens`.
          steps: steps of the whole run, those that `state` has taken included.
          save_every: steps from one checkpoint to the next.
          metrics: opened at the step of `state`.
          checkpoints: of the run.
          note: kept in every checkpoint beside the position, as JSON: the config of the run.
        """
        self.state = state
        self._step, self._steps, self._save_every = step, steps, save_every
        self._metrics, self._checkpoints, self._note = metrics, checkpoints, dict(note or {})
        self._first = self._index = int(state.step)
        self._programs: dict[tuple[tuple[int, ...], ...], Step] = {}
        self._line: _Line | None = None
        self._max_nonfinite, self._nonfinite = min(MAX_NONFINITE, steps), 0
        self._clock = Clock()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> TrainingLoop:
        """Listens to SIGTERM and SIGINT, and shows the progress bar."""
        with contextlib.ExitStack() as stack:
            self._caught = stack.enter_context(_signals())
            self._compiles = stack.enter_context(count_compiles())
            bar = progress(desc="train", total=self._steps, start=self._first, unit="step")
            self._bar = stack.enter_context(contextlib.closing(bar))
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the bar and restores the handlers of the signals."""
        self._opened.close()

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps that are left; the last checkpoint is on disk at the end."""
        for index in range(self._first, self._steps):
            self._index = index
            yield index
        self._checkpoints.wait()

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `<name>_seconds` of the next line."""
        with self._clock.spend(name):
            yield

    def draw(self, batches: Any, place: Callable[[Any], Any]) -> Any:
        """The next batch on the devices; its time is `data_seconds`.

        Args:
          batches: an iterator, from which one batch is taken.
          place: puts a batch on the devices.

        Raises:
          ValueError: the batches ended.
        """
        with self.spend("data"):
            try:
                return place(next(batches))
            except StopIteration:
                raise ValueError(
                    f"The batches ended after {self._index} of {self._steps} steps: want one for "
                    "each step. Let the data repeat, or ask for fewer steps."
                ) from None

    def step(self, batch: Any) -> None:
        """Starts the step on a batch, and writes the line of the step before it.

        Args:
          batch: on the devices; nothing else is moved there during the call.

        Raises:
          DivergedError: see `log`, about the step before.
        """
        program = self._program(batch)
        before = self._compiles.count
        with jax.transfer_guard("disallow"):
            self.state, values = program(self.state, batch)
        if self._index > self._first and self._compiles.count > before:
            _warn_of_recompilation(self._index, batch)
        if self._line is not None:
            self.log()
        self._line = _Line(self._index, values)

    def log(
        self,
        extra: Mapping[str, float] | None = None,
        *,
        shown: Callable[[Mapping[str, float]], Mapping[str, Any]] | None = None,
    ) -> dict[str, float]:
        """Waits for the numbers of the step that was started last, and writes its line.

        Args:
          extra: more numbers of this step.
          shown: which of all these numbers the progress bar shows; None for the loss.

        Returns:
          The numbers of the step, without `extra`.

        Raises:
          DivergedError: the loss is not finite, or the gradients of `MAX_NONFINITE` steps in a row
            were not; the line is written, and nothing is saved.
        """
        if self._line is None:
            raise RuntimeError("TrainingLoop.log was called twice for one step, or before `step`.")
        index, values = self._line
        self._line = None
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}
        self._clock.count(steps=1, tokens=numbers.get("tokens", 0.0))
        line = {**numbers, **(extra or {})}
        self._metrics.write(index, {**line, **self._clock.read()})
        self._bar.set_postfix(shown(line) if shown else {"loss": line["loss"]}, refresh=False)
        self._bar.update(1)
        self._refuse_diverged(index, numbers)
        return numbers

    def save_when_due(self, position: Mapping[str, Any]) -> None:
        """Saves a checkpoint every `save_every` steps, after the last step, and before a stop.

        SIGTERM or SIGINT (Ctrl-C) asks to stop; a second SIGINT stops at once.

        Args:
          position: in the data after this step, as JSON; `resume` returns it.

        Raises:
          DivergedError: see `log`; a checkpoint is never one of a run that has diverged.
          KeyboardInterrupt: a signal asked to stop; the checkpoint is on disk.
        """
        taken = self._index + 1
        stops = _stops(self._caught, self._index)
        if not (stops or taken % self._save_every == 0 or taken == self._steps):
            return
        if self._line is not None:
            self.log()
        with self.spend("save"):
            self._checkpoints.save(taken, self.state, {**self._note, "batches": dict(position)})
        if stops:
            self._checkpoints.wait()
            raise KeyboardInterrupt(
                f"Stopped after step {taken} of {self._steps}, which is saved in "
                f"{self._checkpoints.directory}. The same command goes on from there."
            )

    def _program(self, batch: Any) -> Step:
        """The step, which no process of a job runs before all of them have compiled it."""
        if not jax.distributed.is_initialized():
            return self._step
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            step: Any = self._step
            self._programs[shapes] = step.lower(self.state, batch).compile()
            # A collective on CPUs waits 30 seconds for the other side, and then the run is lost.
            hosts.gather("compiled")
        return self._programs[shapes]

    def _refuse_diverged(self, index: int, numbers: Mapping[str, float]) -> None:
        if not math.isfinite(numbers["loss"]):
            good = self._checkpoints.latest()
            since = "no checkpoint was saved; start again"
            if good is not None:
                since = (
                    f"the last good checkpoint is {self._checkpoints.directory}/{good}, so look at "
                    f"steps {good} to {index} and go on from there"
                )
            raise DivergedError(
                f"loss = {numbers['loss']} at step {index}: want a finite number; {since}, "
                "with a lower Optim.peak_lr, or without the batch that did it."
            )
        norm, is_skipped = numbers.get("grad_norm", 0.0), numbers.get("skipped", 0.0) > 0.999
        if not is_skipped:
            self._nonfinite = 0
        if not is_skipped or math.isfinite(norm):
            return  # a batch without anything to train is skipped too, and proves nothing
        self._nonfinite += 1
        if self._nonfinite < self._max_nonfinite:
            return
        raise DivergedError(
            f"The gradients of {self._nonfinite} steps in a row were not finite (grad_norm = "
            f"{norm} at step {index}), so none of these steps changed the parameters, and the run "
            "stopped. Look at the lines before them in metrics.jsonl. If grad_norm grew there, "
            "start again from an earlier checkpoint with a lower Optim.peak_lr; otherwise set "
            "Model.compute_dtype = 'float32' or look at the batches of these steps."
        )


class _Line(NamedTuple):
    """The numbers of a step, some of them not computed yet."""

    index: int  # steps taken before it
    values: Mapping[str, jax.Array]


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
