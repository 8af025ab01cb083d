"""The training loop: it runs steps, writes metrics, saves checkpoints and can be resumed.

A program iterates over a `TrainingLoop`, which yields the indices of the remaining steps. The body
makes a batch and calls `step`, `log` if it needs the metrics of the step at once, and
`save_when_due`. A program that does not call `log` never waits for the device, because the metrics
of a step are then read while the next step runs. This file does not depend on a model, a loss or an
optimiser.
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
"""Number of consecutive steps without finite gradients after which a run stops.

In a shorter run it is the number of steps. One such step is skipped, and its batch may be the
cause. Many in a row mean that no later step will be better, as with `max_consecutive_errors` of
`optax.apply_if_finite`.
"""


class DivergedError(ValueError):
    """The loss, or the gradients of many consecutive steps, are not finite."""


def resume(checkpoints: Checkpoints, abstract: TrainState) -> tuple[TrainState | None, Any]:
    """Reads the newest checkpoint of a run that is not damaged; damaged ones are renamed.

    Args:
      checkpoints: Checkpoints of the run.
      abstract: `abstract_state` of the mesh to continue on, which may differ from the earlier one.

    Returns:
      The state, and the position in the data that was saved with it. A `TrainingLoop` takes the
      same steps from there as it would have taken without the interruption. (None, None) if nothing
      was saved.

    Raises:
      ValueError: If the processes of this job find different checkpoints, or as in
        `Checkpoints.restore`.
    """
    latest = checkpoints.latest()
    hosts.agree(checkpoint=f"step {latest}")
    if latest is None:
        return None, None
    state, extra = checkpoints.restore(None, abstract)
    return state, extra["batches"]


class TrainingLoop:
    """Iterates over the remaining steps of a run, and owns its state.

    ::

        with TrainingLoop(state, step, ...) as loop:
            for index in loop:
                loop.step(loop.draw(batches, place))
                loop.save_when_due(batches.get_state())

    Each step writes one line of metrics. Its index is the number of steps taken before. It has the
    metrics of the step, those passed to `log`, and the times since the previous line:
    `steps_per_second`, `tokens_per_second`, `save_seconds`, and seconds for each name passed to
    `spend`.

    Attributes:
      state: The state after the last step, or the initial state before the first one.
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
        """Prepares the steps, beginning with that of `state`; nothing runs yet.

        Args:
          state: The state to begin with. It is donated if `step` donates its argument.
          step: The compiled step. Its metrics have `loss` and may have `tokens`.
          steps: Steps of the whole run, including those that `state` has taken.
          save_every: Steps from one checkpoint to the next.
          metrics: Metrics, opened at the step of `state`.
          checkpoints: Checkpoints of the run.
          note: A JSON object that every checkpoint stores beside the position, such as the config.
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
        """Installs handlers of SIGTERM and SIGINT, and shows the progress bar."""
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
        """Yields the indices of the remaining steps, then waits for the last checkpoint."""
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
        """Puts the next batch on the devices; the time for this is added to `data_seconds`.

        Args:
          batches: An iterator, from which one batch is taken.
          place: Puts a batch on the devices.

        Raises:
          ValueError: If there is no further batch.
        """
        with self.spend("data"):
            try:
                return place(next(batches))
            except StopIteration:
                raise ValueError(
                    f"The batches ended after {self._index} of {self._steps} steps, and each step "
                    "needs one. Let the data repeat, or ask for fewer steps."
                ) from None

    def step(self, batch: Any) -> None:
        """Starts the step on a batch, and writes the line of the previous step.

        Args:
          batch: A batch on the devices. Nothing else may be transferred during the call.

        Raises:
          DivergedError: If the previous step diverged, as in `log`.
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
        """Waits for the metrics of the last step that was started, and writes its line.

        Args:
          extra: Further metrics of this step.
          shown: Returns what the progress bar shows of all these metrics; None shows the loss.

        Returns:
          The metrics of the step, without `extra`.

        Raises:
          DivergedError: If the loss is not finite, or the gradients of `MAX_NONFINITE` consecutive
            steps are not. The line is written before, and no checkpoint is saved.
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

        SIGTERM or SIGINT (Ctrl-C) requests a stop. A second SIGINT stops at once.

        Args:
          position: Position in the data after this step, as JSON; `resume` returns it.

        Raises:
          DivergedError: As in `log`. A run that has diverged is never saved.
          KeyboardInterrupt: If a signal requested a stop. The checkpoint is on disk then.
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
                f"{self._checkpoints.directory}. The same command continues from there."
            )

    def _program(self, batch: Any) -> Step:
        """The step. In a job of many processes, none runs it before all have compiled it."""
        if not jax.distributed.is_initialized():
            return self._step
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            step: Any = self._step
            self._programs[shapes] = step.lower(self.state, batch).compile()
            # A collective on CPUs waits at most 30 seconds for the other processes and then fails.
            hosts.gather("compiled")
        return self._programs[shapes]

    def _refuse_diverged(self, index: int, numbers: Mapping[str, float]) -> None:
        if not math.isfinite(numbers["loss"]):
            good = self._checkpoints.latest()
            advice = "No checkpoint was saved. Start again"
            if good is not None:
                advice = (
                    f"The last good checkpoint is {self._checkpoints.directory}/{good}. Look at "
                    f"steps {good} to {index} and continue from there"
                )
            raise DivergedError(
                f"loss = {numbers['loss']} at step {index} is not finite. {advice}, with a lower "
                "Optim.peak_lr or without the batch that caused it."
            )
        norm, is_skipped = numbers.get("grad_norm", 0.0), numbers.get("skipped", 0.0) > 0.999
        if not is_skipped:
            self._nonfinite = 0
        if not is_skipped or math.isfinite(norm):
            return  # a batch without trained tokens is skipped too, and is no sign of divergence
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
    """The metrics of a step, some of them not computed yet."""

    index: int  # number of steps taken before it
    values: Mapping[str, jax.Array]


def _warn_of_recompilation(index: int, batch: Any) -> None:
    shapes = ", ".join(sorted({str(list(leaf.shape)) for leaf in jax.tree.leaves(batch)}))
    warnings.warn(
        f"Step {index} was compiled again, for a batch of {shapes}. All steps should run one "
        "program. Give all batches one shape and dtype.",
        stacklevel=3,
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that they do not end the process in the middle of a step."""
    caught: list[int] = []
    # Only the main thread receives signals. In a job of many processes JAX itself handles SIGTERM.
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
        # All processes must save after the same step, and only one may have received the signal.
        return hosts.is_asked_to_stop(index)
    return bool(caught)
