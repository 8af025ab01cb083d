"""`tw sample`: fork-join rollouts of a trained model, kept by ids.

Finished rollouts are appended as they come, so an interrupted run goes on where it stopped. With
`--hosts` it is one process of a job, and process 0 reads and writes the files.
"""

from __future__ import annotations

from collections import Counter

from tw_jax import hosts, workdir
from tw_jax.bounds import counted
from tw_jax.rollouts import samples
from tw_jax.rollouts.samples import Sample
from tw_jax.tokenizer.load import load_tokenizer

MANY_HOSTS = True
"""`tw sample --hosts` is one process of many."""


def run(cfg: Sample) -> None:
    """Samples what is missing and prints how the new rollouts ended."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    problems = samples.read_problems(cfg, tokenizer)
    _, new = samples.sample(cfg, samples.load(cfg), problems)
    workdir.record(cfg)
    if not hosts.is_first():
        return
    print(f"{cfg.workdir}/rollouts.jsonl: {counted(len(new), 'new rollout')}")
    print("ended by: " + (_listed(Counter(rollout.finish for rollout in new)) or "nothing new"))
    events = sum((Counter(rollout.counts) for rollout in new), Counter[str]())
    if events:
        print("events: " + _listed(events))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
