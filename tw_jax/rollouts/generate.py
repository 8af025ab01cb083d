"""Samples rollouts for problems; P-GRPO, evaluation and `tw sample` all use it.

Every process of a job takes part in every call and gets all rollouts. A rollout has its own seed,
so it does not depend on the rollouts that are sampled beside it. Rollouts are graded and stored
elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from tw_jax import sharding
from tw_jax.contracts import Network, Params
from tw_jax.data.records import Problem, Rollout
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.protocol import SamplingParams
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.sample.draw import stack_params
from tw_jax.sample.sampler import ForkJoinSampler, Sampler, make_sampler
from tw_jax.sharding import Rules
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.interface import Tokenizer


class RolloutGroup(NamedTuple):
    """The K rollouts of one problem."""

    problem: Problem
    ids: Sequence[str]  # names of the rollouts
    trajectories: Sequence[Trajectory]
    texts: Sequence[str]  # decoded after the prompt

    def record(self, k: int, *, fingerprint: str, extra: dict[str, Any]) -> Rollout:
        """The record of rollout k for a file; `fingerprint` is that of the tokenizer."""
        return Rollout.from_trajectory(
            self.trajectories[k],
            self.problem,
            id=self.ids[k],
            fingerprint=fingerprint,
            text=self.texts[k],
            extra=extra,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Samples rollouts. It is built by `make_generator`, which documents the arguments."""

    sampler: ForkJoinSampler
    tokenizer: Tokenizer
    chat: Chat
    mesh: jax.sharding.Mesh
    rules: Rules

    def __call__(
        self,
        params: Params,
        problems: Sequence[Problem],
        ids: Sequence[Sequence[str]],
        *,
        seeds: Sequence[int],
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[RolloutGroup]:
        """Samples K rollouts of each of P problems, `Sampler.rows` at a time.

        Args:
          params: Parameters of the network, on the mesh.
          problems: P problems.
          ids: P lists of K names. K divides `Sampler.rows`.
          seeds: P * K seeds; those of one problem are adjacent.
          temperature: Sampling temperature; 0 takes the most likely token.
          top_p: As in `Sampler`.
          top_k: As in `Sampler`.

        Returns:
          P groups, in the order of the problems.

        Raises:
          ValueError: If a prompt is too long; see `ForkJoinSampler`.
        """
        if not problems:
            return []
        samples = len(ids[0])
        sampling = stack_params(
            [SamplingParams(temperature, top_p, top_k, int(seed)) for seed in seeds]
        )
        prompts = [self.chat.prompt(self.tokenizer, problem.question) for problem in problems]
        with sharding.use(self.mesh, sharding.sampling(self.rules)):
            made = self.sampler(params, prompts, sampling, repeats=samples)
        texts = [response_text(self.tokenizer, trajectory) for trajectory in made]
        return [
            RolloutGroup(problem, names, made[n : n + samples], texts[n : n + samples])
            for n, problem, names in zip(range(0, len(made), samples), problems, ids, strict=True)
        ]


def make_generator(
    network: Network,
    tokenizer: Tokenizer,
    *,
    chat: Chat,
    protocol: ThreadWeaver,
    sampler: Sampler,
    mesh: jax.sharding.Mesh,
    rules: Rules,
) -> Generator:
    """Builds the sampler's program for a mesh.

    Args:
      network: The model.
      tokenizer: The tokenizer of the model.
      chat: The chat template.
      protocol: Decisions and limits of fork and join.
      sampler: Rows and sizes. Seeds and temperature are arguments of each call.
      mesh: Devices.
      rules: Which logical axis is split over which axis of the mesh.
    """
    return Generator(make_sampler(network, protocol, sampler), tokenizer, chat, mesh, rules)


def response_text(tokenizer: Tokenizer, trajectory: Trajectory) -> str:
    """The text after the prompt."""
    return tokenizer.decode(trajectory.ids[trajectory.prompt_tokens :])


def check_sampler_rows(rows: int, samples: int, field: str) -> None:
    """Refuses a number of rows that groups do not fill.

    Args:
      rows: `Sampler.rows`.
      samples: Rollouts of a problem, which are decoded together.
      field: Name of the config field of `samples`, for the message.

    Raises:
      ValueError: If `samples` does not divide `rows`.
    """
    if rows % samples:
        raise ValueError(
            f"Sampler.rows = {rows} is not a multiple of {field} = {samples}, and the rollouts of "
            "a problem are decoded together. Change one of them."
        )


def check_trainable(sampler: Sampler) -> None:
    """Refuses a sampler whose rollouts cannot be trained on.

    Raises:
      ValueError: If it does not sample from the distribution of temperature alone.
    """
    if sampler.top_p != 1 or sampler.top_k != 0 or sampler.temperature <= 0:
        raise ValueError(
            f"Sampler.temperature = {sampler.temperature}, top_p = {sampler.top_p}, top_k = "
            f"{sampler.top_k}: the loss assumes the distribution of temperature alone. Set a "
            "temperature above 0, top_p 1.0 and top_k 0."
        )
