"""Benchmarks measure what they say, in turn, and print it for people and for programs."""

import json
import re

import fakes
import jax
import numpy as np
import pytest

from tw_jax import cli
from tw_jax.data import workloads
from tw_jax.forkjoin import tries
from tw_jax.programs import bench
from tw_jax.programs.bench import Report, Times


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `tw bench NAME --json` in miniature; returns the printed lines, the last one parsed."""

    def run(name):
        measure = bench.BENCHMARKS[name][0]
        case = getattr(workloads, f"TINY_{name.upper()}")
        monkeypatch.setitem(bench.BENCHMARKS, name, (measure, case))
        assert cli.main(["bench", name, "--json"]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)

    return run


@pytest.fixture
def quick_network(monkeypatch):
    """A network of one fixed layer in place of the decoder: it compiles in a moment."""
    monkeypatch.setattr(bench, "network", lambda model: fakes.path_network(model.vocab_size))


def test_trie_reports_its_nodes_times_and_memory(run):
    lines, found = run("trie")
    case = workloads.TINY_TRIE
    assert found["nodes"] == len(tries.of_trajectory(workloads.trajectory(case.shape, case.seed)))
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
    assert 29_000 < len(tries.of_trajectory(made)) < 31_000


def test_the_timed_step_has_nodes_enough_for_the_dense_comparison():
    made = workloads.trajectory(workloads.STEP.shape, workloads.STEP.seed)
    assert len(tries.of_trajectory(made)) >= workloads.STEP.dense_nodes


def test_step_trains_the_same_tokens_both_ways(quick_network, run, tolerance):
    _, found = run("step")
    assert found["loss_rel_diff"] <= tolerance["equality_loss"]
    assert found["grad_rel_l2"] <= tolerance["equality_gradient"]
    case = workloads.TINY_STEP
    made = workloads.trajectory(case.shape, case.seed)
    call_tokens = sum(len(call.context) + len(call.sampled) for call in made.calls)
    assert found["row_tokens"] == call_tokens
    assert found["token_ratio"] == pytest.approx(call_tokens / found["nodes"])
    ms = {name: times["median_ms"] for name, times in found["times"].items()}
    assert found["time_ratio"] == pytest.approx(ms["rows"] / ms["trie"])
    assert found["blockwise_over_dense"] == pytest.approx(ms["dense"] / ms["blockwise"])
    remat = ms["dense_remat"] / ms["blockwise_remat"]
    assert found["blockwise_over_dense_remat"] == pytest.approx(remat)
    assert found["token_ratio_full"] > 1
    assert found["dense_nodes"] == case.dense_nodes


def test_a_gradient_of_other_weights_is_seen_as_different(quick_network):
    case = workloads.TINY_STEP
    made = workloads.trajectory(case.shape, case.seed)
    trie = tries.of_trajectory(made)
    batch = bench.stack_rows([[trie]], len(trie))
    other = batch.replace(weight=batch.weight * (np.arange(len(trie)) % 2))
    net = bench.network(case.model)
    params = net.init(jax.random.key(0))
    loss, gradient = bench._difference(net, params, {"trie": batch, "rows": other})
    assert loss > 0.1
    assert gradient > 0.1


def test_every_way_of_decoding_draws_the_same_number_of_tokens(quick_network, run, monkeypatch):
    drawn, finish = {}, bench._Decode.finish

    def recorded(self, params, state):
        before = np.asarray(state.log.length)
        state = finish(self, params, state)
        drawn[self.sampler.sizes.rows, self.sampler.sizes.lanes] = (
            np.asarray(state.log.length) - before
        ).tolist()
        return state

    monkeypatch.setattr(bench._Decode, "finish", recorded)
    _, found = run("sampler")
    case = workloads.TINY_SAMPLER
    assert drawn == {
        (1, 4): [4 * case.tokens],
        (4, 1): [case.tokens] * 4,
        (1, 1): [4 * case.tokens],
    }
    ms = {name: times["median_ms"] for name, times in found["times"].items()}
    over_rows = ms["rows4_64"] / ms["lanes4_64"]
    assert found["lanes4_over_rows_64"] == pytest.approx(over_rows)
    assert found["lanes4_over_sequential"] == pytest.approx(ms["sequential_64"] / ms["lanes4_64"])
    assert found["recompiles"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "sampler"])
def test_a_benchmark_runs_on_the_decoder(run, name, tolerance):
    _, found = run(name)
    assert found.get("recompiles", 0) == 0
    assert found.get("grad_rel_l2", 0) <= tolerance["equality_gradient"]
    assert min(times["fastest_ms"] for times in found["times"].values()) > 0


def test_runs_are_interleaved_and_the_first_round_is_not_counted(monkeypatch):
    order = []
    seconds = {"a": iter([50, 3, 1, 2]), "b": iter([70, 5, 4, 9])}
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def prepare(name):
        order.append(f"prepare {name}")
        clock[0] += 1000
        return name

    def spend(name):
        order.append(name)
        clock[0] += next(seconds[name])

    times = bench.interleave({"a": spend, "b": spend}, 3, prepare=prepare)
    assert order == ["prepare a", "a", "prepare b", "b"] * 4
    assert times == {"a": Times(1000, 2000), "b": Times(4000, 5000)}


def test_memory_is_what_a_run_adds():
    size = 1_000_000
    before = np.zeros(size, np.int8)

    def run():
        return np.zeros(size, np.int8), before.sum()

    assert size <= bench._peak_bytes(run) < 1.1 * size


def test_a_missed_bar_is_said_and_is_no_error():
    report = Report(
        times={"a": Times(1.0, 2.0)},
        values={"slow": 1.5, "fast": 1.9, "nodes": 30_000},
        bars={"slow": ("least", 1.7), "fast": ("least", 1.7), "nodes": ("most", 30_000)},
    )
    assert [report.meets(name) for name in report.values] == [False, True, True]
    table = " ".join(bench._table(report).split())
    assert "slow 1.5 at least 1.7: MISSED" in table
    assert "fast 1.9 at least 1.7: met" in table
    assert "nodes 30,000 at most 30000: met" in table


def test_an_unknown_benchmark_lists_the_known_ones(capsys):
    assert cli.main(["bench", "packing"]) == 2
    assert capsys.readouterr().err == (
        "tw: 'packing' is no benchmark. Benchmarks: trie, step, sampler.\n"
    )
