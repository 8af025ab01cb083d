"""`tw bench` prints a report for people and for programs."""

from tw_jax import cli
from tw_jax.benchmarks.measure import BenchmarkReport, Times
from tw_jax.programs import bench


def test_a_missed_bar_is_printed_and_is_no_error():
    report = BenchmarkReport(
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
    names = "trie, attention, step, rows, sampler, parity"
    error = f"tw: 'packing' is not a benchmark. Choose one of {names}.\n"
    assert capsys.readouterr().err == error
