"""The grammar of trajectories: round trips, pointed errors, and the released checker's verdicts."""

import contextlib
import functools
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.forkjoin.threadweaver.grammar import (
    Document,
    GrammarError,
    Outline,
    ParallelBlock,
    Prose,
    ThreadText,
    check,
    histogram,
    normalise,
    parse,
    point,
    render,
    well_formed,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "checker.json").read_text())["cases"]

SETTINGS = {
    "stage5": {
        "treat_no_parallel_as_error": False,
        "allow_between_threads": True,
        "skip_conclusion": True,
    },
    "strict": {
        "treat_no_parallel_as_error": False,
        "allow_between_threads": False,
        "skip_conclusion": True,
    },
    "require_parallel": {
        "treat_no_parallel_as_error": True,
        "allow_between_threads": True,
        "skip_conclusion": True,
    },
    "require_conclusion": {
        "treat_no_parallel_as_error": False,
        "allow_between_threads": True,
        "skip_conclusion": False,
    },
}

CANONICAL = (
    "<think>\nI square each leg.\n<Parallel>\n<Outlines>\n<Outline>1: Square 3.</Outline>\n"
    "<Outline>2: Square 4.</Outline>\n</Outlines>\n<Thread>\n1: 3*3 = 9.\n</Thread><Thread>\n"
    "2: 4*4 = 16.\n</Thread>\n</Parallel>\nSo the sum is 25.\n</think>\n\nIt is \\boxed{25}."
)


def block(*items, between="", conclusion="", outlines=None):
    """A block written by hand, independent of `render`; items are (number, body)."""
    outlines = "".join(
        f"<Outline>{n}: do {n}</Outline>\n" for n, _ in (items if outlines is None else outlines)
    )
    threads = between.join(f"<Thread>\n{n}: {body}\n</Thread>" for n, body in items)
    return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}{conclusion}\n</Parallel>"


def rules(text, setting="strict"):
    return {reason.rule for reason in check(text, **SETTINGS[setting]).reasons}


# Round trips.

_word = st.text(alphabet="ab <>/|=\n\\{}é1:.", max_size=12)
_inside = _word.map(str.strip)
_number = st.one_of(st.integers(0, 120).map(str), st.sampled_from(["2.1", "10.3.4"]))
_outline = st.builds(Outline, _number, _inside)
_thread = st.builds(ThreadText, _number, _inside)
_block = st.builds(
    ParallelBlock,
    st.lists(_outline, max_size=4).map(tuple),
    st.lists(_thread, max_size=12).map(tuple),
)


@st.composite
def _documents(draw):
    segments = []
    for _ in range(draw(st.integers(0, 3))):
        segments += [Prose(text)] if (text := draw(_word)) else []
        segments.append(draw(_block))
    segments += [Prose(text)] if (text := draw(_word)) else []
    return Document(tuple(segments))


@given(_documents())
def test_parse_undoes_render(document):
    assert parse(render(document)) == document


@given(_documents())
def test_render_undoes_parse_on_canonical_text_and_normalise_leaves_it_alone(document):
    text = render(document)
    assert render(parse(text)) == text
    plain_numbers = all("." not in t.number for b in document.blocks for t in b.threads)
    if plain_numbers:
        assert normalise(text) == text


@given(_documents(), st.sampled_from([" ", "\n", "\n \t\n"]))
def test_positions_cut_the_text_into_its_segments(document, blank):
    text = render(document).replace("</Thread>", f"{blank}</Thread>")
    read = parse(text)
    assert "".join(text[slice(*segment.at)] for segment in read.segments) == text
    for found in read.blocks:
        for outline in found.outlines:
            assert text[slice(*outline.at)].startswith("<Outline>")
            assert text[slice(*outline.at)].endswith("</Outline>")
        for thread in found.threads:
            cut = text[slice(*thread.at)]
            assert cut.startswith("<Thread>")
            assert cut.endswith("</Thread>")
            assert thread.body in cut


_piece = st.sampled_from(["<Thread>", "</Thread>", " ", "\n", "1:", "12", ":", "a", "<Thread>\n3:"])


@given(st.lists(_piece, max_size=14).map("".join))
def test_normalise_is_the_three_substitutions(text):
    want = re.sub(r"(<Thread>)\s*(\d+):\s*", r"\1\n\2: ", text)
    want = re.sub(r"\s*</Thread>", "\n</Thread>", want)
    want = re.sub(r"</Thread>\s*<Thread>", "</Thread><Thread>", want)
    assert normalise(text) == want
    assert normalise(want) == want


