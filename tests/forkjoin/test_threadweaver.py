"""ThreadWeaver's decisions: every way in which a rollout can go wrong, decided and counted."""

import re

import fakes
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tw_jax.forkjoin.calls import Provenance, StopReason
from tw_jax.forkjoin.engine import Chunk
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.orchestrator import run
from tw_jax.forkjoin.table import MAX_LABEL, decode_label, encode_label
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table

TOKENIZER = fakes.Characters(extra=("12", " 3", "4:", ".5"))
TABLE = make_table(TOKENIZER)


def weaver(**limits) -> ThreadWeaver:
    return ThreadWeaver(TABLE, ForkJoin(**limits))


class Script:
    """An engine that answers parents in order and threads by label, and keeps the requests."""

    def __init__(self, parents, threads=None, failing=()):
        self.parents, self.threads, self.failing = list(parents), threads or {}, failing
        self.requests = []

    async def generate(self, request):
        self.requests.append(request)
        text = self.threads[request.path[1]] if request.path else self.parents.pop(0)
        ids = TOKENIZER.encode(text)[: request.max_tokens]
        yield Chunk(ids, failed=bool(request.path) and request.path[1] in self.failing)


def outlines(*labels: str) -> str:
    inner = "".join(f"<Outline>{label}: a</Outline>\n" for label in labels)
    return f"ab\n<Parallel>\n<Outlines>\n{inner}</Outlines>"


def rollout(parents, threads=None, failing=(), prompt="abc", **limits):
    engine = Script(parents, threads, failing)
    return run(weaver(**limits), engine, TOKENIZER.encode(prompt)), engine


def text(ids) -> str:
    return TOKENIZER.decode(ids)


def test_the_canonical_trace_has_exactly_the_forced_pieces():
    threads = {"1": " aa\n</Thread>", "2": " bb\n</Thread>"}
    made, engine = rollout([outlines("1", "2"), "</Parallel>\nc<eos>"], threads)
    head = "abc" + outlines("1", "2")
    assert [text(q.context) for q in engine.requests] == [
        "abc",
        head + "\n<Thread>\n1:",
        head + "\n<Thread>\n2:",
        head + "\n<Thread>\n1: aa\n</Thread><Thread>\n2: bb\n</Thread>\n",
    ]
    assert text(made.ids) == text(engine.requests[3].context) + "</Parallel>\nc<eos>"
    assert (made.finish, made.rounds, dict(made.counts)) == ("eos", 1, {})
    forced = made.ids[made.provenance == Provenance.FORCED]
    assert text(forced) == "\n<Thread>\n1:<Thread>\n2:\n"
    returned = made.ids[made.provenance == Provenance.RETURNED]
    assert text(returned) == " aa\n</Thread> bb\n</Thread>"


def test_a_thread_does_not_see_its_siblings():
    threads = {"1": " aa\n</Thread>", "2": " bb\n</Thread>"}
    _, engine = rollout([outlines("1", "2"), "<eos>"], threads)
    assert " aa" not in text(engine.requests[2].context)


def test_an_end_of_sequence_in_a_thread_ends_that_thread_only():
    threads = {"1": " aa<end>", "2": " bb\n</Thread>"}
    made, _ = rollout([outlines("1", "2"), "</Parallel>c<eos>"], threads)
    assert " aa\n</Thread><Thread>\n2: bb\n</Thread>\n</Parallel>c<eos>" in text(made.ids)
    assert made.counts == {"thread_eos": 1}
    assert text(made.calls[1].sampled) == " aa<end>"


def test_an_unterminated_thread_is_closed_and_the_rollout_goes_on():
    threads = {"1": " a" * 50, "2": " bb\n</Thread>"}
    made, _ = rollout([outlines("1", "2"), "</Parallel>c<eos>"], threads, max_thread=4)
    assert "1: a a\n</Thread><Thread>\n2: bb\n" in text(made.ids)
    assert made.finish == "eos"
    assert made.counts == {"thread_length": 2}


def test_abort_forces_the_end_of_the_block_and_finishes():
    threads = {"1": " aa<eos>", "2": " bb\n</Thread>"}
    made, engine = rollout([outlines("1", "2")], threads, unfinished_thread="abort")
    assert text(made.ids).endswith("2: bb\n</Thread>\n</Parallel>")
    assert made.finish == "unfinished_thread"
    assert len(engine.requests) == 3


def test_a_failed_thread_returns_empty_and_loses_nothing():
    threads = {"1": "", "2": " bb\n</Thread>"}
    made, _ = rollout([outlines("1", "2"), "<eos>"], threads, failing=("1",))
    assert "\n<Thread>\n1:\n</Thread><Thread>\n2: bb\n</Thread>\n" in text(made.ids)
    assert (made.finish, made.counts) == ("eos", {"thread_error": 1})


def test_a_stray_end_of_outlines_forks_nothing_and_does_not_respawn_old_threads():
    threads = {"1": " a\n</Thread>", "2": " b\n</Thread>"}
    made, engine = rollout([outlines("1", "2"), "a</Outlines>", "b<eos>"], threads)
    assert made.rounds == 1
    assert made.counts == {"stray_outlines": 1}
    assert len(engine.requests) == 5
    assert text(made.ids).endswith("\na</Outlines>b<eos>")


def test_outlines_without_numbers_go_on_sequentially():
    made, _ = rollout(["<Outlines><Outline>a: b</Outline></Outlines>", "<eos>"])
    assert (made.rounds, made.counts) == (0, {"empty_outlines": 1})


