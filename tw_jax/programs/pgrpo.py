"""`tw pgrpo`: reinforcement learning from fork-join rollouts, on packed tries.

A step draws problems, samples a group of rollouts for each with the current parameters, grades and
rewards them, packs the sampled ids of each group into a trie, and updates the parameters. Sampler
and trainer use the same arrays of parameters. The same command resumes an interrupted run.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from functools import partial
from pathlib import Path

import jax

from tw_jax import hosts, sharding, workdir
from tw_jax.bounds import counted
from tw_jax.checkpoint import Checkpoints
from tw_jax.forkjoin.cost import tags_of
from tw_jax.metrics import FILE, Metrics, read
from tw_jax.models.load import LanguageModel, record_model, with_added_rows
from tw_jax.rollouts.evaluate import evaluate_held_out
from tw_jax.rollouts.judge import judge_groups
from tw_jax.rollouts.pgrpo import Pgrpo, Setup, make_reference, prepare
from tw_jax.rollouts.step import pack_step, reward_groups
from tw_jax.rollouts.store import StepFiles
from tw_jax.rollouts.watch import SignalWatch, shown, steps_without_signal
from tw_jax.tasks.grader import GraderPool
from tw_jax.train.identity import establish, origin_params, standing
from tw_jax.train.loop import TrainingLoop, resume
from tw_jax.train.pgrpo import make_pgrpo_step, refuse_mismatch
from tw_jax.train.reference import Logp
from tw_jax.train.state import abstract_state, initial_state, jit_step, schedule

MANY_HOSTS = True
"""`tw pgrpo --hosts` is one process of many."""


def run(cfg: Pgrpo) -> None:
    """Trains until `steps`, beginning with the newest checkpoint of the workdir if there is one."""
    mesh, folder = sharding.make_mesh(cfg.mesh), Path(cfg.workdir)
    model = with_added_rows(cfg.model, folder / "checkpoints", cfg.init)
    cfg = dataclasses.replace(cfg, model=model)
    setup = prepare(cfg, mesh)
    abstract = abstract_state(setup.network, cfg.optim, mesh=mesh, rules=cfg.rules)
    step = make_pgrpo_step(
        setup.network,
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
        # A step with more microbatches than any before is compiled for twice as many. This is not a
        # mistake, so the warning is off.
        warnings.filterwarnings("ignore", message="Step .* was compiled again")
        who = establish(
            cfg,
            checkpoints,
            needs_init=cfg.loss.kl_coef > 0,
            schedule=schedule(cfg.optim, steps=cfg.steps),
            **setup.contents(cfg),
        )
        assert who.origin is not None  # Pgrpo.init names a checkpoint
        began = partial(origin_params, cfg.init, who.origin, abstract.params)
        state, position = resume(checkpoints, abstract)
        if state is None:
            key = jax.random.key(cfg.seed)
            state = initial_state(
                setup.network, cfg.optim, mesh=mesh, rules=cfg.rules, key=key, params=began()
            )
        first = int(state.step)
        if hosts.is_first():
            devices = counted(mesh.size, "device")
            where = f"{devices} of {counted(jax.process_count(), 'process')}"
            print(f"{folder}: step {first} of {cfg.steps}, {where}")
            print(standing(who, first=first, steps=cfg.steps), end="")
            if dropped := setup.problems.dropped:
                print(f"{cfg.problems}: {counted(dropped, 'problem')} with long prompts left out")
        if first < cfg.steps:
            workdir.record(cfg)
        protocol, names = setup.generate.sampler.protocol, setup.tokenizer.fingerprint
        files = StepFiles(folder, run=who.digest, fingerprint=names, protocol=protocol)
        files.delete_from(first)
        reference = make_reference(cfg, setup.network, began, state.params)
        model = LanguageModel(
            model=cfg.model, tokenizer=cfg.tokenizer, chat=cfg.chat, forkjoin=cfg.forkjoin
        )
        language_model = record_model(
            checkpoints.directory, model, setup.tokenizer, origin=cfg.init
        )
        with (
            Metrics(folder, step=first) as metrics,
            TrainingLoop(
                state,
                compiled,
                steps=cfg.steps,
                save_every=cfg.save_every,
                metrics=metrics,
                checkpoints=checkpoints,
                note={**who.note, **language_model},
            ) as loop,
        ):
            prompts = 0 if position is None else position["prompts"]
            _train(cfg, setup, loop, pool=pool, files=files, reference=reference, prompts=prompts)
        if hosts.is_first() and (sentence := steps_without_signal(read(folder / FILE))):
            print(sentence)


def _train(
    cfg: Pgrpo,
    setup: Setup,
    loop: TrainingLoop,
    *,
    pool: GraderPool,
    files: StepFiles,
    reference: Logp | None,
    prompts: int,
) -> None:
    """Takes the remaining steps; `prompts` is the number of problems that were drawn before."""
    tags, watch, clock = tags_of(setup.tokenizer), SignalWatch(), time.monotonic()
    for index in loop:
        began, params, numbers = time.monotonic(), loop.state.params, {}
        if index == 0:
            numbers |= _evaluate(cfg, setup, loop, pool=pool, prefix="initial_")
        with loop.spend("data"), files.unfinished(index) as unfinished:
            groups = []
            while sum(g.has_signal for g in groups) < cfg.prompts and len(groups) < cfg.max_prompts:
                # Empty rows take as much time as others, so all rows are filled.
                count = min(cfg.max_prompts - len(groups), cfg.sampler.rows // cfg.rollouts)
                problems = setup.problems.drawn(prompts, count, seed=cfg.seed)
                seed = cfg.sampler.seed + prompts * cfg.rollouts
                ids = [
                    [f"{index}/{prompts + n}/{problem.id}/{k}" for k in range(cfg.rollouts)]
                    for n, problem in enumerate(problems)
                ]
                sampled = unfinished.find(problems, ids) or setup.generate(
                    params,
                    problems,
                    ids,
                    seeds=range(seed, seed + count * cfg.rollouts),
                    temperature=cfg.sampler.temperature,
                )
                unfinished.add(sampled)
                verdicts = judge_groups(pool, sampled)
                groups += reward_groups(
                    sampled, verdicts, cfg.reward, tags=tags, row_tokens=cfg.packing.row_tokens
                )
                prompts += count
        with loop.spend("data"):
            step = pack_step(
                index,
                groups,
                prompts=cfg.prompts,
                inner_steps=cfg.inner_steps,
                normalise=cfg.normalise,
                aggregation=cfg.aggregation,
                packing=cfg.packing,
                microbatch_rows=cfg.microbatch_rows,
                fingerprint=setup.tokenizer.fingerprint,
            )
            files.finish(index, step.records)
            numbers |= step.numbers | {"problems_dropped": setup.problems.dropped}
            numbers["rollout_seconds"] = time.monotonic() - began
            batch = sharding.put_rows(step.batch)
            if reference is not None:
                batch = batch.replace(ref_logp=reference(params, batch.trie))
        loop.step(batch)
        if _is_evaluated(cfg, index):
            numbers |= _evaluate(cfg, setup, loop, pool=pool)
        numbers["seconds"], clock = time.monotonic() - clock, time.monotonic()
        updated = loop.log(numbers, shown=shown)
        if hosts.is_first() and (sentence := watch.sentence(index, numbers)):
            print(sentence)
        refuse_mismatch(cfg.max_mismatch, index, updated)
        loop.save_when_due({"step": index + 1, "prompts": prompts})


def _is_evaluated(cfg: Pgrpo, index: int) -> bool:
    """Whether the held-out problems are sampled after a step."""
    taken = index + 1
    return cfg.evaluation is not None and (taken % cfg.evaluation.every == 0 or taken == cfg.steps)


def _evaluate(
    cfg: Pgrpo, setup: Setup, loop: TrainingLoop, *, pool: GraderPool, prefix: str = ""
) -> dict[str, float]:
    """Metrics of the held-out problems with the current parameters; {} without an evaluation."""
    if cfg.evaluation is None or setup.held_out is None:
        return {}
    with loop.spend("eval"):
        found = evaluate_held_out(
            cfg.evaluation, setup.generate, loop.state.params, setup.held_out, pool
        )
    return {f"{prefix}{name}": value for name, value in found.items()}
