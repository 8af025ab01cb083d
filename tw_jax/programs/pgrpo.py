"""`tw pgrpo`: reinforces a model by its own fork-join rollouts, on packed tries.

A step draws prompts, samples a group of rollouts for each with the current parameters, grades and
rewards them, packs each group into a trie from the very ids that were drawn, and updates.
Sampler and trainer read the same arrays. Run the same command again to go on where it stopped.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax import hosts, sharding
from tw_jax.checkpoint import Checkpoints, restore_params
from tw_jax.config import config, operative
from tw_jax.contracts import Network, Params
from tw_jax.data import records
from tw_jax.data.stored import fingerprint, problem_of, trajectory_of, unfinished
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.cost import tags_of
from tw_jax.forkjoin.threadweaver import ForkJoin, ThreadWeaver, make_table
from tw_jax.forkjoin.tries import of_group, of_trajectory
from tw_jax.metrics import Metrics
from tw_jax.models.lora import adapters, overlay, trained, without_adapters
from tw_jax.models.transformer import Model, network
from tw_jax.sample.draw import settings
from tw_jax.sample.sampler import ForkJoinSampler, Sampler, make_sampler
from tw_jax.sharding import Mesh, Rules
from tw_jax.tasks import score
from tw_jax.tasks.grader import Grader, GraderPool, check_truths
from tw_jax.tasks.reward import CUT, Parts, Reward, are_finite, reward, summary, totals, trains
from tw_jax.tokenizer import (
    Bytes,
    Chat,
    HuggingFace,
    SentencePiece,
    Tokenizer,
    check_rows,
    load_tokenizer,
)
from tw_jax.train.groups import (
    Aggregation,
    PolicyBatch,
    Scored,
    advantages,
    has_signal,
    pack_groups,
)
from tw_jax.train.loop import fit, resume
from tw_jax.train.pgrpo import PolicyLoss, make_logp, make_step, refuse_mismatch
from tw_jax.train.state import Optim, TrainState, abstract_state, initial_state, jit_step
from tw_jax.trie.pack import Fill, Packing

MANY_HOSTS = True


@config
class Evaluation:
    """Held-out problems that are sampled while training.

    Attributes:
      problems: a file of problems or examples.
      count: how many of them, from the start of the file.
      samples: rollouts of each; with more than one, pass@k is reported for powers of two.
      every: steps between evaluations; the last step is followed by one too.
      temperature: of these rollouts.
    """

    problems: str
    count: int = 200
    samples: int = 1
    every: int = 10
    temperature: float = 0.0

    def check(self) -> None:
        """Refuses evaluations of nothing."""
        for name in ("count", "samples", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Evaluation.{name} = {getattr(self, name)}: want at least 1.")
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError(
                f"Evaluation.samples = {self.samples} at Evaluation.temperature = "
                f"{self.temperature}: want a temperature above 0, or all samples are the same."
            )


@config
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
      most_prompts: prompts that a step draws at most to find its groups, as many at a time as the
        sampler has rows for; groups whose rewards are all equal teach nothing.
      inner_steps: updates of a step, each with its share of the groups; 1 is on-policy.
      sampler: rows, temperature and seed; `rollouts` divides its rows.
      grader: how answers are judged.
      reward: what a rollout earns.
      normalise: "mean" centres the rewards of a group, "std" also divides by their deviation.
      loss: clipping and importance weights.
      aggregation: how tokens are averaged.
      packing: rows run at a time, and their length.
      optim: optimiser and schedule.
      most_mismatch: nats of KL (k3) from the sampler to the trainer, over a step's tokens; a step
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
    most_prompts: int
    sampler: Sampler
    grader: Grader
    reward: Reward
    loss: PolicyLoss
    aggregation: Aggregation
    packing: Packing
    optim: Optim
    inner_steps: int = 1
    normalise: Literal["mean", "std"] = "mean"
    most_mismatch: float = 0.01
    evaluation: Evaluation | None = None
    mesh: Mesh = Mesh()
    rules: Rules = Rules()
    chunk_tokens: int = 1024
    save_every: int = 10
    keep: int = 2
    seed: int = 0

    def check(self) -> None:
        """Refuses sizes that do not fit each other, and draws that cannot be trained on."""
        for name in ("steps", "prompts", "chunk_tokens", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"Pgrpo.{name} = {getattr(self, name)}: want at least 1.")
        if self.rollouts < 2:
            raise ValueError(
                f"Pgrpo.rollouts = {self.rollouts}: want at least 2, for an advantage is over the "
                "mean of a group."
            )
        if self.most_prompts < self.prompts:
            raise ValueError(
                f"Pgrpo.most_prompts = {self.most_prompts}: want at least Pgrpo.prompts = "
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
        if not self.most_mismatch > 0:
            raise ValueError(
                f"Pgrpo.most_mismatch = {self.most_mismatch}: want above 0, for rounding differs."
            )


def run(cfg: Pgrpo) -> None:
    """Trains to `steps`, or goes on from the newest checkpoint of the workdir."""
    mesh, folder = sharding.make_mesh(cfg.mesh), Path(cfg.workdir)
    _check_mesh(cfg, mesh)
    net = network(cfg.model)
    abstract = abstract_state(net, cfg.optim, mesh=mesh, rules=cfg.rules)
    step = make_step(
        net,
        cfg.optim,
        cfg.loss,
        steps=cfg.steps,
        chunk_tokens=cfg.chunk_tokens,
        temperature=cfg.sampler.temperature,
        part_rows=cfg.packing.rows,
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
        rollouts = Rollouts(cfg, pool, mesh)
        state = resume(checkpoints, abstract, rollouts)
        rollouts.forget_later()
        if state is None:
            state = initial_state(
                net,
                cfg.optim,
                mesh=mesh,
                rules=cfg.rules,
                key=jax.random.key(cfg.seed),
                params=_restored(cfg, abstract.params),
            )
        place = _placing(cfg, net, abstract.params, rollouts)
        first = int(state.step)
        if hosts.is_first():
            where = f"{mesh.size} device(s) of {jax.process_count()} process(es)"
            print(f"{folder}: step {first} of {cfg.steps}, {where}")
        rollouts.take(state)
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
                guard=lambda index, numbers: refuse_mismatch(cfg.most_mismatch, index, numbers),
                note={"config": operative(cfg)},
            )


def _check_mesh(cfg: Pgrpo, mesh: jax.sharding.Mesh) -> None:
    samples = 1 if cfg.evaluation is None else cfg.evaluation.samples
    sampling = sharding.sampling(cfg.rules)
    for name, rows, rules in (
        ("Packing.rows", cfg.packing.rows, cfg.rules),
        ("Sampler.rows / Pgrpo.rollouts", cfg.sampler.rows // cfg.rollouts, sampling),
        ("Sampler.rows / Evaluation.samples", cfg.sampler.rows // samples, sampling),
    ):
        split = math.prod(mesh.shape[axis] for axis in rules.rows)
        if rows % split:
            raise ValueError(
                f"{name} = {rows}: want a multiple of {split}, the devices that rows are split "
                "over. Change the rows, or Mesh."
            )


def _restored(cfg: Pgrpo, abstract: Params) -> Params:
    """The parameters that the run begins with, without adapters where the checkpoint has none."""
    return restore_params(cfg.init, abstract=abstract, core=without_adapters(abstract))


def _placing(cfg: Pgrpo, net: Network, abstract: Params, rollouts: Rollouts) -> Any:
    """What puts a batch on the devices, with the reference's log-probs where the loss reads them.

    The reference of the KL term is the model that the run began with. What training moves is kept
    of it, and the rest is read where it is.
    """
    if not cfg.loss.kl_coef:
        return sharding.put_rows
    # Fresh adapters add nothing, and neither do those of zeros.
    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), adapters(abstract)
    )
    reference = trained(overlay(nothing, _restored(cfg, abstract)))
    logp = jax.jit(
        make_logp(
            net,
            chunk_tokens=cfg.chunk_tokens,
            temperature=cfg.sampler.temperature,
            part_rows=cfg.packing.rows * cfg.inner_steps,
        )
    )

    def place(batch: PolicyBatch) -> PolicyBatch:
        placed = sharding.put_rows(batch)
        return placed.replace(ref_logp=logp(overlay(rollouts.params, reference), placed.trie))

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

    def __init__(self, cfg: Pgrpo, pool: GraderPool, mesh: jax.sharding.Mesh) -> None:
        """Reads tokenizer and problems; samples nothing yet.

        Raises:
          ValueError: the model has fewer rows than the tokenizer has ids, or there is no problem.
        """
        self._cfg, self._pool, self._mesh = cfg, pool, mesh
        self._tokenizer: Tokenizer = load_tokenizer(cfg.tokenizer)
        check_rows(self._tokenizer, cfg.model.vocab_size)
        self._problems = records.open_records(cfg.problems)
        if not len(self._problems):
            raise ValueError(f"{cfg.problems} has no problem: want at least one.")
        # Each process of a job does all that is drawn.
        files = [cfg.problems, *([] if cfg.evaluation is None else [cfg.evaluation.problems])]
        check_truths(cfg.grader, ((r.id, r.answer) for file in files for r in records.read(file)))
        told = ", ".join(map(fingerprint, files))
        hosts.agree(problems=told, tokenizer=self._tokenizer.fingerprint)
        self._sampler: ForkJoinSampler = make_sampler(
            network(cfg.model), ThreadWeaver(make_table(self._tokenizer), cfg.forkjoin), cfg.sampler
        )
        self._tags = tags_of(self._tokenizer)
        self._params: Params | None = None
        self._step = self._prompts = 0
        self._pass, self._order = -1, np.zeros(0, int)
        self._numbers: dict[str, float] = {}
        self._clock = time.monotonic()

    def get_state(self) -> dict[str, Any]:
        """The position: steps and prompts drawn so far."""
        return {"step": self._step, "prompts": self._prompts}

    def set_state(self, state: Mapping[str, Any], /) -> None:
        """Goes to a position."""
        self._step, self._prompts = state["step"], state["prompts"]

    def forget_later(self) -> None:
        """Deletes what a crash left of later steps, whose parameters are made anew."""
        if not hosts.is_first():
            return
        folder = Path(self._cfg.workdir) / "rollouts"
        for file in folder.glob(".[0-9]*.jsonl"):
            if file.name != f".{self._step:06}.jsonl":
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
        fill = Fill()
        batch = pack_groups(
            [
                [one for n in share for one in self._scored(drawn[n], advantage[n], parts[n])]
                for share in np.array_split(kept, cfg.inner_steps)
            ],
            cfg.aggregation,
            packing=cfg.packing,
            fill=fill,
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
            "timeouts": verdicts["timeout"],
            "rows_filled": fill.rows_filled,
            "token_sharing": fill.token_sharing,
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
        with unfinished(file) as (have, add):
            while good < cfg.prompts and len(drawn) < cfg.most_prompts:
                # Rows that stand empty take as long as others, so all are filled.
                count = min(cfg.most_prompts - len(drawn), cfg.sampler.rows // cfg.rollouts)
                some = self._sample(count, have, add)
                judged = self._judge(some, verdicts)
                self._leave_out_long(some, judged)
                values = totals(judged, cfg.reward)
                good += int((are_finite(values) & has_signal(values) & trains(judged)).sum())
                drawn += some
                parts += judged
        if not any(one.is_trained for group in parts for one in group):
            self._refuse_short_rows(drawn)
        return drawn, parts, verdicts

    def _sample(self, count: int, have: Mapping[str, Any], add: Any) -> list[Drawn]:
        """Groups of the next problems; those that a crash left finished are not sampled again."""
        cfg, first = self._cfg, self._prompts
        self._prompts += count
        problems = [self._problem(first + n) for n in range(count)]
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
                    add(self._record(group, k, {}))
        return groups

    def _rollouts(
        self, problems: Sequence[records.Problem], samples: int, temperature: float, seed: int
    ) -> list[Trajectory]:
        prompts = [self._cfg.chat.prompt(self._tokenizer, p.question) for p in problems]
        how = settings(
            len(prompts) * samples,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            seed=self._cfg.sampler.seed + seed,
        )
        with sharding.use(self._mesh, sharding.sampling(self._cfg.rules)):
            return self._sampler(self.params, prompts, how, repeats=samples)

    def _problem(self, number: int) -> records.Problem:
        """The problem at a place of the endless order: a new permutation for every pass."""
        size = len(self._problems)
        if self._pass != number // size:
            self._pass = number // size
            self._order = np.random.default_rng([self._cfg.seed, self._pass]).permutation(size)
        return problem_of(self._problems[int(self._order[number % size])])

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

    def _leave_out_long(self, groups: Sequence[Drawn], judged: list[list[Parts]]) -> None:
        """Keeps the rewards of rollouts that are longer than a row, and does not train them."""
        for group, parts in zip(groups, judged, strict=True):
            for k, made in enumerate(group.trajectories):
                if len(of_trajectory(made)) > self._cfg.packing.row_tokens:
                    parts[k] = parts[k]._replace(is_trained=False)

    def _refuse_short_rows(self, drawn: Sequence[Drawn]) -> None:
        shortest = min(len(of_trajectory(made)) for group in drawn for made in group.trajectories)
        if shortest > (most := self._cfg.packing.row_tokens):
            raise ValueError(
                f"Step {self._step}: every rollout is longer than a row, the shortest has "
                f"{shortest} nodes; want at most {most}. Set Packing.row_tokens higher or "
                "ForkJoin.max_new lower."
            )

    def _scored(self, group: Drawn, advantage: np.ndarray, parts: Sequence[Parts]) -> list[Scored]:
        tries = of_group(group.trajectories, most_tokens=self._cfg.packing.row_tokens)
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
        found = records.open_records(cfg.problems)
        problems = [problem_of(found[n]) for n in range(min(cfg.count, len(found)))]
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
        share = score.wilson(float(correct.mean()), len(correct))
        passes = [k for k in (2, 4, 8, 16, 32, 64) if k <= cfg.samples]
        numbers = summary(parts, totals(parts, self._cfg.reward))
        return {
            "eval_correct": share.value,
            "eval_correct_low": share.low,
            "eval_correct_high": share.high,
            **{f"eval_pass_at_{k}": float(score.pass_at_k(correct, k).mean()) for k in passes},
            **{
                f"eval_{n}": numbers[n] for n in ("longest_tokens", "total_tokens", "latency_ratio")
            },
        }
