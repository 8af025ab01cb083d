"""Cost against the released statistics, and against hand counts of the call graph."""

import json
from pathlib import Path

import numpy as np
import pytest

from tw_jax.forkjoin import cost
from tw_jax.forkjoin.calls import Call, StopReason, Trajectory

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "stats.json").read_text())
TAGS = GOLDEN["tags"]


def golden_tags() -> cost.Tags:
    return cost.Tags(TAGS["<Parallel>"], TAGS["</Parallel>"], TAGS["<Thread>"], TAGS["</Thread>"])


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_statistics_of_ids_equal_the_released_ones(number, close):
    case = GOLDEN["cases"][number]
    got = cost.cost_from_ids(np.array(case["ids"], np.int32), golden_tags())
    assert got.total == case["total_num_tokens"] == len(case["ids"])
    assert got.longest == case["num_tokens_in_the_longest_thread"]
    assert got.blocks == case["parallel_count"]
    assert (got.blocks > 0) == case["with_parallel"]
    ratios = {
        "parallel_ratio": got.parallel_ratio,
        "acceleration_ratio": got.acceleration,
        "avg_tokens_per_parallel_block": got.tokens_per_block,
        "thread_counts_per_block": got.threads_per_block,
    }
    for name, value in ratios.items():
        close("rounding", value, case[name], what=name)


def call(path, sampled):
    empty = np.zeros(0, np.int32)
    ids = np.arange(sampled, dtype=np.int32)
    return Call(path, empty, empty.astype(np.int8), ids, None, StopReason.STOP)


def test_the_schedule_charges_each_round_its_longest_thread():
    calls = (
        call((), 10), call((0, "1"), 3), call((0, "2"), 7), call((), 5), call((1, "1"), 2),
        call((1, "2"), 1), call((), 4),
    )  # fmt: skip
    empty = np.zeros(0, np.int32)
    trajectory = Trajectory(0, calls, empty, empty.astype(np.int8), 2, "eos", {})
    got = cost.cost_from_calls(trajectory)
    assert (got.total, got.longest) == (32, 10 + 7 + 5 + 2 + 4)
    assert (got.blocks, got.threads, got.in_blocks) == (2, 4, 13)


def test_threads_written_one_after_the_other_earn_nothing_by_schedule():
    empty = np.zeros(0, np.int32)
    trajectory = Trajectory(0, (call((), 30),), empty, empty.astype(np.int8), 0, "eos", {})
    assert cost.cost_from_calls(trajectory).acceleration == 0


def test_leaving_the_prompt_out_raises_the_ratio():
    case = next(c for c in GOLDEN["cases"] if c["acceleration_ratio"] > 0.1)
    ids = np.array(case["ids"], np.int32)
    with_prompt = cost.cost_from_ids(
        np.concatenate([np.full(50, 100, np.int32), ids]), golden_tags()
    )
    assert with_prompt.total == cost.cost_from_ids(ids, golden_tags()).total + 50
    assert with_prompt.acceleration < cost.cost_from_ids(ids, golden_tags()).acceleration
