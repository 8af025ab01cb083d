"""The benchmark of tries reports what it built."""

import re

import numpy as np

from tw_jax.benchmarks import trie
from tw_jax.data import workloads
from tw_jax.forkjoin import tries


def test_trie_reports_its_nodes_times_and_memory(run):
    lines, found = run("trie")
    case = workloads.TINY_TRIE
    assert found["nodes"] == len(tries.trajectory_trie(workloads.trajectory(case.shape, case.seed)))
    assert found["build_ms"] == found["times"]["build"]["median_ms"]
    assert found["build_ms"] >= found["times"]["build"]["fastest_ms"] > 0
    # Tokens, parents, depths, ends and weights of four bytes each are held at the end.
    assert found["bytes_per_node"] > 20
    assert found["bars"]["build_ms"] == {"most": 5.0, "met": found["build_ms"] <= 5}
    assert {"jax", "jaxlib", "numpy", "python"} == found["versions"].keys()
    assert found["device"].startswith("cpu")
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
    assert any(re.match(r"  build_ms .* at most 5: ", line) for line in lines)


def test_the_timed_trie_has_about_30_000_nodes():
    made = workloads.trajectory(workloads.TRIE.shape, workloads.TRIE.seed)
    assert 29_000 < len(tries.trajectory_trie(made)) < 31_000


def test_memory_is_what_a_run_adds():
    size = 1_000_000
    before = np.zeros(size, np.int8)

    def run():
        return np.zeros(size, np.int8), before.sum()

    assert size <= trie._peak_bytes(run) < 1.1 * size
