"""The picture of threads in time shows what `forkjoin.cost` counts."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from view.trajectories import TOKENIZER, drunk, written

from tw_jax.forkjoin.cost import cost_from_calls
from tw_jax.view import style, timeline

SEEDS = [1, 2, 3, 6, 8, 11]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_schedule_is_as_long_as_the_longest_path_and_its_twin_as_all_tokens(seed: int) -> None:
    trajectory = drunk(seed)
    stretches, forks = timeline.schedule(trajectory)
    cost = cost_from_calls(trajectory)
    assert max(s.stop for s in stretches) == cost.longest
    assert max(s.turn + s.stop - s.start for s in stretches) == cost.total
    assert len(forks) == cost.blocks
    assert sum(len(fork.threads) for fork in forks) == cost.threads


@pytest.mark.parametrize("seed", SEEDS)
def test_no_call_overlaps_another_in_its_lane_or_in_the_twin(seed: int) -> None:
    stretches, _ = timeline.schedule(drunk(seed))
    spans = [(s.lane, s.start, s.stop) for s in stretches]
    spans += [("twin", s.turn, s.turn + len(s.call.sampled)) for s in stretches]
    for (lane, start, stop), (other, begin, end) in itertools.combinations(spans, 2):
        assert lane != other or stop <= begin or end <= start


def test_threads_start_together_and_the_parent_goes_on_after_the_longest() -> None:
    stretches, (fork,) = timeline.schedule(written())
    first, one, two, last = stretches
    assert (first.lane, one.lane, two.lane, last.lane) == (0, 1, 2, 0)
    assert one.start == two.start == first.stop == fork.start
    assert last.start == max(one.stop, two.stop) == fork.stop
    assert (one.turn, two.turn) == (first.stop, first.stop + one.stop - one.start)


def test_the_figure_has_a_bar_for_each_call_in_both_lines() -> None:
    trajectory = drunk(3)
    above, below = timeline.timeline_figure(trajectory, TOKENIZER.decode).axes
    stretches, _ = timeline.schedule(trajectory)
    widths = [len(s.call.sampled) for s in stretches]
    assert [bar.get_width() for bar in above.patches] == widths
    assert [bar.get_width() for bar in below.patches] == widths
    assert [bar.get_x() for bar in above.patches] == [s.start for s in stretches]
    assert [bar.get_x() for bar in below.patches] == [s.turn for s in stretches]
    cost = cost_from_calls(trajectory)
    assert above.get_title("left") == f"Threads side by side: {cost.longest} decoding steps"
    twin = "The same tokens one after another"
    assert below.get_title("left") == f"{twin}: {cost.total} decoding steps"


@pytest.mark.parametrize("seed", [0, 3])
def test_text_stays_in_its_bar(seed: int) -> None:
    figure = timeline.timeline_figure(drunk(seed), lambda ids: "$x_{" + TOKENIZER.decode(ids) * 9)
    count = 0
    for ax in figure.axes:
        bars = [bar.get_window_extent() for bar in ax.patches]
        texts = [t for t in ax.texts if "DejaVu Sans Mono" in t.get_family() and t.get_text()]
        with mpl.rc_context(style.STYLE):
            texts = [text.get_window_extent() for text in texts]
        for t in texts:
            assert any(b.x0 < t.x0 and t.x1 < b.x1 and b.y0 < t.y0 and t.y1 < b.y1 for b in bars)
        count += len(texts)
    assert count


def test_steps_are_whole_numbers() -> None:
    figure = timeline.timeline_figure(written(), TOKENIZER.decode)
    ticks = figure.axes[1].get_xticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))