def test_the_canonical_text_reads_as_it_is_meant():
    document = parse(CANONICAL)
    prose, fork, rest = document.segments
    assert prose == Prose("<think>\nI square each leg.\n")
    assert fork == ParallelBlock(
        (Outline("1", "Square 3."), Outline("2", "Square 4.")),
        (ThreadText("1", "3*3 = 9."), ThreadText("2", "4*4 = 16.")),
    )
    assert rest == Prose("\nSo the sum is 25.\n</think>\n\nIt is \\boxed{25}.")
    assert document.blocks == (fork,)
    assert render(document) == CANONICAL


def test_untidy_threads_render_as_normalise_writes_them():
    untidy = CANONICAL.replace("</Thread><Thread>", "  \n</Thread>\n\n<Thread> ").replace(
        "1: 3*3", "1:3*3"
    )
    assert untidy != CANONICAL
    assert render(parse(untidy)) == normalise(untidy) == CANONICAL


# Errors that point.


@pytest.mark.parametrize(
    ("text", "rule", "line", "column"),
    [
        ("a\n<Parallel>\n<Outlines>", "unbalanced_parallel", 3, 1),
        ("a\n<Parallel>\nb", "unbalanced_parallel", 2, 1),
        (CANONICAL.replace("</Outlines>\n", ""), "block_structure", 7, 1),
        (CANONICAL.replace("</Parallel>", ""), "unbalanced_parallel", 3, 1),
        (CANONICAL.replace("</Thread><", "<"), "unbalanced_thread", 8, 1),
        (CANONICAL.replace("2: 4*4", "4*4"), "thread_header", 10, 18),
        (CANONICAL.replace(">1: Sq", ">Sq"), "outline_header", 5, 10),
        (CANONICAL.replace("</Thread><", "</Thread>, and<"), "loose_text", 10, 10),
        (CANONICAL.replace("</Parallel>", "<Conclusion>"), "conclusion", 13, 1),
        (CANONICAL.replace("I square", "I </Thread>square"), "tag_outside_block", 2, 3),
        (CANONICAL.replace("<Outlines>", "<Parallel>"), "nested_parallel", 4, 1),
        (CANONICAL.replace("</Parallel>", "</Parallel></Parallel>"), "tag_outside_block", 13, 12),
    ],
)
def test_an_error_points_at_line_and_column(text, rule, line, column):
    with pytest.raises(GrammarError) as caught:
        parse(text)
    assert caught.value.rule == rule
    message = str(caught.value)
    assert f"\nline {line}, column {column}:\n" in message
    excerpt, caret = message.splitlines()[-2:]
    assert excerpt[caret.index("^") :][:3] == text.splitlines()[line - 1][column - 1 :][:3]


def test_an_excerpt_of_a_long_line_stays_short():
    text = "x" * 500 + "<Thread>" + "y" * 500
    place, excerpt, caret = point(text, 500).splitlines()
    assert place == "line 1, column 501:"
    assert excerpt[caret.index("^") :].startswith("<Thread>")
    assert len(excerpt) < 80


# The released checker.


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_checker_gives_the_released_verdicts(setting):
    assert len(GOLDEN) == 400
    for case in GOLDEN:
        verdict = check(case["text"], **SETTINGS[setting])
        assert verdict.ok == case[setting], case["text"]
        assert verdict.ok == (not verdict.reasons)
        assert all(0 <= reason.at <= len(case["text"]) for reason in verdict.reasons)


TWO = [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("text", "setting", "rule"),
    [
        ("no block", "require_parallel", "no_parallel"),
        ("<Parallel>", "strict", "unbalanced_parallel"),
        ("</Parallel>", "stage5", "unbalanced_parallel"),
        (block((1, "<Parallel>"), (2, "b")) + "</Parallel>", "strict", "nested_parallel"),
        (block((1, "<u>a</u>"), (2, "b")), "stage5", "unknown_tag"),
        (block((1, "a</think>"), (2, "b")), "stage5", "unknown_tag"),
        (block(*TWO, outlines=TWO[:1]), "stage5", "outlines_are_not_threads"),
        (block(*TWO).replace("</Outline>", "", 1), "stage5", "unbalanced_outline"),
        (block(*TWO).replace("</Thread>", "", 1), "stage5", "unbalanced_thread"),
        (block(*TWO, conclusion="<Conclusion>"), "stage5", "unbalanced_conclusion"),
        (block(*TWO), "require_conclusion", "not_one_conclusion"),
        (block(*((n, "a") for n in range(1, 52))), "strict", "too_many_outlines"),
        (block(*TWO, conclusion=" so 3"), "stage5", "block_structure"),
        (block(*TWO).replace("<Outlines>", ""), "stage5", "block_structure"),
        ("<Parallel></Parallel>", "stage5", "block_structure"),
        (block((1, "a"), outlines=[]), "stage5", "no_outline"),
        (block(*TWO).replace("do 1", "<thread>"), "stage5", "tag_in_outline"),
        (block(*TWO).replace("1: do 1", "do 1"), "stage5", "outline_header"),
        (block((1, "a"), (3, "b")), "stage5", "outline_numbers"),
        (block((2, "a"), (1, "b")), "stage5", "outline_numbers"),
        (block((1, "<outline>"), (2, "b")), "stage5", "tag_in_thread"),
        (block((1, ""), (2, "b")), "stage5", "thread_header"),
        (block(*TWO, outlines=[(2, ""), (1, "")]), "stage5", "thread_numbers"),
        (block(*TWO, between="\n"), "strict", "between_threads"),
        (
            block(*TWO, conclusion="\n<Conclusion> </Conclusion>"),
            "require_conclusion",
            "bad_conclusion",
        ),
    ],
)
def test_each_broken_rule_is_named(text, setting, rule):
    assert rule in rules(text, setting)