def test_only_the_outlines_after_the_last_opening_tag_count():
    parent = "<Outlines><Outline>1: a<Outlines><Outline>2: b</Outline></Outlines>"
    made, _ = rollout([parent, "<eos>"], {"2": "\n</Thread>"})
    assert [call.path for call in made.calls] == [(), (0, "2"), ()]


def test_repeated_numbers_fork_once_in_first_order():
    threads = {"1": " a\n</Thread>", "2": " b\n</Thread>"}
    made, _ = rollout([outlines("2", "1", "2"), "<eos>"], threads)
    assert [call.path for call in made.calls] == [(), (0, "2"), (0, "1"), ()]
    assert made.counts == {"duplicate_outline": 1}


def test_missing_numbers_and_gaps_fork_what_is_written():
    threads = {"1": " a\n</Thread>", "7": " b\n</Thread>"}
    made, _ = rollout([outlines("1", "7"), "<eos>"], threads)
    assert [call.path for call in made.calls] == [(), (0, "1"), (0, "7"), ()]


def test_outlines_beyond_the_limit_are_dropped_and_counted():
    threads = {str(n): "\n</Thread>" for n in range(1, 5)}
    made, _ = rollout([outlines("1", "2", "3", "4"), "<eos>"], threads, max_threads=3)
    assert made.counts == {"dropped_outline": 1}
    assert len(made.calls) == 5


def test_the_number_of_rounds_is_bounded():
    made, _ = rollout([outlines("1")] * 3, {"1": "\n</Thread>"}, max_rounds=2)
    assert (made.finish, made.rounds) == ("rounds", 2)
    assert text(made.ids).endswith("</Outlines>")


def test_threads_share_what_the_joined_context_has_left():
    parent = outlines("1", "2")
    for max_new in range(40, 120):
        threads = {"1": " a" * 99, "2": " b" * 99}
        made, engine = rollout([parent, "a" * 99], threads, max_new=max_new)
        assert len(made.ids) <= 3 + max_new
        if made.finish == "budget":
            assert made.rounds == 0
        else:
            assert made.finish == "length"
            budgets = {q.max_tokens for q in engine.requests if q.path}
            assert len(budgets) <= 1


def test_a_fork_without_room_ends_by_budget_with_everything_kept():
    parent = outlines("1", "2")
    made, _ = rollout([parent], max_new=len(TOKENIZER.encode(parent)) + 5)
    assert made.finish == "budget"
    assert text(made.ids) == "abc" + parent


def test_a_prompt_that_fills_the_context_ends_by_length_without_a_call():
    made, _ = rollout([], prompt="abc", max_context=3)
    assert (made.finish, made.calls) == ("length", ())


def test_every_end_of_sequence_id_ends_the_rollout():
    for end in ("<eos>", "<end>"):
        assert rollout(["ab" + end])[0].finish == "eos"


def test_without_parallel_decoding_outlines_are_plain_text():
    made, engine = rollout([outlines("1", "2") + "a<eos>"], parallel=False)
    assert (made.finish, made.rounds, len(engine.requests)) == ("eos", 0, 1)


def test_a_token_budget_ignored_by_an_engine_is_refused():
    class Rude(Script):
        async def generate(self, request):
            yield Chunk(np.zeros(request.max_tokens + 1, np.int32))

    with pytest.raises(ValueError, match="which allows 5"):
        run(weaver(max_new=5), Rude([]), TOKENIZER.encode("abc"))


ATOMS = st.sampled_from(
    ["<Outline>", "<Outlines>", "1", "2", "12", " 3", "4:", ".5", ".", ":", " ", "\n", "a", "0",
     "</Outline>", "<Thread>"]
)  # fmt: skip


@hypothesis.given(st.lists(ATOMS, max_size=30))
@hypothesis.settings(max_examples=500)
def test_the_automaton_reads_what_the_pattern_reads(atoms):
    ids = np.array([TOKENIZER.id_of(a) for a in ["<Outlines>", *atoms, "</Outlines>"]], np.int32)
    written = "".join(atoms).rpartition("<Outlines>")[2]
    want = re.findall(r"<Outline>\s*([0-9]+(?:\.[0-9]+)*)\s*:", written)
    want = [label for label in want if len(label) <= MAX_LABEL]
    assert TABLE.read_outlines(ids) == (want, True)


@hypothesis.given(st.from_regex(r"\A[0-9.]{1,8}\Z"))
def test_label_codes_round_trip_within_int32(label):
    code = encode_label(label)
    assert code < 2**31
    assert decode_label(code) == label


def test_a_tokenizer_that_splits_a_control_token_is_refused():
    class Split(fakes.Characters):
        def encode(self, text):
            ids = super().encode(text)
            return np.repeat(ids, 2) if text == "<Thread>" else ids

        def id_of(self, text):
            ids = self.encode(text)
            if len(ids) != 1:
                raise ValueError(f"{text} is {len(ids)} ids")
            return int(ids[0])

    with pytest.raises(ValueError, match="<Thread>"):
        make_table(Split())


def test_hit_is_read_from_the_ids():
    protocol = weaver()
    stops = protocol.thread_stops()
    for written, want in (
        ("a</Thread>", StopReason.STOP),
        ("a<end>", StopReason.EOS),
        ("a", StopReason.LENGTH),
    ):
        assert protocol.stop_reason(TOKENIZER.encode(written), stops, failed=False) is want
    assert protocol.stop_reason(TOKENIZER.encode("a<eos>"), stops, failed=True) is StopReason.ERROR
