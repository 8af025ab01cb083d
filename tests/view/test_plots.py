"""Pictures show the numbers that they are given."""

import io
import itertools

import fakes
import numpy as np
import oracles
import pytest

from tw_jax.forkjoin import orchestrator, tries
from tw_jax.forkjoin.engine import Chunk
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.replay import replay
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.view import plots

TOKENIZER = fakes.Characters()
TABLE = make_table(TOKENIZER)
FORK = "a<Outlines><Outline>1:a</Outline><Outline>2:b</Outline><Outline>3:c</Outline></Outlines>"
TEXT = (
    "a<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>"
    "\n<Thread>\n1: aa\n</Thread><Thread>\n2: bb\n</Thread>\n</Parallel>d<eos>"
)


class Drunk:
    """An engine whose threads close themselves, end, or run on; its parent forks a few times."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    async def generate(self, request):
        text = FORK if self.rng.random() < 0.6 else "</Parallel>b<eos>"
        if request.path:
            words = "".join(self.rng.choice([*"cdef"], self.rng.integers(0, 3)))
            text = words + ["</Thread>", "<eos>", "g" * 9][self.rng.integers(3)]
        yield Chunk(TOKENIZER.encode(text)[: request.max_tokens])


def written():
    """A trajectory of one fork, read from its text."""
    protocol = ThreadWeaver(TABLE, ForkJoin())
    return replay(protocol, TOKENIZER.encode("bc" + TEXT), 2)


def drunk(seed: int):
    """A trajectory of several forks whose threads end in all ways."""
    limits = ForkJoin(max_thread=7, max_rounds=3)
    protocol = ThreadWeaver(TABLE, limits)
    engine = Drunk(np.random.default_rng(seed))
    return orchestrator.run(protocol, engine, TOKENIZER.encode("bc"))


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


def test_blocks_say_who_wrote_what() -> None:
    made = written()
    trie = tries.trajectory_trie(made)
    parts = plots.blocks(made, trie)
    texts = [TOKENIZER.decode(trie.tokens[part.start : part.stop]) for part in parts]
    plan, rest = TEXT.split("1: aa")
    assert list(zip([part.name for part in parts], texts, strict=True)) == [
        ("prompt", "bc"),
        ("parent", plan),
        ("thread 1", "1: aa\n</Thread>"),
        ("thread 2, re-read", "<Thread>\n2: bb\n</Thread>"),
        ("parent", rest.removeprefix("\n</Thread><Thread>\n2: bb\n</Thread>")),
        ("thread 2", "2: bb\n</Thread>"),
    ]
    assert [part.is_joined for part in parts] == [True] * 5 + [False]
    assert len({part.color for part in parts}) == 4


@pytest.mark.parametrize("seed", [1, 2, 3, 6, 8, 11])
def test_a_trained_node_belongs_to_the_call_that_drew_it(seed: int) -> None:
    made = drunk(seed)
    trie = tries.trajectory_trie(made)
    parts = plots.blocks(made, trie)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == len(trie)
    author = np.repeat([p.author for p in parts], [p.stop - p.start for p in parts])
    # Paths as text are the oracle: a node is what stands on its way down.
    path = [tuple(trie.tokens[row].tolist()) for row in oracles.visible_by_parents(trie.parent)]
    number = 1
    for call in made.calls:
        number += call.is_thread
        ids = (*call.context.tolist(), *call.sampled.tolist())
        for length in range(len(call.context) + 1, len(ids) + 1):
            assert author[path.index(ids[:length])] == (number if call.is_thread else 1)


@pytest.mark.parametrize("seed", [1, 2, 3, 6, 8, 11])
def test_a_copy_is_untrained_and_ends_with_what_its_thread_handed_back(seed: int) -> None:
    made = drunk(seed)
    trie = tries.trajectory_trie(made)
    parts = plots.blocks(made, trie)
    threads = [call for call in made.calls if call.is_thread]
    copies = [part for part in parts if part.is_copy]
    for part in copies:
        body = threads[part.author - 2].sampled.tolist()
        body = body[:-1] if body[-1] in TOKENIZER.eos_ids else body
        assert trie.tokens[part.start : part.stop].tolist()[-len(body) :] == body
        assert not trie.weight[part.start : part.stop].any()
    own = {n for n, c in enumerate(threads, 2) if c.path[1] != "1" and len(c.sampled)}
    silent = {n for n in own if threads[n - 2].sampled[0] in TOKENIZER.eos_ids}
    assert {part.author for part in copies} == own - silent


@pytest.mark.parametrize("trajectory", [written(), drunk(3), drunk(8)], ids=["one", "a", "b"])
def test_the_mask_shows_what_each_node_sees(trajectory) -> None:
    trie = tries.trajectory_trie(trajectory)
    _, row, square = plots.trie_figure(trajectory, TOKENIZER.decode).axes
    image, strip = (np.asarray(ax.images[0].get_array()) for ax in (square, row))
    seen = oracles.visible_by_parents(trie.parent)
    np.testing.assert_array_equal((image < 1).any(-1), seen)
    np.testing.assert_array_equal(image[seen], strip[0][np.nonzero(seen)[1]])
    assert square.images[0].get_extent() == [0, len(trie), len(trie), 0]
    assert (square.get_xlabel(), square.get_ylabel()) == ("node j", "node i")
    assert row.get_title("right") == (
        f"{len(trie)} nodes hold {len(trajectory.calls)} calls of {trie.source_tokens:,} tokens"
    )


def test_pale_nodes_are_those_without_loss() -> None:
    trie = tries.trajectory_trie(written())
    _, row, _ = plots.trie_figure(written(), TOKENIZER.decode).axes
    paleness = np.asarray(row.images[0].get_array())[0].min(-1)
    assert paleness[trie.weight == 0].min() > paleness[trie.weight > 0].max()


@pytest.mark.parametrize("seed", [0, 3])
def test_text_stays_in_its_box_and_boxes_do_not_overlap(seed: int) -> None:
    figure = plots.trie_figure(drunk(seed), lambda ids: "$x_{" + TOKENIZER.decode(ids) * 9)
    tree = figure.axes[0]
    boxes = [patch for patch in tree.patches if patch.get_width() == plots.WIDTH]  # no key
    with plots.mpl.rc_context(plots.STYLE):
        boxes = [box.get_window_extent() for box in boxes]
        texts = [t.get_window_extent() for t in tree.texts if "DejaVu Sans Mono" in t.get_family()]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    assert len(texts) > len(boxes)
    for t in texts:
        assert any(b.x0 < t.x0 and t.x1 < b.x1 and b.y0 < t.y0 and t.y1 < b.y1 for b in boxes)


def test_a_long_text_is_cut_in_its_middle() -> None:
    figure = plots.trie_figure(written(), lambda ids: "\n".join(f"line {n}" for n in range(99)))
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert {"line 0", "…", "line 98"} <= set(shown)
    assert "line 50" not in shown


def test_the_same_trajectory_makes_the_same_bytes() -> None:
    files = io.BytesIO(), io.BytesIO()
    for file in files:
        plots.save(plots.trie_figure(written(), TOKENIZER.decode), file, "svg")
    assert files[0].getvalue() == files[1].getvalue()
