r"""The text of a ThreadWeaver trajectory: parse it, render it, normalise it, judge it.

    document := prose (block prose)*
    block    := <Parallel>\n<Outlines>\n outline+ </Outlines>\n thread+ \n</Parallel>
    outline  := <Outline>1: text</Outline>\n
    thread   := <Thread>\n1: body\n</Thread>          nothing between two threads

Blocks never nest. There are three readers. `parse` requires the structure and forgives blanks,
numbering and empty bodies. `check` is the strict checker of the released data pipeline, rule by
rule, with its options and its gaps. `well_formed` requires both, and that the text is finished.
Every scan is linear in the text, because the texts come from models. This file works on text only:
it returns documents, and reasons with places in the text.
Source: ThreadWeaver (arXiv:2512.07843), trajectory format.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, NoReturn

MAX_OUTLINES = 50
"""More outlines than this in a block break rule `too_many_outlines`."""

Rule = Literal[
    # Of the whole text.
    "no_parallel",
    "unbalanced_parallel",
    # Of one block.
    "nested_parallel",
    "unknown_tag",
    "outlines_are_not_threads",
    "unbalanced_outline",
    "unbalanced_thread",
    "unbalanced_conclusion",
    "not_one_conclusion",
    "too_many_outlines",
    "block_structure",
    "no_outline",
    "tag_in_outline",
    "outline_header",
    "outline_numbers",
    "tag_in_thread",
    "thread_header",
    "thread_numbers",
    "between_threads",
    "bad_conclusion",
    # Of `parse` and `well_formed` alone.
    "tag_outside_block",
    "loose_text",
    "conclusion",
    "no_think_end",
]
"""Names of the faults of a text, in the reports of `parse`, `check` and `well_formed`."""

_TAG = re.compile(r"</?(?:Parallel|Outlines|Outline|Thread|Conclusion)>")
_ANY_TAG = re.compile(r"</?(\w+)>")
_HEADER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)*)\s*:")
_EXCERPT = 72

# Patterns of the checker, which treats blanks, digits and tags in its own way.
_CHECKED_HEADER = re.compile(r"(\d+):\s*(.+)", re.DOTALL)
_OPENING = re.compile(r"\s*<Outlines>")
_CLOSING = re.compile(r"</Outlines>\s*(?=<Thread>)")
_CONCLUDING = re.compile(r"</Thread>\s*<Conclusion>")
_KNOWN_NAMES = frozenset(("outlines", "outline", "thread", "conclusion"))
_EQUAL_COUNTS: tuple[tuple[Rule, str, str], ...] = (
    ("outlines_are_not_threads", "<Outline>", "<Thread>"),
    ("unbalanced_outline", "<Outline>", "</Outline>"),
    ("unbalanced_thread", "<Thread>", "</Thread>"),
    ("unbalanced_conclusion", "<Conclusion>", "</Conclusion>"),
)


# The document.


@dataclasses.dataclass(frozen=True)
class Prose:
    """Text outside blocks, unchanged. `at`: its [start, stop) characters."""

    text: str
    at: tuple[int, int] = dataclasses.field(default=(0, 0), compare=False)


@dataclasses.dataclass(frozen=True)
class Outline:
    """The task of one thread. `number` as written, "2" or "2.1"; `text` without outer blanks."""

    number: str
    text: str
    at: tuple[int, int] = dataclasses.field(default=(0, 0), compare=False)


@dataclasses.dataclass(frozen=True)
class ThreadText:
    """The text of a thread. `number` as written; `body` after its header, without outer blanks."""

    number: str
    body: str
    at: tuple[int, int] = dataclasses.field(default=(0, 0), compare=False)


@dataclasses.dataclass(frozen=True)
class ParallelBlock:
    """One fork and join. `at` runs from `<Parallel>` to past `</Parallel>`."""

    outlines: tuple[Outline, ...]
    threads: tuple[ThreadText, ...]
    at: tuple[int, int] = dataclasses.field(default=(0, 0), compare=False)


@dataclasses.dataclass(frozen=True)
class Document:
    """Prose and blocks in reading order; comparisons ignore positions (`at`)."""

    segments: tuple[Prose | ParallelBlock, ...]

    @property
    def blocks(self) -> tuple[ParallelBlock, ...]:
        """The blocks alone."""
        return tuple(s for s in self.segments if isinstance(s, ParallelBlock))


class GrammarError(ValueError):
    """The text is not a document.

    Attributes:
      rule: the name of what it breaks.
      at: the character where.
    """

    def __init__(self, text: str, at: int, rule: Rule, sentence: str):
        """Joins the sentence with line, column and excerpt."""
        super().__init__(f"{sentence}\n{point(text, at)}")
        self.rule: Rule = rule
        self.at = at


def point(text: str, at: int) -> str:
    """Line, column and excerpt of a character, with a caret under it; both count from 1."""
    first = text.rfind("\n", 0, at) + 1
    last = text.find("\n", at)
    last = len(text) if last < 0 else last
    line, column = text.count("\n", 0, at) + 1, at - first + 1
    start = max(first, at - _EXCERPT // 2)
    excerpt = text[start : min(last, start + _EXCERPT)].replace("\t", " ")
    return f"line {line}, column {column}:\n  {excerpt}\n  {' ' * (at - start)}^"


def render(document: Document) -> str:
    """Writes a document in the canonical form, the one that inference produces."""
    return "".join(
        segment.text if isinstance(segment, Prose) else render_block(segment)
        for segment in document.segments
    )


def render_block(block: ParallelBlock) -> str:
    """Writes one block, without a newline before or after it."""
    outlines = "".join(f"<Outline>{_headed(o.number, o.text)}</Outline>\n" for o in block.outlines)
    threads = "".join(f"<Thread>\n{_headed(t.number, t.body)}\n</Thread>" for t in block.threads)
    return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>"


def _headed(number: str, text: str) -> str:
    return f"{number}: {text}" if text else f"{number}:"


def normalise(text: str) -> str:
    r"""Brings threads to the canonical form and leaves all other text unchanged.

    Three substitutions: `<Thread>`, blanks, `n:`, blanks becomes `<Thread>\nn: `; blanks before
    `</Thread>` become one newline; blanks between two threads go. Applying it twice changes nothing
    more. Source: the sanitiser of ThreadWeaver's dataset writer.
    """
    text = re.sub(r"<Thread>\s*(\d+):\s*", r"<Thread>\n\1: ", text)
    # Not `\s*</Thread>`: on a long run of blanks that pattern is quadratic.
    *bodies, rest = text.split("</Thread>")
    text = "".join(f"{body.rstrip()}\n</Thread>" for body in bodies) + rest
    return re.sub(r"</Thread>\s*<Thread>", "</Thread><Thread>", text)


# Parsing.


def parse(text: str) -> Document:
    """Reads prose and blocks; forgives blanks at the edges of tags, numbering and empty bodies.

    For every document d, `parse(render(d)) == d`; for every canonical text t, `render(parse(t)) ==
    t`; otherwise `render(parse(t))` is t made canonical.

    Args:
      text: a response or a whole document. `<think>` and other tags that are not of the block
        grammar are prose; inside a block they belong to the outline or thread around them.

    Raises:
      GrammarError: the first place that cannot be read: an unclosed block, a tag out of place, text
        between threads, a missing header, or a `<Conclusion>`, which this grammar does not have.
    """
    return Document(tuple(_Reader(text).segments()))


class _Reader:
    """A cursor over tags; `at` is the first character not yet read."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def segments(self) -> Iterator[Prose | ParallelBlock]:
        while (tag := _TAG.search(self.text, self.at)) is not None:
            if tag[0] != "<Parallel>":
                self.fail(tag.start(), "tag_outside_block", f"{tag[0]} is outside a block.")
            if tag.start() > self.at:
                yield Prose(self.text[self.at : tag.start()], (self.at, tag.start()))
            self.at = tag.end()
            yield self.block(tag.start())
        if self.at < len(self.text):
            yield Prose(self.text[self.at :], (self.at, len(self.text)))

    def block(self, start: int) -> ParallelBlock:
        opened = (start, "<Parallel>")
        self.next_of(opened, ("<Outlines>",), "unbalanced_parallel")
        outlines, threads = [], []
        opened_outlines = (self.at - len("<Outlines>"), "<Outlines>")
        wanted = ("<Outline>", "</Outlines>")
        while self.next_of(opened_outlines, wanted, "unbalanced_parallel") == "<Outline>":
            number, text, at = self.element("Outline", "unbalanced_outline", "outline_header")
            outlines.append(Outline(number, text, at))
        wanted = ("<Thread>", "</Parallel>")
        while self.next_of(opened, wanted, "unbalanced_parallel") == "<Thread>":
            number, text, at = self.element("Thread", "unbalanced_thread", "thread_header")
            threads.append(ThreadText(number, text, at))
        return ParallelBlock(tuple(outlines), tuple(threads), (start, self.at))

    def next_of(self, opened: tuple[int, str], wanted: tuple[str, ...], unclosed: Rule) -> str:
        """Reads blanks and one of the wanted tags, inside the element that was opened."""
        tag = _TAG.search(self.text, self.at)
        if tag is None:
            start, name = opened
            self.fail(
                start, unclosed, f"{name} is never closed. {' or '.join(wanted)} must follow."
            )
        loose = self.text[self.at : tag.start()]
        if loose and not loose.isspace():
            at = self.at + len(loose) - len(loose.lstrip())
            self.fail(
                at,
                "loose_text",
                f"Text before {tag[0]}. Only {' or '.join(wanted)} may be here.",
            )
        if tag[0] not in wanted:
            rule: Rule = "conclusion" if "Conclusion" in tag[0] else "block_structure"
            rule = "nested_parallel" if tag[0] == "<Parallel>" else rule
            self.fail(
                tag.start(), rule, f"{tag[0]} is out of place. It must be {' or '.join(wanted)}."
            )
        self.at = tag.end()
        return tag[0]

    def element(self, name: str, unclosed: Rule, header: Rule) -> tuple[str, str, tuple[int, int]]:
        """Reads `n: text` and the closing tag; returns number, text and place."""
        start = self.at - len(f"<{name}>")
        tag = _TAG.search(self.text, self.at)
        if tag is None or tag[0] != f"</{name}>":
            found = "the end of the text" if tag is None else tag[0]
            self.fail(start, unclosed, f"<{name}> is not closed before {found}. Add </{name}>.")
        number = _HEADER.match(self.text, self.at, tag.start())
        if number is None:
            self.fail(self.at, header, f"<{name}> has no number. Write `1: ` after the tag.")
        text = self.text[number.end() : tag.start()].strip()
        self.at = tag.end()
        return number[1], text, (start, self.at)

    def fail(self, at: int, rule: Rule, sentence: str) -> NoReturn:
        raise GrammarError(self.text, at, rule, sentence)


