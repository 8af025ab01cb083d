"""`tw sample`: samples fork-join rollouts of a trained model and stores their ids.

Finished rollouts are appended to the file at once, so the same command continues an interrupted
run. With `--hosts` this is one process of a job, and process 0 reads and writes the files.
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
    """Samples the missing rollouts and prints how they ended."""
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
