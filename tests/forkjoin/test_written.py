"""Written responses: a script gets the trajectory of the pipeline, or its error."""

import fakes
import numpy as np
import pytest

from tw_jax.data.pipeline import Builder, Data
from tw_jax.data.records import Example
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.forkjoin.threadweaver.written import trajectory
from tw_jax.tokenizer.chat import Chat

TOKENIZER, CHAT = fakes.Characters(), Chat(template="plain")
HEAD = "a\n<Parallel>\n"
PLAN = "<Outlines>\n<Outline>1: b</Outline>\n<Outline>2: c</Outline>\n</Outlines>\n"
EMPTY = "<Outlines>\n</Outlines>\n"
THREADS = "<Thread>\n1: d\n</Thread><Thread>\n2: ef\n</Thread>\n"
TAIL = "</Parallel>\ng"
RESPONSE = HEAD + PLAN + THREADS + TAIL


def of_pipeline(response: str, limits: ForkJoin):
    """What training makes of a record with this response."""
    protocol = ThreadWeaver(make_table(TOKENIZER), limits)
    builder = Builder(Data(path="x.jsonl", chat=CHAT), TOKENIZER, protocol)
    return builder.trajectory(Example("n", "h", response), "x.jsonl:3")


def test_a_written_response_becomes_the_calls_that_would_have_written_it():
    made = trajectory(TOKENIZER, CHAT, "h", RESPONSE)
    sampled = [TOKENIZER.decode(call.sampled) for call in made.calls]
    assert sampled == [
        HEAD + PLAN.rstrip("\n"),
        " d\n</Thread>",
        " ef\n</Thread>",
        f"{TAIL}{TOKENIZER.decode(TOKENIZER.eos_ids[:1])}",
    ]
    assert [call.path for call in made.calls] == [(), (0, "1"), (0, "2"), ()]
    assert TOKENIZER.decode(made.ids[: made.prompt_tokens]) == "h\n"
    assert all(call.logp is None for call in made.calls)


def test_script_and_pipeline_make_the_same_trajectory():
    limits = ForkJoin(max_threads=2)
    mine, theirs = trajectory(TOKENIZER, CHAT, "h", RESPONSE, limits), of_pipeline(RESPONSE, limits)
    np.testing.assert_array_equal(mine.ids, theirs.ids)
    for one, other in zip(mine.calls, theirs.calls, strict=True):
        np.testing.assert_array_equal(one.context, other.context)
        np.testing.assert_array_equal(one.sampled, other.sampled)


@pytest.mark.parametrize(
    ("response", "limits", "sentence"),
    [
        (HEAD + PLAN + THREADS, ForkJoin(), "<Parallel> is never closed"),
        (HEAD + EMPTY + THREADS + TAIL, ForkJoin(), "A block has no outlines"),
        (
            RESPONSE.replace("<Outline>2: c</Outline>\n", ""),
            ForkJoin(),
            "A block has 1 outline and 2 threads",
        ),
        (RESPONSE.replace("2: ef", "3: ef"), ForkJoin(), "A thread has the number 3"),
        (RESPONSE, ForkJoin(max_threads=1), "ForkJoin.max_threads = 1"),
        (RESPONSE, ForkJoin(max_new=20), "Raise"),
        (RESPONSE.replace("</Thread><", "</Thread>\n<"), ForkJoin(), "Normalise the response"),
    ],
)
def test_script_and_pipeline_refuse_the_same_texts_in_the_same_words(response, limits, sentence):
    with pytest.raises(ValueError, match=sentence) as script:
        trajectory(TOKENIZER, CHAT, "h", response, limits)
    with pytest.raises(ValueError, match=sentence) as pipeline:
        of_pipeline(response, limits)
    assert str(pipeline.value) == f"x.jsonl:3: {script.value}"


def test_without_parallel_decoding_a_block_needs_no_outlines():
    made = trajectory(TOKENIZER, CHAT, "h", HEAD + EMPTY + THREADS + TAIL, ForkJoin(parallel=False))
    assert len(made.calls) == 1
