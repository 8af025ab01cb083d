"""The terms of a reward: their interface, the rollout that they see, and a penalty on length.

docs/extending.md shows how to add a term in an own module. This file knows no groups.
"""

from __future__ import annotations

import abc
import re
from typing import NamedTuple

from tw_jax.bounds import require
from tw_jax.config import configurable, interface
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.cost import Cost
from tw_jax.tasks.task import Problem, Verdict


class JudgedRollout(NamedTuple):
    """A graded rollout, as the terms of a reward see it.

    Attributes:
      problem: The problem that was asked.
      trajectory: The calls and the joined path, as ids.
      text: The response as text, without the prompt.
      verdict: The result of grading.
      cost: Tokens of the calls that were made: `longest`, `total`, `threads` and more.
    """

    problem: Problem
    trajectory: Trajectory
    text: str
    verdict: Verdict
    cost: Cost

    @property
    def is_correct(self) -> bool:
        """Whether the answer is correct; a timeout is not."""
        return self.verdict == "correct"

    @property
    def num_tokens(self) -> int:
        """Length of the joined path without the prompt, with the tokens that were forced."""
        return len(self.trajectory.ids) - self.trajectory.prompt_tokens


@interface
class RewardTerm(abc.ABC):
    """A summand of the reward. Inherit from it to add one; `Reward.terms` lists the terms of a run.

    Scores must be the same in every process. If a score is infinite or not a number, no rollout of
    the group is trained, and `groups_not_finite` counts the group.
    """

    @property
    def name(self) -> str:
        """The name of the metric after `reward_`: `token_penalty` for a class TokenPenalty."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @abc.abstractmethod
    def score(self, rollout: JudgedRollout) -> float:
        """Returns the number that is added to the reward of a rollout."""


@configurable
class SoftOverlong(RewardTerm):
    """A penalty that grows with length before the limit cuts a rollout off.

    penalty = -weight * clip((length - (limit - buffer)) / buffer, 0, 1), where length is that of
    the joined path without the prompt. Source: DAPO (arXiv:2503.14476), soft overlong punishment.

    Attributes:
      limit_tokens: Length from which on the whole penalty applies, usually `ForkJoin.max_new`.
      buffer_tokens: Lengths below the limit over which the penalty grows.
      weight: The whole penalty.
    """

    limit_tokens: int
    buffer_tokens: int
    weight: float = 1.0

    def check(self) -> None:
        """Refuses a buffer that is empty or longer than the limit, and a negative weight."""
        require(self, "limit_tokens", "buffer_tokens", least=1)
        require(self, "weight", least=0)
        if not 1 <= self.buffer_tokens <= self.limit_tokens:
            raise ValueError(
                f"SoftOverlong.buffer_tokens = {self.buffer_tokens} must be 1 to "
                f"SoftOverlong.limit_tokens = {self.limit_tokens}."
            )

    def score(self, rollout: JudgedRollout) -> float:
        """Returns 0 or less."""
        excess = (
            rollout.num_tokens - (self.limit_tokens - self.buffer_tokens)
        ) / self.buffer_tokens
        return -self.weight * min(max(excess, 0.0), 1.0)