def test_the_checker_does_not_look_at_the_order_of_parallel_tags():
    assert rules("</Parallel> <Parallel>", "require_parallel") == set()
    assert not well_formed("</Parallel> <Parallel> </think>").trajectory_well_formed


def test_the_checker_takes_words_for_tags_and_other_angles_for_text():
    assert rules(block((1, "a<b, <a, b> and x<3>y"), (2, "<|im_end|>"))) == {"unknown_tag"} | (
        {"tag_in_thread"}
    )  # <3> is a word in angles
    assert rules(block((1, "a<b, <a, b>"), (2, "<|im_end|>"))) == set()


@pytest.mark.parametrize("zeros", [1, 9, 10, 4000])
def test_the_checker_accepts_numbers_with_any_padding_of_zeros(zeros):
    padded = block(*TWO).replace(">1:", f">{'0' * zeros}1:").replace("\n1:", f"\n{'0' * zeros}1:")
    assert "0" * zeros in padded
    assert rules(padded) == set()


def test_the_checker_refuses_numbers_that_python_does_not_convert():
    padded = block(*TWO).replace(">1:", f">{'9' * 5000}1:")
    assert rules(padded) == {"outline_numbers", "thread_numbers"}


def test_the_checker_accepts_a_block_of_one_thread():
    assert rules(block((1, "a"))) == set()


def test_the_checker_accepts_a_header_without_a_blank():
    assert rules(block(*TWO).replace(": ", ":")) == set()


def test_the_checker_accepts_fifty_outlines():
    assert rules(block(*((n, "a") for n in range(1, 51)))) == set()


def test_the_checker_accepts_an_empty_conclusion_only_if_it_skips_them():
    text = block(*TWO, conclusion="\n<Conclusion></Conclusion>")
    assert rules(text, "strict") == set()
    assert rules(text, "require_conclusion") == {"bad_conclusion"}
    assert rules(text.replace("></C", ">So 3.</C"), "require_conclusion") == set()


def test_the_checker_does_not_look_outside_blocks_or_beside_outlines():
    text = "</Thread> " + block(*TWO).replace("<Outlines>", "<Outlines> words") + " <Outline>"
    assert rules(text, "require_parallel") == set()
    assert not well_formed(text + "</think>").trajectory_well_formed


# Inconsistencies between the released components, each with one decision.


def test_item_1_a_newline_between_threads_is_read_dropped_and_not_well_formed():
    text = CANONICAL.replace("</Thread><", "</Thread>\n<")
    assert render(parse(text)) == normalise(text) == CANONICAL
    assert rules(text, "stage5") == set()
    assert rules(text, "strict") == {"between_threads"}
    assert well_formed(text).blocks_well_formed == 0


def test_item_2_words_between_threads_pass_stage5_but_are_no_document():
    text = CANONICAL.replace("</Thread><", "</Thread> words <")
    assert rules(text, "stage5") == set()
    assert rules(text, "strict") == {"between_threads"}
    with pytest.raises(GrammarError, match="Text before <Thread>"):
        parse(text)


def test_item_3_outlines_may_begin_with_a_blank_but_must_be_closed():
    text = CANONICAL.replace("<Outline>", "<Outline> ")
    assert render(parse(text)) == CANONICAL
    assert rules(text) == set()
    unclosed = CANONICAL.replace("</Outline>", "")
    assert "unbalanced_outline" in rules(unclosed)
    with pytest.raises(GrammarError, match="not closed before <Outline>"):
        parse(unclosed)


def test_item_4_a_conclusion_passes_the_checker_and_is_no_part_of_the_grammar():
    text = CANONICAL.replace("\n</Parallel>", "\n<Conclusion>25</Conclusion>\n</Parallel>")
    assert rules(text) == set()
    with pytest.raises(GrammarError) as caught:
        parse(text)
    assert caught.value.rule == "conclusion"
    assert histogram([well_formed(text)]) == {"conclusion": 1}


