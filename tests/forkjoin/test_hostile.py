"""Mutated trajectories through checker, parser and replay: each ends in a result or a sentence."""

import random
import time

import pytest

from tw_jax.data.pipeline import Builder, Data
from tw_jax.data.records import Example
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.grammar import (
    GrammarError,
    check,
    normalise,
    parse,
    point,
    render,
    well_formed,
)
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.load import load_tokenizer

TOKENIZER = load_tokenizer(Bytes())
PROTOCOL = ThreadWeaver(make_table(TOKENIZER), ForkJoin())
BUILDER = Builder(Data(path="x", chat=Chat(template="plain")), TOKENIZER, PROTOCOL)
BLOCK = (
    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
    "<Thread>\n1: c\n</Thread><Thread>\n2: d\n</Thread>\n</Parallel>"
)
TAGS = [
    f"<{slash}{name}>"
    for name in ("Parallel", "Outlines", "Outline", "Thread", "Conclusion", "think", "3")
    for slash in ("", "/")
]
ODD = [
    *("\0", "\ud800", "\u0663", "\u00b2", "\u2028", "\u3000", "\x1c", "\u4e58", "\r", " ", "\n"),
    *(":", "1", "12", "1.2.3", "1.", "<", "</", "\n1: ", "0" * 12 + "1", "0" * 4400 + "1"),
    "9" * 5000,
]


def mutate(text: str, rng: random.Random) -> str:
    """A text with a few cuts, insertions, repetitions and swapped tags."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        first = rng.randrange(len(text) + 1)
        last = min(len(text), first + rng.choice((1, 3, 10, 60)))
        match rng.randrange(6):
            case 0:
                text = text[:first] + text[last:]
            case 1:
                text = text[:first] + rng.choice(TAGS + ODD) + text[first:]
            case 2:
                text = text[:first] + text[first:last] * rng.choice((2, 3, 50)) + text[last:]
            case 3:
                text = text[:first] + BLOCK + text[first:]
            case 4:
                number = rng.choice("12")
                text = text.replace(f"{number}:", f"{rng.choice(ODD)}:", rng.choice((1, 9)))
            case _:
                text = text.replace(rng.choice(TAGS), rng.choice(["", *TAGS]), rng.choice((1, 9)))
    return text


def test_mutated_trajectories_end_in_a_result_or_a_sentence():
    rng, parsed, replayed = random.Random(0), 0, 0
    messages: list[tuple[type, int]] = []
    for _ in range(1500):
        text = mutate(BLOCK + "\nb\n</think>" + BLOCK * rng.randrange(2), rng)
        for between in (True, False):
            check(
                text,
                treat_no_parallel_as_error=between,
                allow_between_threads=between,
                skip_conclusion=between,
            )
        report = well_formed(text)
        assert all(point(text, reason.at) for reason in report.reasons)
        assert normalise(normalise(text)) == normalise(text)
        try:
            document = parse(text)
            assert parse(render(document)) == document
            parsed += 1
        except GrammarError:
            assert not report.trajectory_well_formed
        try:
            BUILDER.trajectory(
                Example(id="a", question="q", response=text, answer="", task=""), "x:1"
            )
            replayed += 1
        except ValueError as error:
            messages.append((type(error), len(str(error))))
    assert parsed > replayed > 50
    assert {kind for kind, _ in messages} == {ValueError}
    assert max(length for _, length in messages) < 1000


@pytest.mark.parametrize("unit", ["a", "\0", BLOCK, "<Parallel><Outlines></Outlines></Parallel>"])
def test_a_megabyte_is_judged_and_replayed_in_a_moment(unit):
    text = unit * (1_000_000 // len(unit))
    example = Example(id="a", question="q", response=text, answer="", task="")
    start = time.process_time()
    well_formed(text)
    with pytest.raises(ValueError, match=r"^x:1: "):
        BUILDER.trajectory(example, "x:1")
    assert time.process_time() - start < 10
