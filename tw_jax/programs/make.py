"""`tw make`: makes problems, their gold trajectories, and a tokenizer for them.

It writes training and held-out examples, which share no question, and a SentencePiece model that is
trained on the training texts. It prints the lengths of the texts, which help to choose the sizes of
rows and budgets.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from tw_jax import files, workdir
from tw_jax.bounds import require, require_text
from tw_jax.config import configurable
from tw_jax.data import records
from tw_jax.metrics import progress
from tw_jax.tasks.task import Problem, Task
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece, train_sentencepiece

_THRESHOLDS = (4_096, 8_192, 16_384, 24_576, 32_768)
_CORPUS = 5_000
"""Texts that the tokenizer is trained on; more texts would not change it."""


@configurable
class Make:
    """Problems and gold trajectories of a task.

    Attributes:
      workdir: Folder of the files.
      task: The problems and the layout of their trajectories.
      train: Number of training examples.
      held_out: Number of held-out examples; no training example has one of their questions.
      seed: Seed of the training problems.
      held_out_seed: Seed of the held-out problems.
      format: Format of the example files.
      vocab_size: Vocabulary size of the SentencePiece model.
    """

    workdir: str
    task: Task
    train: int = 10_000
    held_out: int = 1_000
    seed: int = 42
    held_out_seed: int = 100
    format: Literal["jsonl", "parquet", "array_record"] = "jsonl"
    vocab_size: int

    def check(self) -> None:
        """Refuses empty sets and equal seeds."""
        require_text(self, "workdir")
        require(self, "train", "held_out", "vocab_size", least=1)
        require(self, "seed", "held_out_seed", least=0)
        if self.seed == self.held_out_seed:
            raise ValueError(
                f"Make.seed = Make.held_out_seed = {self.seed}: the held-out problems would be the "
                "training problems. Set different seeds."
            )


def run(cfg: Make) -> None:
    """Writes `held_out`, `train`, `tokenizer.model` and `statistics.json` into the workdir."""
    folder = Path(cfg.workdir)
    held_out = cfg.task.problems(seed=cfg.held_out_seed, count=cfg.held_out)
    asked = {problem.question for problem in held_out}
    train = cfg.task.problems(seed=cfg.seed, count=cfg.train, exclude=asked)
    texts: list[str] = []
    for name, problems in (("held_out", held_out), ("train", train)):
        numbered = enumerate(progress(problems, desc=f"write {name}"))
        written = [_record(cfg.task, problem, f"{name}-{number}") for number, problem in numbered]
        records.write(folder / f"{name}.{cfg.format}", written)
        texts = [f"{one.question}\n{getattr(one, 'response', '')}" for one in written[:_CORPUS]]
    path = folder / "tokenizer.model"
    train_sentencepiece(texts, path, cfg.vocab_size)
    tokenizer = load_tokenizer(SentencePiece(path=str(path)))
    lengths = np.array([len(tokenizer.encode(text)) for text in texts])
    statistics = {
        "train": len(train),
        "held_out": len(held_out),
        "tokens_min": int(lengths.min()),
        "tokens_mean": float(lengths.mean()),
        "tokens_max": int(lengths.max()),
        **{f"share_under_{n}": float((lengths < n).mean()) for n in _THRESHOLDS},
    }
    files.write_text(folder / "statistics.json", json.dumps(statistics, indent=2) + "\n")
    workdir.record(cfg)
    print(f"{folder}: {len(train)} training and {len(held_out)} held-out examples")
    print(
        f"question and answer: {lengths.min()} to {lengths.max()} tokens, mean {lengths.mean():.1f}"
    )


def _record(task: Task, problem: Problem, name: str) -> records.Record:
    """An example of a problem, or the problem alone if its task has no gold text."""
    problem = dataclasses.replace(problem, id=name)
    response = task.gold(problem)
    return problem if response is None else records.Example(response=response, **vars(problem))
