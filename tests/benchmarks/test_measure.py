"""Runs are timed in turn, and a bar is reached or missed."""

from tw_jax.benchmarks import measure
from tw_jax.benchmarks.measure import Times


def test_runs_are_interleaved_and_the_first_round_is_not_counted(monkeypatch):
    order = []
    seconds = {"a": iter([50, 3, 1, 2]), "b": iter([70, 5, 4, 9])}
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def prepare(name):
        order.append(f"prepare {name}")
        clock[0] += 1000
        return name

    def spend(name):
        order.append(name)
        clock[0] += next(seconds[name])

    times = measure.interleave({"a": spend, "b": spend}, 3, prepare=prepare)
    assert order == ["prepare a", "a", "prepare b", "b"] * 4
    assert times == {"a": Times(1000, 2000), "b": Times(4000, 5000)}
