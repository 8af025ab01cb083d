"""The lines of a run: strict, one per step, whole after a crash; clocks, bars and counters."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax import metrics
from tw_jax.metrics import Clock, Metrics, count_compiles, progress, read


def test_a_step_is_one_strict_json_line_of_floats(tmp_path):
    with Metrics(tmp_path) as out:
        out.write(0, {"loss": jnp.float32(0.5), "tokens": np.int64(3), "done": True})
        out.write(2, {"loss": jnp.bfloat16(2)})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    line = json.loads(first)
    assert line.pop("wall_seconds") >= 0
    assert line == {"step": 0, "loss": 0.5, "tokens": 3.0, "done": 1.0}
    assert json.loads(second)["loss"] == 2.0


def test_what_is_not_finite_is_a_word_and_reads_back_as_a_number(tmp_path):
    with Metrics(tmp_path) as out:
        out.write(0, {"a": jnp.nan, "b": np.inf, "c": -math.inf})

    def refuse(word):
        raise AssertionError(word)

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    (values,) = read(tmp_path / "metrics.jsonl")
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)


def test_lines_are_on_disk_before_the_file_is_closed(tmp_path):
    out = Metrics(tmp_path)
    out.write(0, {"loss": 1.0})
    assert len(read(tmp_path / "metrics.jsonl")) == 1
    out.close()
    out.close()


def test_resuming_drops_later_lines_and_a_line_cut_off(tmp_path):
    with Metrics(tmp_path) as out:
        for step in range(5):
            out.write(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "los')
    assert [line["step"] for line in read(path)] == [0, 1, 2, 3, 4]
    with Metrics(tmp_path, step=3) as out:
        out.write(3, {"loss": 30})
        out.write(4, {"loss": 40})
    assert [line["loss"] for line in read(path)] == [0, 1, 2, 30, 40]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_wall_seconds_go_on_from_the_attempt_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "wall_seconds": 100.0}\n{"step": 1, "wall_seconds": 200.0}\n')
    with Metrics(tmp_path, step=1) as out:
        out.write(1, {})
    assert 100 <= read(path)[-1]["wall_seconds"] < 110


def test_a_fresh_run_drops_all_lines_of_the_one_before(tmp_path):
    for _ in range(2):
        with Metrics(tmp_path) as out:
            out.write(0, {"loss": 1})
    assert len(read(tmp_path / "metrics.jsonl")) == 1


def test_a_broken_line_in_the_middle_is_pointed_at(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("nonsense", "[]", "3", '{"step": null}', '{"loss": 1}', "\0\0", "[" * 100_000):
        path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n')
        with pytest.raises(
            ValueError, match=r"metrics.jsonl:2: this line is not a JSON object .* with a step"
        ):
            Metrics(tmp_path, step=2)


def test_a_step_is_written_once(tmp_path):
    with Metrics(tmp_path, step=3) as out:
        with pytest.raises(
            ValueError, match=r"step = 2 must be greater than 2, because a step has one line"
        ):
            out.write(2, {})
        out.write(3, {"a": 1})
        with pytest.raises(ValueError, match=r"step = 3 must be greater than 3"):
            out.write(3, {"b": 1})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"loss": jnp.ones(3)}, r"metric 'loss' has shape \(3,\), but must be a single number"),
        ({"step": 1}, "metric 'step' has the name of another field"),
    ],
)
def test_what_is_no_metric_is_refused_and_leaves_no_line(values, sentence, tmp_path):
    with Metrics(tmp_path) as out:
        with pytest.raises(ValueError, match=sentence):
            out.write(0, values)
        out.write(0, {"loss": 1})
    assert len(read(tmp_path / "metrics.jsonl")) == 1


def test_metrics_are_written_under_a_transfer_guard(tmp_path):
    value = jax.jit(lambda: jnp.float32(1.5))()
    with jax.transfer_guard("disallow"), Metrics(tmp_path) as out:
        out.write(0, {"loss": value})
    assert read(tmp_path / "metrics.jsonl")[0]["loss"] == 1.5


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with Metrics(tmp_path) as out:
        out.write(0, {"train_loss": 0.25})
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"train_loss" in events.read_bytes()
    assert np.float32(0.25).tobytes() in events.read_bytes()


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Metrics(tmp_path) as out:
        out.write(0, {"loss": 1})
    list(progress(range(3), desc="steps"))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


# Progress.


def test_a_short_loop_prints_at_most_a_line_where_no_terminal_listens(capsys):
    assert list(progress(range(100), desc="packing")) == list(range(100))
    assert capsys.readouterr().err.count("\n") <= 1


def test_a_long_loop_prints_lines_without_carriage_returns(capsys, monkeypatch):
    monkeypatch.setattr(metrics, "QUIET_SECONDS", 0.02)
    with progress(desc="steps", total=10, start=4) as bar:
        for _ in range(6):
            time.sleep(0.03)
            bar.set_postfix(loss=0.5, refresh=False)
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    assert all(re.match(r"steps: +\d+% \d+/10 \[", line) for line in lines)
    assert "10/10" in lines[-1]
    assert "loss=0.5" in lines[-1]


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress(range(3), desc="steps"))
    assert "\r" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


# Clocks and counters.


def test_a_clock_reads_seconds_and_rates_and_starts_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    for _ in range(2):
        with clock.spend("data"):
            now[0] += 1.5
        clock.count(tokens=500)
    now[0] += 2.0
    assert clock.read() == {"data_seconds": 3.0, "tokens_per_second": 200.0}
    now[0] += 1.0
    clock.count(tokens=7)
    assert clock.read() == {"tokens_per_second": 7.0}


def test_time_is_counted_when_the_block_fails():
    clock = Clock()
    with pytest.raises(RuntimeError), clock.spend("data"):
        raise RuntimeError
    assert "data_seconds" in clock.read()


def test_compiles_are_counted_inside_the_block_only():
    double = jax.jit(lambda x: x * 2 + 1)
    ones, twos = jnp.ones(3), jnp.ones((2, 2))
    with count_compiles() as compiles:
        double(ones)
        first = compiles.count
        double(ones)
        assert compiles.count == first == 1
        double(twos)
        assert compiles.count == 2
    double(jnp.ones((5, 5)))
    assert compiles.count == 2
    assert compiles.seconds > 0


def test_nested_counters_both_count():
    triple = jax.jit(lambda x: x * 3 + 2)
    ones, twos = jnp.ones(3), jnp.ones((2, 2))
    with count_compiles() as outer:
        triple(ones)
        with count_compiles() as inner:
            triple(twos)
    assert (outer.count, inner.count) == (2, 1)
