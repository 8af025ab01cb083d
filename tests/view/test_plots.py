"""Plots show the numbers that they are given."""

import numpy as np
import pytest

from tw_jax.view import plots


def lines(steps: int, **values) -> list[dict]:
    """Lines of a metrics file."""
    return [{"step": n, **{k: float(v[n]) for k, v in values.items()}} for n in range(steps)]


def graded(count: int, right: int) -> list[dict]:
    """Lines of graded.jsonl."""
    rng = np.random.default_rng(0)
    verdicts = ["correct"] * right + ["incorrect"] * (count - right)
    totals = rng.integers(100, 300, count).tolist()
    return [
        {"verdict": v, "total": t, "longest": t // 2} for v, t in zip(verdicts, totals, strict=True)
    ]


def test_a_short_run_is_drawn_as_it_was_written() -> None:
    loss, accuracy = np.geomspace(5, 0.1, 20), np.linspace(0, 0.9, 20)
    figure = plots.loss_figure({"sft": lines(20, loss=loss, accuracy=accuracy)})
    top, bottom = figure.axes
    np.testing.assert_allclose(top.lines[0].get_xydata(), np.stack([np.arange(20), loss], 1))
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), accuracy)
    assert top.get_yscale() == "log"
    assert bottom.get_yscale() == "linear"
    assert top.get_ylabel() == "loss (nats per trained token)"
    assert bottom.get_xlabel() == "training step"
    assert top.get_title("left") == "Training loss: 5 at step 0, 0.1 at step 19"
    assert top.get_legend() is None


def test_a_long_run_is_its_running_mean_over_its_raw_values(close) -> None:
    loss = np.random.default_rng(0).uniform(1, 2, 400)
    (ax,) = plots.loss_figure({"sft": lines(400, loss=loss)}).axes
    raw, mean = (line.get_ydata() for line in ax.lines)
    np.testing.assert_array_equal(raw, loss)
    want = [np.mean(loss[max(n - 5, 0) : n + 6]) for n in range(400)]
    close("rounding", mean, want)
    assert ax.get_yscale() == "linear", "the loss spans less than a factor of ten"


def test_runs_are_overlaid_in_colours_of_their_own_and_named() -> None:
    runs = {name: lines(3, loss=np.ones(3) * n) for n, name in enumerate(("tries", "flat"), 1)}
    (ax,) = plots.loss_figure(runs).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["tries", "flat"]
    assert len({line.get_color() for line in ax.lines}) == 2


def test_a_step_whose_loss_is_not_finite_leaves_no_hole_in_the_others() -> None:
    loss = np.array([3.0, np.nan, 2.0, np.inf, 1.0])
    (ax,) = plots.loss_figure({"sft": lines(5, loss=loss)}).axes
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 3], [2, 2], [4, 1]])


def test_latency_tells_right_from_wrong_and_marks_medians() -> None:
    found = graded(30, right=20)
    axes = plots.latency_figure(found).axes
    for ax, some in zip(axes, (found[:20], found[20:]), strict=True):
        assert f"{len(some)} of 30 rollouts" in ax.get_title("left")
        assert "longest path 0.50 of all tokens" in ax.get_title("left")
        names = ("total", "longest")
        for line, name in zip(ax.lines, names, strict=True):
            assert line.get_xdata()[0] == np.median([one[name] for one in some])
        counts = {bars[0].get_label(): sum(b.get_height() for b in bars) for bars in ax.containers}
        assert counts == {"all tokens": len(some), "longest path": len(some)}
    assert axes[-1].get_xlabel() == "tokens per rollout"
    assert axes[0].get_ylabel() == "rollouts"


@pytest.mark.parametrize("right", [0, 4])
def test_latency_of_one_kind_has_one_panel(right: int) -> None:
    assert len(plots.latency_figure(graded(4, right=right)).axes) == 1


def test_rollouts_without_a_known_answer_are_drawn_apart() -> None:
    found = graded(4, right=2)
    found[3] |= {"verdict": "unknown"}
    titles = [ax.get_title("left") for ax in plots.latency_figure(found).axes]
    assert [title.partition(":")[0] for title in titles] == ["Correct", "Wrong", "Answer not known"]


def test_latency_of_rollouts_without_tokens_is_drawn() -> None:
    drawn = plots.latency_figure([{"verdict": "timeout", "total": 0, "longest": 0}])
    assert len(drawn.axes) == 1


def test_a_policy_run_shows_reward_and_latency_before_its_loss() -> None:
    values = {name: np.arange(4.0) + n for n, name in enumerate(plots.POLICY)}
    figure = plots.policy_figure({"pgrpo": lines(4, **values)})
    assert list(plots.POLICY) == ["reward", "longest_tokens", "latency_ratio", "loss"]
    for ax, name in zip(figure.axes, plots.POLICY, strict=True):
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), values[name])
        assert ax.get_title("left") == plots.POLICY[name][0]


def test_a_metric_that_no_line_has_gets_no_panel() -> None:
    figure = plots.policy_figure({"a": lines(3, reward=np.ones(3), loss=np.ones(3))})
    titles = [ax.get_title("left") for ax in figure.axes if ax.get_visible()]
    assert titles == ["Reward", "Policy loss"]


@pytest.mark.parametrize("steps", [2, 3, 4, 7])
def test_ticks_of_steps_are_whole_numbers(steps: int) -> None:
    ones = np.ones(steps)
    for figure in (
        plots.loss_figure({"a": lines(steps, loss=ones)}),
        plots.policy_figure({"a": lines(steps, reward=ones, loss=ones)}),
    ):
        for ax in figure.axes:
            ticks = ax.get_xticks()
            np.testing.assert_array_equal(ticks, np.round(ticks))