# Judging.


@dataclasses.dataclass(frozen=True)
class Reason:
    """One broken rule, and the character where it shows; see `point`."""

    rule: Rule
    at: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of `check`, by block, and within a block in the order of the rules."""

    reasons: tuple[Reason, ...]

    @property
    def ok(self) -> bool:
        """Whether no rule is broken."""
        return not self.reasons


@dataclasses.dataclass(frozen=True)
class FormatReport:
    """The result of `well_formed`.

    Attributes:
      blocks: Number of `<Parallel>` tags.
      blocks_well_formed: Number of blocks that can be read and break no rule.
      reasons: All faults of the trajectory, in its blocks and elsewhere.
    """

    blocks: int
    blocks_well_formed: int
    reasons: tuple[Reason, ...]

    @property
    def has_block(self) -> bool:
        """Whether the text has a block, well-formed or not."""
        return self.blocks > 0

    @property
    def trajectory_well_formed(self) -> bool:
        """Whether there are no faults. A finished text without blocks has none."""
        return not self.reasons


def check(
    text: str,
    *,
    treat_no_parallel_as_error: bool,
    allow_between_threads: bool,
    skip_conclusion: bool,
) -> Verdict:
    """The strict format checker of ThreadWeaver's data pipeline, with a reason for each rule.

    Its gaps are kept, so that results can be compared: tags outside blocks, text beside the
    outlines and the order of `</Parallel>` and `<Parallel>` are not checked, and a block of one
    thread passes. `well_formed` checks the first three. If there is a conclusion, it must follow
    the threads under every setting. Source: ThreadWeaver (arXiv:2512.07843), data filter.

    Args:
      text: The text to check.
      treat_no_parallel_as_error: Whether a text without blocks fails.
      allow_between_threads: Whether anything, words included, may be between two threads.
      skip_conclusion: Whether to skip the rule that a block has exactly one conclusion with text
        and without tags.
    """
    reasons: list[Reason] = []
    opened, closed = text.count("<Parallel>"), text.count("</Parallel>")
    if treat_no_parallel_as_error and not (opened and closed):
        reasons.append(Reason("no_parallel", 0))
    if opened != closed:
        odd = "<Parallel>" if opened > closed else "</Parallel>"
        reasons.append(Reason("unbalanced_parallel", text.rfind(odd)))
    for block in _elements(text, "Parallel", 0, len(text)):
        broken = _judge_block(block.content, allow_between_threads, skip_conclusion)
        reasons += [Reason(reason.rule, block.at + reason.at) for reason in broken]
    return Verdict(tuple(reasons))


def well_formed(text: str) -> FormatReport:
    """Judges a whole trajectory more strictly than `check` does, for evaluation.

    A block is well-formed if `parse` reads it and `check` finds nothing, text between threads
    included. A trajectory is well-formed if all its blocks are, no tag stands outside them, and its
    thoughts end after the last one. Then `parse` reads it. Blocks are not required.

    Args:
      text: a response, or a prompt and its response.
    """
    strict = check(
        text, treat_no_parallel_as_error=False, allow_between_threads=False, skip_conclusion=True
    )
    reasons = list(strict.reasons)
    stops, good = [0], 0
    for block in _elements(text, "Parallel", 0, len(text)):
        broken = next(_judge_block(block.content, False, True), None)
        good += not broken and _unreadable(text[block.start : block.stop]) is None
        if stray := _TAG.search(text, stops[-1], block.start):
            reasons.append(Reason("tag_outside_block", stray.start()))
        stops.append(block.stop)
    unclosed = text.find("<Parallel>", stops[-1])
    if stray := _TAG.search(text, stops[-1], unclosed if unclosed >= 0 else len(text)):
        reasons.append(Reason("tag_outside_block", stray.start()))
    if not reasons and (unreadable := _unreadable(text)):
        reasons.append(unreadable)
    if max(text.rfind("</think>"), text.rfind("</Think>")) < max(text.rfind("</Parallel>"), 0):
        reasons.append(Reason("no_think_end", len(text)))
    return FormatReport(text.count("<Parallel>"), good, tuple(reasons))


def histogram(reports: Iterable[FormatReport]) -> dict[Rule, int]:
    """The number of trajectories that break each rule, the most frequent rule first."""
    counts: Counter[Rule] = Counter()
    for report in reports:
        counts.update({reason.rule for reason in report.reasons})
    return dict(counts.most_common())


class _Element(NamedTuple):
    """One `<Name>...</Name>`: its content and where that begins, and its [start, stop)."""

    content: str
    at: int
    start: int
    stop: int


def _elements(text: str, name: str, start: int, stop: int) -> Iterator[_Element]:
    """Every shortest element of a name within [start, stop), from left to right."""
    opening, closing = f"<{name}>", f"</{name}>"
    while (opened := text.find(opening, start, stop)) >= 0:
        at = opened + len(opening)
        closed = text.find(closing, at, stop)
        if closed < 0:
            return
        start = closed + len(closing)
        yield _Element(text[at:closed], at, opened, start)


def _unreadable(text: str) -> Reason | None:
    try:
        parse(text)
    except GrammarError as error:
        return Reason(error.rule, error.at)
    return None


def _judge_block(
    inner: str, allow_between_threads: bool, skip_conclusion: bool
) -> Iterator[Reason]:
    """The rules of one block; positions count from the end of `<Parallel>`."""
    yield from _judge_counts(inner, skip_conclusion)
    parts = _split(inner)
    if parts is None:
        yield Reason("block_structure", 0)
        return
    threads_start, threads_stop, conclusion = parts
    outlines = list(_elements(inner, "Outline", 0, threads_start))
    threads = list(_elements(inner, "Thread", threads_start, threads_stop))
    if not outlines:
        yield Reason("no_outline", 0)
    yield from _judge_items(outlines, "tag_in_outline", "outline_header")
    yield from _judge_items(threads, "tag_in_thread", "thread_header")
    planned, done = [_number(o) for o in outlines], [_number(t) for t in threads]
    if planned != list(range(1, len(outlines) + 1)):
        yield Reason("outline_numbers", 0)
    if done != planned:
        yield Reason("thread_numbers", threads_start)
    between = [a.stop for a, b in itertools.pairwise(threads) if a.stop != b.start]
    if between and not allow_between_threads:
        yield Reason("between_threads", between[0])
    if conclusion is not None and not skip_conclusion:
        text = inner[conclusion:].rstrip().removesuffix("</Conclusion>")
        if not text.strip() or _ANY_TAG.search(text):
            yield Reason("bad_conclusion", conclusion)


def _judge_counts(inner: str, skip_conclusion: bool) -> Iterator[Reason]:
    """The rules that count tags and do not look at their order."""
    if (nested := inner.find("<Parallel>")) >= 0:
        yield Reason("nested_parallel", nested)
    tags = _ANY_TAG.finditer(inner)
    if unknown := next((t for t in tags if t[1].lower() not in _KNOWN_NAMES), None):
        yield Reason("unknown_tag", unknown.start())
    for rule, one, other in _EQUAL_COUNTS:
        if inner.count(one) != inner.count(other):
            yield Reason(rule, 0)
    if not skip_conclusion and inner.count("<Conclusion>") != 1:
        yield Reason("not_one_conclusion", 0)
    if inner.count("<Outline>") > MAX_OUTLINES:
        yield Reason("too_many_outlines", 0)


def _split(inner: str) -> tuple[int, int, int | None] | None:
    """Start and stop of a block's threads, and the start of the text of its conclusion.

    The outlines end at the first `</Outlines>` that a `<Thread>` follows. None if this is no block.
    """
    end = len(inner.rstrip())
    opening = _OPENING.match(inner)
    closing = _CLOSING.search(inner, opening.end()) if opening else None
    if closing is None:
        return None
    conclusion = None
    if "<Conclusion>" in inner:
        concluding = _CONCLUDING.search(inner, closing.end())
        if concluding is None or not inner.endswith("</Conclusion>", concluding.end(), end):
            return None
        end, conclusion = concluding.start() + len("</Thread>"), concluding.end()
    if not inner.endswith("</Thread>", closing.end() + len("<Thread>"), end):
        return None
    return closing.end(), end, conclusion


def _judge_items(items: list[_Element], tag: Rule, header: Rule) -> Iterator[Reason]:
    """The rules of single outlines or threads."""
    for item in items:
        if found := _ANY_TAG.search(item.content):
            yield Reason(tag, item.at + found.start())
        if not _CHECKED_HEADER.fullmatch(item.content.strip()):
            yield Reason(header, item.at)


def _number(item: _Element) -> int | None:
    """The number of an item as its value, "007" as 7; None without a header.

    A number of thousands of digits is None as well: Python does not convert it, and the released
    checker ends in an error there.
    """
    header = _CHECKED_HEADER.fullmatch(item.content.strip())
    try:
        return int(header[1]) if header else None
    except ValueError:
        return None