def test_item_5_lower_case_tags_are_prose_outside_blocks_and_refused_inside():
    assert rules("<parallel><thread>1</thread></parallel>") == set()
    assert parse("<thread>").blocks == ()
    assert rules(block((1, "<thread>"), (2, "b"))) == {"tag_in_thread"}


def test_item_8_dotted_numbers_are_read_and_refused_by_the_checker():
    text = block(("2.1", "a"), ("2.2", "b"))
    (read,) = parse(text).blocks
    assert [o.number for o in read.outlines] == ["2.1", "2.2"] == [t.number for t in read.threads]
    assert {"outline_header", "thread_header"} <= rules(text, "stage5")


def test_item_20_duplicate_numbers_are_read_and_refused_by_the_checker():
    text = block((1, "a"), (1, "b"))
    assert [t.body for t in parse(text).blocks[0].threads] == ["a", "b"]
    assert rules(text) == {"outline_numbers"}


def test_item_21_a_thread_closed_without_a_newline_is_read_and_passes():
    text = CANONICAL.replace("\n</Thread><", "</Thread><")
    assert rules(text) == set()
    assert render(parse(text)) == CANONICAL


def test_item_33_format_is_measured_and_not_assumed():
    texts = [CANONICAL, "no thought", "a</think>b", CANONICAL.replace("</Thread><", "<")]
    reports = [well_formed(text) for text in texts]
    assert [r.has_block for r in reports] == [True, False, False, True]
    assert [r.trajectory_well_formed for r in reports] == [True, False, True, False]
    assert [(r.blocks, r.blocks_well_formed) for r in reports] == [(1, 1), (0, 0), (0, 0), (1, 0)]
    counts = histogram(reports)
    assert counts["no_think_end"] == 1
    assert counts["unbalanced_thread"] == 1


# Our own verdict.


@pytest.mark.parametrize(
    ("text", "only"),
    [
        (CANONICAL.replace("I square", "<Outline>"), "tag_outside_block"),
        (CANONICAL + "</Parallel>", "unbalanced_parallel"),
        (CANONICAL.replace("</think>", ""), "no_think_end"),
        ("</think>" + CANONICAL.replace("</think>", ""), "no_think_end"),
        (CANONICAL.replace("<Outlines>", "<Outlines> words"), "loose_text"),
    ],
)
def test_what_the_checker_overlooks_is_reported(text, only):
    assert only in histogram([well_formed(text)])


def test_one_bad_block_does_not_spoil_the_others():
    bad = CANONICAL.replace("2: 4*4", "3: 4*4").replace("<think>", "").replace("</think>", "")
    report = well_formed(bad + CANONICAL)
    assert (report.blocks, report.blocks_well_formed) == (2, 1)
    assert [reason.rule for reason in report.reasons] == ["thread_numbers"]


def test_a_text_cut_off_in_a_block_lacks_the_end_of_both():
    for stop in range(CANONICAL.index("<Parallel>") + 10, CANONICAL.index("</Parallel>")):
        report = well_formed(CANONICAL[:stop])
        assert {r.rule for r in report.reasons} == {"unbalanced_parallel", "no_think_end"}
        assert (report.blocks, report.blocks_well_formed) == (1, 0)


def test_a_well_formed_trajectory_can_be_parsed():
    accepted = 0
    for case in GOLDEN:
        if well_formed(case["text"]).trajectory_well_formed:
            parse(case["text"])
            assert case["strict"]
            accepted += 1
    assert accepted > 30


@pytest.mark.parametrize(
    "unit",
    [
        " ",
        "\n",
        "<",
        "<a",
        "1",
        "1.",
        "<Parallel>",
        "<Parallel><Outlines>",
        "<Parallel></Parallel>",
        "<Outlines>",
        "</Outlines> ",
        "<Outline>",
        "<Thread>",
        "</Thread>",
        "</Thread> ",
        "<Thread>\n1: ",
        "<Thread> 1",
        "<Conclusion>",
        "</Parallel>",
    ],
)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("<Parallel>\n<Outlines>\n<Outline>1", "</Thread></Parallel>"),
        ("<Parallel><Outlines><Outline>1: a</Outline></Outlines><Thread>1", "</Parallel>"),
    ],
)
def test_hostile_texts_are_judged_in_linear_time(unit, before, after):
    text = before + unit * (50_000 // len(unit)) + after
    for judge in (functools.partial(check, **SETTINGS["strict"]), well_formed, normalise, parse):
        start = time.process_time()
        with contextlib.suppress(GrammarError):
            judge(text)
        assert time.process_time() - start < 1.0
