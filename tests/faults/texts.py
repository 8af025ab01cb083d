"""Hostile texts through records, grammar, replay, tries and grader.

Each function may refuse a text with the exception and the message that its callers expect. Other
results are findings: another exception, a hang, a result that contradicts a docstring, or a wrong
answer that is graded correct.
"""

import faulthandler
import fractions
import functools
import json
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faults.findings import Finding, Hang, deadline
from faults.hostile import Hostile, hostile

from tw_jax.data.pipeline import Builder, Data
from tw_jax.data.records import Example, Record, open_records
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver import grammar
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.tasks import answers
from tw_jax.tasks.grader import Grader, GraderPool
from tw_jax.tasks.task import Problem
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.load import load_tokenizer

CPU_SECONDS = 2.0
"""CPU time after which a text counts as a hang."""
WALL_SECONDS = 300.0
"""Wall time after which a text counts as a hang. A worker of the grader may need 120 to start."""
RECORDS = 5
"""One of this many texts is also read from a file of records."""
SHARE_SECONDS = 1800.0
"""After this time a share of texts hangs where no signal is handled, and its process is ended."""
MATHEMATICS = 100
"""One of this many texts is also graded in mode "mathematics"."""
AGAIN = "PYTHONPATH=tests python -m faults --kills 0 --damages 0"
"""Start of the command that runs a text again."""
LOCATED = re.compile(r"^line \d+, column \d+:$", re.MULTILINE)


class Texts:
    """Runs texts one by one, and counts the results."""

    def __init__(self, number: GraderPool, mathematics: GraderPool) -> None:
        """`number` and `mathematics`: pools of these modes."""
        self.counts: Counter[str] = Counter()
        self._pools = {"number": number, "mathematics": mathematics}
        tokenizer = load_tokenizer(Bytes())
        data = Data(path="unused", chat=Chat(template="plain"))
        limits = ForkJoin(max_context=8192, max_new=8192, max_thread=2048)
        protocol = ThreadWeaver(make_table(tokenizer), limits)
        self._builder = Builder(data, tokenizer, protocol)
        self._tokenizer, self._chat = tokenizer, data.chat

    def judge(self, text: Hostile, *, mathematics: bool) -> None:
        """Runs one text through all functions.

        Raises:
          AssertionError: If a result contradicts a docstring.
          Exception: If a function raises an exception that its callers do not expect.
        """
        with deadline(CPU_SECONDS, WALL_SECONDS):
            is_document = self._grammar(text.response)
            self._replay(text, is_document)
            self._number(text)
            if mathematics:
                self._mathematics(text)

    def _grammar(self, response: str) -> bool:
        try:
            document = grammar.parse(response)
        except grammar.GrammarError as error:
            assert LOCATED.search(str(error)), f"no place in {error}"
            document = None
        self.counts["document" if document else "no_document"] += 1
        if document is not None:
            again = grammar.parse(grammar.render(document))
            assert again == document, "parse(render(d)) is not d"
        for strict in (True, False):
            verdict = grammar.check(
                response,
                treat_no_parallel_as_error=strict,
                allow_between_threads=not strict,
                skip_conclusion=strict,
            )
            assert all(0 <= reason.at <= len(response) for reason in verdict.reasons)
            self.counts["check_ok" if verdict.ok else "check_broken"] += strict
        report = grammar.well_formed(response)
        assert document is not None or not report.trajectory_well_formed
        assert 0 <= report.blocks_well_formed <= report.blocks
        self.counts["well_formed"] += report.trajectory_well_formed
        normal = grammar.normalise(response)
        assert grammar.normalise(normal) == normal, "normalise twice is not normalise once"
        return document is not None

    def _replay(self, text: Hostile, is_document: bool) -> None:
        where = "hostile.jsonl:1"
        try:
            example = Example("x", text.question, text.response, text.truth, "hostile")
        except ValueError as error:
            assert "surrogate" in str(error), f"no reason in {error}"
            self.counts["no_record"] += 1
            return
        try:
            trajectory = self._builder.trajectory(example, where)
        except ValueError as error:
            assert str(error).startswith(f"{where}: "), f"no place in {error}"
            self.counts["unusable"] += 1
            return
        self.counts["replayed"] += 1
        assert is_document, "replay took what parse refuses"
        ids = self._chat.document(self._tokenizer, text.question, text.response)
        assert np.array_equal(trajectory.ids, ids), "the trajectory is not the text"
        trie = self._builder.trie(example, where)
        assert trie.weight.any(), "nothing of the text is trained"

    def _number(self, text: Hostile) -> None:
        for where in ("after_thinking", "anywhere"):
            answers.final_answer(text.response, where=where)
        verdict = self._pools["number"].grade(_problem(text), text.response)
        assert verdict in ("correct", "wrong", "no_answer"), f"the verdict is {verdict}"
        self.counts[f"number_{verdict}"] += 1
        if verdict != "correct":
            return
        assert text.wrong is None, "a wrong answer is graded correct"
        given = answers.final_answer(text.response, where="after_thinking")
        assert given is not None
        assert may_be(given, int(text.truth)), f"{given!r} is graded correct for {text.truth}"

    def _mathematics(self, text: Hostile) -> None:
        verdict = self._pools["mathematics"].grade(_problem(text), text.response)
        assert verdict in ("correct", "wrong", "no_answer", "timeout")
        self.counts[f"mathematics_{verdict}"] += 1
        is_wrong = verdict == "correct" and text.wrong == "value"
        assert not is_wrong, "another value is graded correct in mathematics mode"


