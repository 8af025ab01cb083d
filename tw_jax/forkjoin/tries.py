"""A rollout's calls to its training trie: the hand-over from `Trajectory` to `Trie`.

Which tokens are trained is decided here and nowhere else; how sequences merge is `trie/tree.py`.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from tw_jax.forkjoin.calls import Provenance, Trajectory
from tw_jax.trie.tree import Trie, build


def of_trajectory(trajectory: Trajectory) -> Trie:
    """The trie of a rollout: its joined path, then every call; weight 1 on sampled tokens.

    Forced, returned and prompt tokens carry no loss: exactly the tokens that the model drew are
    trained, each in the context in which it was drawn. Source: ThreadWeaver
    (arXiv:2512.07843), the figure of decomposed training.
    """
    calls = [call for call in trajectory.calls if len(call.sampled)]
    # Generators: the contexts of all calls together are several times the trie.
    contexts = (np.concatenate([call.context, call.sampled]) for call in calls)
    weights = (np.arange(len(c.context) + len(c.sampled)) >= len(c.context) for c in calls)
    trie = build(itertools.chain([trajectory.ids], contexts), itertools.chain([None], weights))
    # Sharing is measured against one row per call, which the joined path is not.
    return dataclasses.replace(trie, source_tokens=trie.source_tokens - len(trajectory.ids))


def of_chain(trajectory: Trajectory) -> Trie:
    """The sequential (AR) baseline: the joined path alone, every token after the prompt trained."""
    weight = (trajectory.provenance != Provenance.PROMPT).astype(np.float32)
    return build([trajectory.ids], [weight])
