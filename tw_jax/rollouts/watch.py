"""Messages of a P-GRPO run on the console: the progress bar, and steps without signal.

A group whose rewards are all equal has no advantages. A step in which all groups are so changes no
parameter, and its loss is 0. `SignalWatch` reports when several such steps follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tw_jax.bounds import counted

PATIENCE = 5
"""Number of consecutive steps without signal that are reported."""


def shown(numbers: Mapping[str, float]) -> dict[str, Any]:
    """The metrics of a step that the progress bar shows."""
    return {
        "reward": f"{numbers['reward']:.3g}",
        "correct": f"{numbers['correct']:.3g}",
        "signal": f"{numbers['groups_with_signal']:.0f}/{numbers['groups_drawn']:.0f}",
        "skipped": f"{numbers['skipped']:.3g}",
    }


class SignalWatch:
    """Counts consecutive steps in which no group had signal."""

    def __init__(self) -> None:
        """Starts the count at 0."""
        self._steps: list[int] = []

    def sentence(self, index: int, numbers: Mapping[str, float]) -> str | None:
        """A message after `PATIENCE` consecutive steps without signal; otherwise None.

        Args:
          index: Number of the step.
          numbers: Metrics of the step.
        """
        if numbers["groups_with_signal"]:
            self._steps = []
            return None
        self._steps.append(index)
        if len(self._steps) != PATIENCE:
            return None
        share = numbers["correct"]
        problems = "harder problems" if share > 0.5 else "easier problems or a better Pgrpo.init"
        return (
            f"Steps {self._steps[0]} to {index} had no group whose rewards differ, so they did not "
            f"change the model; {share:.0%} of the rollouts of step {index} were correct. Use "
            f"{problems}, raise Sampler.temperature, Pgrpo.rollouts or Pgrpo.max_prompts, or "
            "choose a Reward that distinguishes the rollouts of a group."
        )


def steps_without_signal(lines: list[dict[str, Any]]) -> str | None:
    """A message about the steps of a run that had no signal; None if there are none.

    Args:
      lines: The metrics of the run.
    """
    count = sum(line["groups_with_signal"] == 0 for line in lines)
    if not count:
        return None
    return (
        f"Without a group whose rewards differ, {count} of {counted(len(lines), 'step')} did not "
        "change the model."
    )
