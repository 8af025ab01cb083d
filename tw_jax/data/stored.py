"""What a stored record stands for: the problem that it asks, the trajectory that was drawn.

`data/records.py` knows files; this file knows what their rows mean to the programs that sample,
grade and train.
"""

from __future__ import annotations

from tw_jax.data.records import Example, Problem, Record, Rollout
from tw_jax.forkjoin.calls import Hit, Trajectory
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.forkjoin.threadweaver import ThreadWeaver


def problem_of(record: Record) -> Problem:
    """The problem of a record of any kind."""
    match record:
        case Problem():
            return record
        case Example():
            return record.problem
        case Rollout():
            return Problem(id=record.id, question=record.question, answer=record.answer, task="")


def trajectory_of(protocol: ThreadWeaver, rollout: Rollout) -> Trajectory:
    """The trajectory of a stored rollout, rebuilt from its ids.

    Raises:
      RecordError: the protocol could not have made these calls.
    """
    calls = [Result(call.sampled, call.logp, call.hit is Hit.ERROR) for call in rollout.calls]
    return rebuild(protocol, rollout.prompt, calls)
