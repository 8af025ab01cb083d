"""Both frameworks train the same trie from the same weights."""

import pytest

from tw_jax.data import workloads
from tw_jax.forkjoin import tries

pytestmark = pytest.mark.torch


@pytest.mark.slow
def test_both_frameworks_have_the_same_loss_and_both_are_timed_and_weighed(run, close):
    pytest.importorskip("torch")
    _, found = run("parity")
    for nodes in (cut.nodes for cut in workloads.TINY_PARITY.tries):
        close.error("equality_loss", found[f"loss_rel_diff_{nodes}"])
        ours, theirs = (found["times"][f"{side}_{nodes}"]["median_ms"] for side in ("jax", "torch"))
        assert found[f"torch_over_jax_{nodes}"] == pytest.approx(theirs / ours)
    assert found["memory_ratio"] == pytest.approx(found["jax_mib"] / found["torch_mib"])
    assert found["jax_mib"] > 0


def test_the_timed_tries_are_hardly_cut():
    for cut in workloads.PARITY.tries:
        whole = tries.trajectory_trie(workloads.trajectory(cut.shape, cut.seed))
        assert cut.nodes <= len(whole) <= 1.1 * cut.nodes