def _problem(text: Hostile) -> Problem:
    return Problem(id="x", question="", answer=text.truth)


_TERM = r"(\d*)(?:\.(\d*))?(?:[eE]\+?(\d{1,4}))?"
_VALUE = re.compile(rf"(-?){_TERM}(?:/{_TERM})?%?")


def may_be(answer: str, truth: int) -> bool:
    """Whether a text may be a number that equals `truth`, independently of the grader.

    It leaves out what can stand around a number, and reads the rest as a decimal, with or without a
    power of ten, or as a fraction of two. What percent means is left to the grader.
    """
    text = answer.replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"\\text\{[^{}0-9]*\}|\\left|\\right|\\displaystyle|\\mathrm\{[^{}]*\}", "", text)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\[,:;!\s]|[~$\s{}_]", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"\\+(?=%)|[\\.]+$|^\+", "", text)
    value = _VALUE.fullmatch(text)
    if value is None or len(text) > 4000 or not text.strip("-.%"):
        return False
    top, below = _fraction(*value.groups()[1:4]), _fraction(*value.groups()[4:])
    below = below if "/" in text else fractions.Fraction(1)
    return bool(below) and (-top if value[1] else top) / below == truth


def _fraction(whole: str | None, decimals: str | None, power: str | None) -> fractions.Fraction:
    decimals = decimals or ""
    digits = int((whole or "") + decimals or "0")
    return digits * fractions.Fraction(10) ** (int(power or 0) - len(decimals))


def judge_share(
    seed: int, first: int, stop: int, folder: Path
) -> tuple[Counter[str], list[Finding]]:
    """`judge_range` in a process of its own."""
    faulthandler.dump_traceback_later(SHARE_SECONDS, exit=True)
    try:
        return judge_range(seed, first, stop, folder)
    finally:
        faulthandler.cancel_dump_traceback_later()


def judge_range(
    seed: int, first: int, stop: int, folder: Path
) -> tuple[Counter[str], list[Finding]]:
    """Judges texts [first, stop) of a seed; returns the counts and the findings."""
    findings: list[Finding] = []
    with (
        GraderPool(Grader(workers=1, mode="number")) as number,
        GraderPool(Grader(workers=1, item_seconds=1.0, mode="mathematics")) as mathematics,
    ):
        texts = Texts(number, mathematics)
        for at in range(first, stop):
            again = f"{AGAIN} --seed {seed} --texts {at}:{at + 1}"
            text = hostile(seed, at)
            use = at % MATHEMATICS == 0
            _caught(findings, again, functools.partial(texts.judge, text, mathematics=use))
        again = f"{AGAIN} --seed {seed} --texts {first}:{stop}"
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".jsonl") as file:
            for at in range(first, stop, RECORDS):
                line = _line(random.Random(f"{seed} line {at}"), hostile(seed, at))
                file.write(line + b"\n")
            file.flush()
            records = open_records(file.name)
            for at in range(len(records)):
                read = functools.partial(_read_record, records, at, file.name, texts.counts)
                _caught(findings, f"{again}, record {at}", read)
    texts.counts["texts"] = stop - first
    return texts.counts, findings


def _read_record(records: Sequence[Record], at: int, name: str, counts: Counter[str]) -> None:
    try:
        with deadline(CPU_SECONDS, WALL_SECONDS):
            record = records[at]
    except ValueError as error:
        assert str(error).startswith(f"{name}:"), f"no place in {error!r}"
        counts["lines_refused"] += 1
    else:
        record.question.encode()
        counts["lines_read"] += 1


def _line(rng: random.Random, text: Hostile) -> bytes:
    row: dict[str, Any] = {"id": "x", "question": text.question, "response": text.response}
    row |= {"answer": text.truth, "task": "hostile"}
    if (odd := rng.random()) < 0.1:
        row[rng.choice([*row])] = rng.choice((None, 1, 1.5, True, [], {}, [text.truth], "\ud800"))
    data = bytearray(json.dumps(row).encode())
    at = rng.randrange(len(data))
    if odd > 0.9:
        data[at] = rng.randrange(256)
    elif odd > 0.85:
        del data[at:]
    elif odd > 0.82:
        data[at:at] = rng.choice(
            (b"[" * 100_000, b"\xff\xfe", b"NaN", b'{"a":' * 5000, b"9" * 5000)
        )
    return bytes(data)


def _caught(findings: list[Finding], again: str, work: Callable[[], object]) -> None:
    try:
        work()
    except (Exception, Hang) as error:
        findings.append(Finding("silent", f"{type(error).__name__}: {error}"[:300], again))
        if len(findings) <= 20:
            print(f"faults: {again}\n{traceback.format_exc()}", file=sys.stderr)
