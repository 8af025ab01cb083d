"""`tw pgrpo`: reinforces a model by its own fork-join rollouts, on packed tries.

A step draws prompts, samples a group of rollouts for each with the current parameters, grades and
rewards them, packs each group into a trie from the very ids that were drawn, and updates.
Sampler and trainer read the same arrays. Run the same command again to go on where it stopped.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from tw_jax import hosts, sharding, workdir
from tw_jax.bounds import require, require_text
from tw_jax.checkpoint import Checkpoints
from tw_jax.config import configurable
from tw_jax.contracts import Network, Params
from tw_jax.data import records
from tw_jax.data.prompts import Problems
from tw_jax.data.stored import fingerprint, trajectory_of, unfinished
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.cost import tags_of
from tw_jax.forkjoin.threadweaver import ForkJoin, ThreadWeaver, make_table
from tw_jax.forkjoin.tries import group_tries
from tw_jax.metrics import Metrics
from tw_jax.models.load import LanguageModel, record_model
from tw_jax.models.transformer import Model, network
from tw_jax.sample.draw import sampling_params
from tw_jax.sample.sampler import ForkJoinSampler, Sampler, make_sampler, prompt_limits
from tw_jax.sharding import Mesh, Rules
from tw_jax.tasks.grader import Grader, GraderPool, check_truths
from tw_jax.tasks.reward import (
    CUT,
    Parts,
    Reward,
    are_finite,
    leave_out_long,
    refuse_short_rows,
    reward,
    summary,
    totals,
    trains,
)
from tw_jax.tasks.score import Evaluation, held_out
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.interface import Tokenizer, check_rows
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece
from tw_jax.train.groups import (
    Aggregation,
    PolicyBatch,
    Scored,
    advantages,
    has_signal,
    pack_groups,
)
from tw_jax.train.identity import establish, origin_params, standing
from tw_jax.train.loop import fit, resume
from tw_jax.train.pgrpo import PolicyLoss, make_logp, make_pgrpo_step, refuse_mismatch
from tw_jax.train.reference import reference_logp
from tw_jax.train.state import (
    Optim,
    TrainState,
    abstract_state,
    initial_state,
    jit_step,
    schedule,
)
from tw_jax.trie.pack import Packing, PackingStats

MANY_HOSTS = True


@configurable
class Pgrpo:
    """A reinforcement run.

    Attributes:
      workdir: checkpoints, metrics, config and `rollouts/` go here.
      steps: draws of the whole run, each followed by `inner_steps` updates.
      init: folder of checkpoints whose newest parameters the run begins with; adapters that it
        lacks are fresh.
      model: the model; its vocabulary holds the tokenizer's.
      tokenizer: text to ids.
      chat: how a question becomes a prompt.
      forkjoin: limits of fork and join.
      problems: a file of problems or examples; drawn in an order of the seed, again and again.
      prompts: groups with signal that a step trains on.
      rollouts: K, rollouts of a group.
      max_prompts: prompts that a step draws at most to find its groups, as many at a time as the
        sampler has rows for; groups whose rewards are all equal teach nothing.
      inner_steps: updates of a step, each with its share of the groups; 1 is on-policy.
      long_prompts: what happens to a problem whose prompt is longer than `Sampler.max_prompt` or
        fills `ForkJoin.max_context`: "refuse" stops at the start with its line, "drop" leaves it
        out and counts it. Held-out problems are always refused.
      sampler: rows, temperature and seed; `rollouts` divides its rows.
      grader: how answers are judged.
      reward: what a rollout earns.
      normalise: "mean" centres the rewards of a group, "std" also divides by their deviation.
      loss: clipping and importance weights.
      aggregation: how tokens are averaged.
      packing: tokens of a row.
      microbatch_rows: rows that are run at a time, over all devices; an update has as many
        microbatches as its groups fill.
      optim: optimiser and schedule.
      max_mismatch: nats of KL (k3) from the sampler to the trainer, over a step's tokens; a step
        that has more stops the run.
      evaluation: held-out problems; None evaluates nothing.
      mesh: devices.
      rules: which logical axis is split over which axis of the mesh.
      chunk_tokens: nodes per row that are unembedded at a time.
      save_every: steps between checkpoints.
      keep: checkpoints kept.
      seed: of the order of the problems.
    """

    workdir: str
    steps: int
    init: str
    model: Model
    tokenizer: Bytes | SentencePiece | HuggingFace
    chat: Chat
    forkjoin: ForkJoin
    problems: str
    prompts: int
    rollouts: int
    max_prompts: int
    sampler: Sampler
    grader: Grader
    reward: Reward
    loss: PolicyLoss
    aggregation: Aggregation
    packing: Packing
    microbatch_rows: int
    optim: Optim
    inner_steps: int = 1
    long_prompts: Literal["refuse", "drop"] = "refuse"
    normalise: Literal["mean", "std"] = "mean"
    max_mismatch: float = 0.01
    evaluation: Evaluation | None = None
    mesh: Mesh = Mesh()
    rules: Rules = Rules()
    chunk_tokens: int = 1024
    save_every: int = 10
    keep: int = 2
    seed: int = 0

    def check(self) -> None:
        """Refuses sizes that do not fit each other, and draws that cannot be trained on."""
        require_text(self, "workdir", "init", "problems")
        counts = ("steps", "prompts", "max_prompts", "microbatch_rows", "chunk_tokens")
        require(self, *counts, "save_every", "keep", least=1)
        require(self, "rollouts", least=2)  # an advantage is over the mean of a group
        require(self, "seed", least=0)
        require(self, "max_mismatch", above=0)  # rounding differs
        if self.max_prompts < self.prompts:
            raise ValueError(
                f"Pgrpo.max_prompts = {self.max_prompts}: want at least Pgrpo.prompts = "
                f"{self.prompts}."
            )
        if not 1 <= self.inner_steps <= self.prompts:
            raise ValueError(
                f"Pgrpo.inner_steps = {self.inner_steps}: want 1 to Pgrpo.prompts = "
                f"{self.prompts}, for each update needs a group."
            )
        if self.sampler.rows % self.rollouts:
            raise ValueError(
                f"Sampler.rows = {self.sampler.rows}: want a multiple of Pgrpo.rollouts = "
                f"{self.rollouts}, for a group is decoded side by side."
            )
        if self.sampler.top_p != 1 or self.sampler.top_k != 0 or self.sampler.temperature <= 0:
            raise ValueError(
                f"Sampler.temperature = {self.sampler.temperature}, top_p = {self.sampler.top_p}, "
                f"top_k = {self.sampler.top_k}: want a temperature above 0, top_p 1.0 and top_k 0, "
                "for the loss knows the distribution of temperature alone."
            )
        samples = 1 if self.evaluation is None else self.evaluation.samples
        if self.sampler.rows % samples:
            raise ValueError(
                f"Sampler.rows = {self.sampler.rows}: want a multiple of Evaluation.samples = "
                f"{samples}."
            )


def run(cfg: Pgrpo) -> None:
    """Trains to `steps`, or goes on from the newest checkpoint of the workdir."""
    mesh, folder = sharding.make_mesh(cfg.mesh), Path(cfg.workdir)
    _check_mesh(cfg, mesh)
    tokenizer = load_tokenizer(cfg.tokenizer)
    check_rows(tokenizer, cfg.model.vocab_size)
    net = network(cfg.model, num_ids=tokenizer.vocab_size)
    abstract = abstract_state(net, cfg.optim, mesh=mesh, rules=cfg.rules)
    step = make_pgrpo_step(
        net,
        cfg.optim,
        cfg.loss,
        steps=cfg.steps,
        chunk_tokens=cfg.chunk_tokens,
        temperature=cfg.sampler.temperature,
        microbatch_rows=cfg.microbatch_rows,
        inner_steps=cfg.inner_steps,
    )
    compiled = jit_step(step, abstract, mesh=mesh, rules=cfg.rules)
    with (
        warnings.catch_warnings(),
        GraderPool(cfg.grader) as pool,
        Checkpoints(folder / "checkpoints", keep=cfg.keep) as checkpoints,
        sharding.use(mesh, cfg.rules),
    ):
        # A step with more parts than any before is compiled for twice as many; no mistake here.
        warnings.filterwarnings("ignore", message="Step .* was compiled anew")
        rollouts = Rollouts(cfg, pool, mesh, net=net, tokenizer=tokenizer)
        who = establish(
            cfg,
            checkpoints,
            needs_init=cfg.loss.kl_coef > 0,
            schedule=schedule(cfg.optim, steps=cfg.steps),
            **rollouts.contents,
        )
        state = resume(checkpoints, abstract, rollouts)
        rollouts.begin(who.digest)
        assert who.origin is not None  # Pgrpo.init names a checkpoint
        began = partial(origin_params, cfg.init, who.origin, abstract.params)
        if state is None:
            state = initial_state(
                net,
                cfg.optim,
                mesh=mesh,
                rules=cfg.rules,
                key=jax.random.key(cfg.seed),
                params=began(),
            )
        first = int(state.step)
        if hosts.is_first():
            where = f"{mesh.size} device(s) of {jax.process_count()} process(es)"
            print(f"{folder}: step {first} of {cfg.steps}, {where}")
            print(standing(who, first=first, steps=cfg.steps), end="")
        if first < cfg.steps:
            workdir.record(cfg)
        whole = LanguageModel(
            model=cfg.model, tokenizer=cfg.tokenizer, chat=cfg.chat, forkjoin=cfg.forkjoin
        )
        kept = record_model(checkpoints.directory, whole, tokenizer, origin=cfg.init)
        rollouts.take(state)
        has_reference = cfg.loss.kl_coef > 0
        place = _placing(cfg, net, began(), rollouts) if has_reference else sharding.put_rows
        with Metrics(folder, step=first) as metrics:
            fit(
                state,
                compiled,
                rollouts,
                steps=cfg.steps,
                save_every=cfg.save_every,
                metrics=metrics,
                checkpoints=checkpoints,
                place=place,
                hooks=(rollouts.after_step,),
                guard=lambda index, numbers: refuse_mismatch(cfg.max_mismatch, index, numbers),
                note={**who.note, **kept},
            )


def _check_mesh(cfg: Pgrpo, mesh: jax.sharding.Mesh) -> None:
    samples = 1 if cfg.evaluation is None else cfg.evaluation.samples
    sampling = sharding.sampling(cfg.rules)
    for name, rows, rules in (
        ("Pgrpo.microbatch_rows", cfg.microbatch_rows, cfg.rules),
        ("Sampler.rows / Pgrpo.rollouts", cfg.sampler.rows // cfg.rollouts, sampling),
        ("Sampler.rows / Evaluation.samples", cfg.sampler.rows // samples, sampling),
    ):
        sharding.check_split(name, rows, mesh, rules)


def _placing(cfg: Pgrpo, net: Network, began: Params, rollouts: Rollouts) -> Any:
    """Puts a batch on the devices, with the log-probs of the model that the run began with."""
    logp = make_logp(
        net,
        chunk_tokens=cfg.chunk_tokens,
        temperature=cfg.sampler.temperature,
        microbatch_rows=cfg.microbatch_rows * cfg.inner_steps,
    )
    reference = reference_logp(logp, began, rollouts.params)

    def place(batch: PolicyBatch) -> PolicyBatch:
        placed = sharding.put_rows(batch)
        return placed.replace(ref_logp=reference(rollouts.params, placed.trie))

    return place


class Drawn(NamedTuple):
    """A group of rollouts of one problem."""

    problem: records.Problem
    names: list[str]
    trajectories: list[Trajectory]


class Rollouts:
    """Batches of rewarded groups, drawn with the parameters that were handed over last.

    What was sampled is kept in `rollouts/` as it comes, so a step that a crash interrupted goes on
    with the rollouts that it had.
    """

    def __init__(
        self,
        cfg: Pgrpo,
        pool: GraderPool,
        mesh: jax.sharding.Mesh,
        *,
        net: Network,
        tokenizer: Tokenizer,
    ) -> None:
        """Reads the problems; samples nothing yet.

        Raises:
          ValueError: there is no problem, two have one id, the answer of one is not known, or a
            prompt is too long.
        """
        self._cfg, self._pool, self._mesh = cfg, pool, mesh
        self._tokenizer = tokenizer
        read = partial(
            Problems,
            prompt=partial(cfg.chat.prompt, tokenizer),
            limits=prompt_limits(cfg.sampler, cfg.forkjoin),
        )
        self._problems = read(
            cfg.problems,
            unanswered="refuse",
            too_long=cfg.long_prompts,
            option="Pgrpo.long_prompts",
        )
        if self._problems.dropped and hosts.is_first():
            print(f"{cfg.problems}: {self._problems.dropped} problems with long prompts left out")
        aside = cfg.evaluation
        self._held_out = aside and read(aside.problems, count=aside.count, unanswered="drop")
        # Each process of a job does all that is drawn.
        for asked in (self._problems, self._held_out or ()):
            check_truths(cfg.grader, ((problem.id, problem.answer) for problem in asked))
        self.contents = {
            "problems": fingerprint(cfg.problems),
            "tokenizer": self._tokenizer.fingerprint,
        }
        if cfg.evaluation is not None:
            self.contents["held-out problems"] = fingerprint(cfg.evaluation.problems)
        hosts.agree(**self.contents)
        self._sampler: ForkJoinSampler = make_sampler(
            net, ThreadWeaver(make_table(tokenizer), cfg.forkjoin), cfg.sampler
        )
        self._tags = tags_of(self._tokenizer)
        for asked in (self._problems, self._held_out):
            if asked is not None:
                asked.require_unchanged()
        self._params: Params | None = None
        self._run = ""
        self._step = self._prompts = 0
        self._numbers: dict[str, float] = {}
        self._clock = time.monotonic()

    def get_state(self) -> dict[str, Any]:
        """The position: steps and prompts drawn so far."""
        return {"step": self._step, "prompts": self._prompts}

    def set_state(self, state: Mapping[str, Any], /) -> None:
        """Goes to a position."""
        self._step, self._prompts = state["step"], state["prompts"]

    def begin(self, run: str) -> None:
        """Deletes what an earlier attempt left of later steps, which are drawn again.

        Args:
          run: tells this run's unfinished rollouts from those of another, as `Identity.digest`.
        """
        self._run = run
        if not hosts.is_first():
            return
        kept = {f".{self._step:06}.jsonl", *(f"{n:06}.jsonl" for n in range(self._step))}
        for file in (Path(self._cfg.workdir) / "rollouts").glob("*.jsonl"):
            if file.stem.removeprefix(".").isdecimal() and file.name not in kept:
                file.unlink()

    def take(self, state: TrainState) -> None:
        """Takes the parameters to sample with; they are read until the next step donates them."""
        self._params = state.params

    @property
    def params(self) -> Params:
        """The parameters that were taken last."""
        if self._params is None:
            raise RuntimeError("Parameters were asked for before `take` handed them over.")
        return self._params

    def after_step(self, index: int, state: TrainState) -> dict[str, float]:
        """A hook of `fit`: takes the new parameters, hands over what the rollouts were like."""
        self.take(state)
        numbers, now = self._numbers, time.monotonic()
        numbers["seconds"], self._clock = now - self._clock, now
        evaluation = self._cfg.evaluation
        if evaluation is not None and (index % evaluation.every == 0 or index == self._cfg.steps):
            numbers |= self.evaluate(evaluation)
        return numbers

    def __next__(self) -> PolicyBatch:
        """Samples until enough groups have signal; packs them."""
        cfg, began = self._cfg, time.monotonic()
        folder = Path(cfg.workdir) / "rollouts"
        begun = folder / f".{self._step:06}.jsonl"
        drawn, parts, verdicts = self._draw(begun)
        values = totals(parts, cfg.reward)
        finite = are_finite(values)
        found = np.flatnonzero(finite & has_signal(values) & trains(parts))
        kept = found[: cfg.prompts]
        advantage = np.zeros(values.shape, np.float32)
        advantage[finite] = advantages(values[finite], cfg.normalise)
        stats = PackingStats()
        batch = pack_groups(
            [
                [one for n in share for one in self._scored(drawn[n], advantage[n], parts[n])]
                for share in np.array_split(kept, cfg.inner_steps)
            ],
            cfg.aggregation,
            packing=cfg.packing,
            microbatch_rows=cfg.microbatch_rows,
            stats=stats,
        )
        told = {
            (n, k): {
                **parts[n][k].told(values[n, k]),
                "advantage": float(advantage[n, k]),
                "group": n,
                "is_trained": n in kept and bool(parts[n][k].is_trained),
            }
            for n in range(len(drawn))
            for k in range(cfg.rollouts)
        }
        if hosts.is_first():
            records.write(
                folder / f"{self._step:06}.jsonl",
                [self._record(drawn[n], k, extra) for (n, k), extra in told.items()],
            )
            begun.unlink()
        self._numbers = {
            **summary(parts, values),
            "cut": float(
                np.mean([made.finish in CUT for one in drawn for made in one.trajectories])
            ),
            "groups": len(kept),
            "groups_drawn": len(drawn),
            "groups_with_signal": len(found),
            "groups_not_finite": float((~finite).sum()),
            "untrained": sum(not one.is_trained for group in parts for one in group),
            "problems_dropped": self._problems.dropped,
            "timeouts": verdicts["timeout"],
            "rows_filled": stats.rows_filled,
            "token_sharing": stats.token_sharing,
            "rollout_seconds": time.monotonic() - began,
        }
        self._step += 1
        return batch

    def _draw(self, file: Path) -> tuple[list[Drawn], list[list[Parts]], Counter[str]]:
        """Draws prompts until enough groups have signal; keeps the rollouts as they come."""
        cfg = self._cfg
        drawn: list[Drawn] = []
        parts: list[list[Parts]] = []
        verdicts: Counter[str] = Counter()
        good = 0
        with unfinished(file) as (left, add):
            # An attempt before the first checkpoint may have had other settings.
            have = {name: one for name, one in left.items() if self._is_own(one)}
            while good < cfg.prompts and len(drawn) < cfg.max_prompts:
                # Rows that stand empty take as long as others, so all are filled.
                count = min(cfg.max_prompts - len(drawn), cfg.sampler.rows // cfg.rollouts)
                some = self._sample(count, have, add)
                judged = [
                    leave_out_long(parts, group.trajectories, cfg.packing.row_tokens)
                    for group, parts in zip(some, self._judge(some, verdicts), strict=True)
                ]
                values = totals(judged, cfg.reward)
                good += int((are_finite(values) & has_signal(values) & trains(judged)).sum())
                drawn += some
                parts += judged
        if not any(one.is_trained for group in parts for one in group):
            made = [trajectory for group in drawn for trajectory in group.trajectories]
            refuse_short_rows(self._step, made, cfg.packing.row_tokens)
        return drawn, parts, verdicts

    def _sample(self, count: int, have: Mapping[str, Any], add: Any) -> list[Drawn]:
        """Groups of the next problems; those that a crash left finished are not sampled again."""
        cfg, first = self._cfg, self._prompts
        self._prompts += count
        problems = self._problems.drawn(first, count, seed=cfg.seed)
        names = [
            [f"{self._step}/{first + n}/{problem.id}/{k}" for k in range(cfg.rollouts)]
            for n, problem in enumerate(problems)
        ]
        flat = [name for group in names for name in group]
        if all(name in have for name in flat):
            made = [trajectory_of(self._sampler.protocol, have[name]) for name in flat]
        else:
            made = self._rollouts(
                problems, cfg.rollouts, cfg.sampler.temperature, first * cfg.rollouts
            )
        groups = [
            Drawn(problem, group, made[n * cfg.rollouts : (n + 1) * cfg.rollouts])
            for n, (problem, group) in enumerate(zip(problems, names, strict=True))
        ]
        for group in groups:
            for k, name in enumerate(group.names):
                if name not in have:
                    add(self._record(group, k, {"run": self._run}))
        return groups

    def _is_own(self, record: records.Record) -> bool:
        return isinstance(record, records.Rollout) and record.extra.get("run") == self._run

    def _rollouts(
        self, problems: Sequence[records.Problem], samples: int, temperature: float, seed: int
    ) -> list[Trajectory]:
        prompts = [self._cfg.chat.prompt(self._tokenizer, p.question) for p in problems]
        sampling = sampling_params(
            len(prompts) * samples,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            seed=self._cfg.sampler.seed + seed,
        )
        with sharding.use(self._mesh, sharding.sampling(self._cfg.rules)):
            return self._sampler(self.params, prompts, sampling, repeats=samples)

    def _judge(self, groups: Sequence[Drawn], verdicts: Counter[str]) -> list[list[Parts]]:
        """Grades and rewards; what was not judged in time is not correct, and counted."""
        items = [(self._text(t), g.problem.answer) for g in groups for t in g.trajectories]
        # A host's deadline is its own, so each item is judged by one of them.
        found = iter(hosts.divide(self._pool.grade_all, items))
        judged = []
        for group in groups:
            said = [next(found) for _ in group.trajectories]
            verdicts.update(map(str, said))
            judged.append(
                [
                    reward(made, verdict == "correct", self._cfg.reward, tags=self._tags)
                    for made, verdict in zip(group.trajectories, said, strict=True)
                ]
            )
        return judged

    def _scored(self, group: Drawn, advantage: np.ndarray, parts: Sequence[Parts]) -> list[Scored]:
        tries = group_tries(group.trajectories, max_tokens=self._cfg.packing.row_tokens)
        is_trained = np.array([one.is_trained for one in parts])
        return [Scored(trie, advantage, is_trained) for trie in tries]

    def _text(self, trajectory: Trajectory) -> str:
        return self._tokenizer.decode(trajectory.ids[trajectory.prompt_tokens :])

    def _record(self, group: Drawn, k: int, extra: dict[str, Any]) -> records.Rollout:
        made = group.trajectories[k]
        return records.Rollout.from_trajectory(
            made,
            group.problem,
            id=group.names[k],
            fingerprint=self._tokenizer.fingerprint,
            text=self._text(made),
            extra=extra,
        )

    def evaluate(self, cfg: Evaluation) -> dict[str, float]:
        """Accuracy with its 95 % interval, pass@k and token latency on held-out problems."""
        problems = list(self._held_out or ())
        made: list[Trajectory] = []
        each = self._cfg.sampler.rows // cfg.samples
        for first in range(0, len(problems), each):
            made += self._rollouts(
                problems[first : first + each], cfg.samples, cfg.temperature, first * cfg.samples
            )
        groups = [
            Drawn(problem, [], made[n * cfg.samples : (n + 1) * cfg.samples])
            for n, problem in enumerate(problems)
        ]
        parts = self._judge(groups, Counter())
        correct = np.array([[one.is_correct for one in group] for group in parts])
        numbers = summary(parts, totals(parts, self._cfg.reward))
        return {
            "eval_without_answer": self._held_out.without_answer if self._held_out else 0,
            **held_out(correct),
            **{
                f"eval_{n}": numbers[n] for n in ("longest_tokens", "total_tokens", "latency_ratio")
            },
        }
