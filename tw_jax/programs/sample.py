"""`tw sample`: fork-join rollouts of a trained model, kept by ids.

Finished rollouts are appended as they come, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from tw_jax.bounds import require, require_text
from tw_jax.checkpoint import newest, restore_params
from tw_jax.config import config, operative
from tw_jax.contracts import Params
from tw_jax.data import records
from tw_jax.data.stored import problem_of
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.threadweaver import ForkJoin, ThreadWeaver, make_table
from tw_jax.metrics import progress
from tw_jax.models.transformer import Model, network
from tw_jax.sample import sampler as samplers
from tw_jax.sample.draw import settings
from tw_jax.sample.sampler import ForkJoinSampler, Sampler
from tw_jax.tokenizer import (
    Bytes,
    Chat,
    HuggingFace,
    SentencePiece,
    Tokenizer,
    check_rows,
    load_tokenizer,
)


@config
class Sample:
    """Rollouts for a set of problems.

    Attributes:
      workdir: where `rollouts.jsonl` goes.
      checkpoint: folder of a training run's checkpoints; the newest is read.
      model: the model that was trained.
      tokenizer: the tokenizer that it was trained with.
      chat: how a question becomes a prompt.
      forkjoin: limits and policies of fork and join.
      sampler: rows, temperature, seeds.
      problems: a file of problems or examples.
      count: how many of them, from the start of the file; None for all.
      samples: rollouts per problem.
    """

    workdir: str
    checkpoint: str
    model: Model
    tokenizer: Bytes | SentencePiece | HuggingFace
    chat: Chat
    forkjoin: ForkJoin
    sampler: Sampler
    problems: str
    count: int | None = None
    samples: int = 1

    def check(self) -> None:
        """Refuses empty runs, and samples that would all be the same."""
        require_text(self, "workdir", "checkpoint", "problems")
        require(self, "samples", "count", least=1)
        if self.samples > 1 and self.sampler.temperature == 0:
            raise ValueError(
                f"Sample.samples = {self.samples} at Sampler.temperature = 0.0 would draw the same "
                "text each time. Set a temperature above 0, or Sample.samples = 1."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to sample."""

    params: Params
    sampler: ForkJoinSampler
    tokenizer: Tokenizer
    step: int


def load(cfg: Sample) -> Loaded:
    """Reads the tokenizer and the newest checkpoint, and builds the sampler.

    Raises:
      ValueError: the model has fewer rows than the tokenizer has ids.
    """
    tokenizer = load_tokenizer(cfg.tokenizer)
    check_rows(tokenizer, cfg.model.vocab_size)
    net = network(cfg.model)
    step = newest(cfg.checkpoint)
    abstract = jax.eval_shape(net.init, jax.random.key(0))
    params = restore_params(cfg.checkpoint, step=step, abstract=abstract)
    protocol = ThreadWeaver(make_table(tokenizer), cfg.forkjoin)
    return Loaded(params, samplers.make_sampler(net, protocol, cfg.sampler), tokenizer, step)


def problems(cfg: Sample) -> list[records.Problem]:
    """The problems to sample, from a file of problems, examples or rollouts."""
    found = records.open_records(cfg.problems)
    count = len(found) if cfg.count is None else min(cfg.count, len(found))
    return [problem_of(found[n]) for n in range(count)]


def rollouts(cfg: Sample, loaded: Loaded) -> Iterator[tuple[records.Rollout, Trajectory]]:
    """Rollouts that `rollouts.jsonl` does not hold yet, appended to it as they come.

    Raises:
      ValueError: the workdir holds rollouts of another model or of other settings.
    """
    path = Path(cfg.workdir) / "rollouts.jsonl"
    _require_same_maker(cfg, loaded)
    wanted = [(p, k) for p in problems(cfg) for k in range(cfg.samples)]
    with records.append(path) as add:
        have = {record.id for record in records.read(path)}
        names = [f"{problem.id}/{k}" for problem, k in wanted]
        missing = [n for n, name in enumerate(names) if name not in have]
        # Seeds belong to rollouts, not to the order in which a resumed run makes them.
        how = settings(
            max(len(wanted), 1),
            temperature=cfg.sampler.temperature,
            top_p=cfg.sampler.top_p,
            top_k=cfg.sampler.top_k,
            seed=cfg.sampler.seed,
        )
        batches = [
            missing[i : i + cfg.sampler.rows] for i in range(0, len(missing), cfg.sampler.rows)
        ]
        for batch in progress(batches, desc="sample"):
            index = np.array(batch)
            prompts = [cfg.chat.prompt(loaded.tokenizer, wanted[n][0].question) for n in batch]
            some = jax.tree.map(operator.itemgetter(index), how)
            for n, made in zip(batch, loaded.sampler(loaded.params, prompts, some), strict=True):
                rollout = records.Rollout.from_trajectory(
                    made,
                    wanted[n][0],
                    id=names[n],
                    fingerprint=loaded.tokenizer.fingerprint,
                    text=loaded.tokenizer.decode(made.ids[made.prompt_tokens :]),
                )
                add(rollout)
                yield rollout, made


def run(cfg: Sample) -> None:
    """Samples what is missing and says how the rollouts ended."""
    finishes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for _, made in rollouts(cfg, load(cfg)):
        finishes[made.finish] += 1
        counts.update(made.counts)
    print(f"{cfg.workdir}/rollouts.jsonl: {sum(finishes.values())} new rollouts")
    print("ended by: " + (_listed(finishes) or "nothing new"))
    if counts:
        print("events: " + _listed(counts))


def _require_same_maker(cfg: Sample, loaded: Loaded) -> None:
    """Rollouts of two models or settings in one file would be graded as one."""
    sampler = cfg.sampler
    maker = {
        "checkpoint": cfg.checkpoint,
        "step": loaded.step,
        "problems": cfg.problems,
        "tokenizer": loaded.tokenizer.fingerprint,
        "model": operative(cfg.model),
        "chat": operative(cfg.chat),
        "forkjoin": operative(cfg.forkjoin),
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "seed": sampler.seed,
    }
    path = Path(cfg.workdir) / "made_by.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(maker, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name, value in maker.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"{cfg.workdir} holds rollouts with another {', '.join(changed)}: want the same, or "
            "another Sample.workdir. Delete the folder to sample anew."
        )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
