"""Small random rollouts in ThreadWeaver's shape, made by the protocol; several share a prompt."""

from __future__ import annotations

import dataclasses

import fakes
import numpy as np

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table

TOKENIZER = fakes.Characters()
PROTOCOL = ThreadWeaver(make_table(TOKENIZER), ForkJoin(max_context=600, max_new=500))
PROMPT_TOKENS = 7


def rollouts(seed: int, count: int, *, longest: int = 9, blocks: int = 2) -> list[Trajectory]:
    """Rollouts of one random prompt, with random log-probs.

    Args:
      seed: Seed of all random choices.
      count: K, number of rollouts.
      longest: Largest number of tokens of one stretch of text, at least 1.
      blocks: Largest number of forks of a rollout; some rollouts have none.
    """
    rng = np.random.default_rng(seed)
    words = np.arange(TOKENIZER.id_of("a"), TOKENIZER.vocab_size)

    def drawn(end: str) -> Result:
        text = rng.choice(words, rng.integers(1, longest, endpoint=True))
        ids = np.concatenate([text, TOKENIZER.encode(end)]).astype(np.int32)
        return Result(ids, -rng.exponential(size=len(ids)).astype(np.float32))

    def one(prompt: np.ndarray) -> Trajectory:
        results = []
        for _ in range(rng.integers(0, blocks, endpoint=True)):
            threads = int(rng.integers(2, 4))
            listed = "".join(f"<Outline>{n}: a</Outline>" for n in range(1, threads + 1))
            results.append(drawn(f"<Parallel><Outlines>{listed}</Outlines>"))
            results += [
                drawn(str(rng.choice(["</Thread>", "<eos>"], p=[0.8, 0.2]))) for _ in range(threads)
            ]
        return rebuild(PROTOCOL, prompt, [*results, drawn("<eos>")])

    prompt = rng.choice(words, PROMPT_TOKENS).astype(np.int32)
    return [one(prompt) for _ in range(count)]


def with_logp(trajectory: Trajectory, logp: list[np.ndarray]) -> Trajectory:
    """The same rollout with these recorded log-probs, an array for each call."""
    calls = zip(trajectory.calls, logp, strict=True)
    return dataclasses.replace(
        trajectory,
        calls=tuple(dataclasses.replace(c, logp=np.asarray(x, np.float32)) for c, x in calls),
    )
