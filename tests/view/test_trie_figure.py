"""The picture of a trie shows who wrote what and who sees whom."""

import io
import itertools

import matplotlib as mpl
import numpy as np
import oracles
import pytest
from view.trajectories import TEXT, TOKENIZER, drunk, written

from tw_jax.forkjoin import tries
from tw_jax.view import style, trie_figure


def test_blocks_say_who_wrote_what() -> None:
    made = written()
    trie = tries.trajectory_trie(made)
    parts = trie_figure.blocks(made, trie)
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
    parts = trie_figure.blocks(made, trie)
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
    parts = trie_figure.blocks(made, trie)
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
    _, row, square = trie_figure.trie_figure(trajectory, TOKENIZER.decode).axes
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
    _, row, _ = trie_figure.trie_figure(written(), TOKENIZER.decode).axes
    paleness = np.asarray(row.images[0].get_array())[0].min(-1)
    assert paleness[trie.weight == 0].min() > paleness[trie.weight > 0].max()


@pytest.mark.parametrize("seed", [0, 3])
def test_text_stays_in_its_box_and_boxes_do_not_overlap(seed: int) -> None:
    figure = trie_figure.trie_figure(drunk(seed), lambda ids: "$x_{" + TOKENIZER.decode(ids) * 9)
    tree = figure.axes[0]
    boxes = [patch for patch in tree.patches if patch.get_width() == trie_figure.WIDTH]  # no key
    with mpl.rc_context(style.STYLE):
        boxes = [box.get_window_extent() for box in boxes]
        texts = [t.get_window_extent() for t in tree.texts if "DejaVu Sans Mono" in t.get_family()]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    assert len(texts) > len(boxes)
    for t in texts:
        assert any(b.x0 < t.x0 and t.x1 < b.x1 and b.y0 < t.y0 and t.y1 < b.y1 for b in boxes)


def test_a_long_text_is_cut_in_its_middle() -> None:
    figure = trie_figure.trie_figure(
        written(), lambda ids: "\n".join(f"line {n}" for n in range(99))
    )
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert {"line 0", "…", "line 98"} <= set(shown)
    assert "line 50" not in shown


def test_the_same_trajectory_makes_the_same_bytes() -> None:
    files = io.BytesIO(), io.BytesIO()
    for file in files:
        style.save(trie_figure.trie_figure(written(), TOKENIZER.decode), file, "svg")
    assert files[0].getvalue() == files[1].getvalue()
