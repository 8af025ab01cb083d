"""tw_jax: train and sample language models that think in parallel threads.

The public names are imported when they are first used, because grading workers and the command
line need few of them, and JAX takes seconds to load.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    # shapes and configs
    "KV": "contracts",
    "Network": "contracts",
    "Params": "contracts",
    "Span": "contracts",
    "config": "config",
    "load": "config",
    # text to ids
    "Bytes": "tokenizer.bytes",
    "Chat": "tokenizer.chat",
    "HuggingFace": "tokenizer.hugging_face",
    "SentencePiece": "tokenizer.sentencepiece",
    "load_tokenizer": "tokenizer.load",
    # calls, protocol, cost
    "Call": "forkjoin.calls",
    "StopReason": "forkjoin.calls",
    "Provenance": "forkjoin.calls",
    "Trajectory": "forkjoin.calls",
    "Request": "forkjoin.protocol",
    "Result": "forkjoin.protocol",
    "run": "forkjoin.orchestrator",
    "replay": "forkjoin.replay",
    "rebuild": "forkjoin.replay",
    "ForkJoin": "forkjoin.limits",
    "ThreadWeaver": "forkjoin.threadweaver.protocol",
    "make_table": "forkjoin.threadweaver.table",
    "cost_from_calls": "forkjoin.cost",
    "cost_from_ids": "forkjoin.cost",
    "chain_trie": "forkjoin.tries",
    "trajectory_trie": "forkjoin.tries",
    "group_tries": "forkjoin.tries",
    "Group": "forkjoin.tries",
    # tries and rows
    "Trie": "trie.tree",
    "build": "trie.tree",
    "flat_labels": "trie.tree",
    "TrieBatch": "trie.batch",
    "stack_rows": "trie.batch",
    "Packing": "trie.pack",
    "pack": "trie.pack",
    # model and training
    "attend": "attention.dispatch",
    "Lora": "models.lora",
    "Model": "models.transformer",
    "network": "models.transformer",
    "Optim": "train.state",
    "TrainState": "train.state",
    "make_step": "train.sft",
    "token_logp": "train.loss",
    # rewards, advantages and the loss of P-GRPO; its step is `train.pgrpo.make_pgrpo_step`
    "Reward": "rollouts.reward",
    "reward": "rollouts.reward",
    "totals": "rollouts.reward",
    "RewardTerm": "rollouts.terms",
    "JudgedRollout": "rollouts.terms",
    "Problem": "tasks.task",
    "Task": "tasks.task",
    "Grader": "tasks.grader",
    "GraderPool": "tasks.grader",
    "Aggregation": "train.groups",
    "PolicyBatch": "train.groups",
    "Scored": "train.groups",
    "advantages": "train.groups",
    "has_signal": "train.groups",
    "pack_groups": "train.groups",
    "PolicyLoss": "train.pgrpo",
    "loss_sums": "train.pgrpo",
    "make_logp": "train.pgrpo",
    # sampling
    "Sampler": "sample.sampler",
    "make_sampler": "sample.sampler",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tw_jax' has no attribute {name!r}; it has {__all__}.")
    return getattr(importlib.import_module(f"tw_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
