"""The orchestrator over scripted engines: order, seeds, failures, time limits and cancellation."""

import asyncio
import dataclasses

import fakes
import numpy as np
import pytest

from tw_jax.forkjoin.engine import Chunk
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.orchestrator import run, run_async
from tw_jax.forkjoin.protocol import SamplingParams
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table

TOKENIZER = fakes.Characters()
PROTOCOL = ThreadWeaver(make_table(TOKENIZER), ForkJoin(max_new=300, max_thread=20))
PROMPT = TOKENIZER.encode("abc")
LABELS = ("1", "2", "3")
FORK = "<Outlines>" + "".join(f"<Outline>{n}: a</Outline>" for n in LABELS) + "</Outlines>"


class Seeded:
    """Draws ids from the seed of each call, one chunk an id, and yields to others as told.

    Attributes:
      pauses: how often the call of a path lets others run before each of its chunks.
      done: paths in the order in which their calls ended.
      closed: paths of all calls that ended, cancelled ones included.
    """

    def __init__(self, pauses=lambda path: 0):
        self.pauses, self.done, self.closed, self.started = pauses, [], [], []

    def ids(self, request):
        rng = np.random.default_rng(request.seed)
        words = "".join(rng.choice([*"abcdef"], rng.integers(3, 9)))
        if request.path:
            return TOKENIZER.encode(words + "</Thread>")
        return TOKENIZER.encode(words + (FORK if request.number == 0 else "<eos>"))

    async def generate(self, request):
        self.started.append(request.path)
        try:
            for token in self.ids(request):
                for _ in range(self.pauses(request.path)):
                    await asyncio.sleep(0)
                yield Chunk(np.array([token], np.int32), np.array([-float(token)], np.float32))
            self.done.append(request.path)
        finally:
            self.closed.append(request.path)


def same(one, other):
    assert one.ids.tolist() == other.ids.tolist()
    assert (one.finish, one.counts) == (other.finish, other.counts)
    for mine, theirs in zip(one.calls, other.calls, strict=True):
        assert mine.path == theirs.path
        assert mine.sampled.tolist() == theirs.sampled.tolist()
        assert mine.logp.tolist() == theirs.logp.tolist()


def test_calls_that_finish_out_of_order_give_the_same_trajectory():
    in_order, reversed_ = Seeded(), Seeded(lambda path: 40 - 10 * int(path[1]) if path else 0)
    sampling = SamplingParams(seed=7)
    made = run(PROTOCOL, in_order, PROMPT, sampling=sampling)
    other = run(PROTOCOL, reversed_, PROMPT, sampling=sampling)
    threads = [(0, label) for label in LABELS]
    assert in_order.started == reversed_.started == [(), *threads, ()]
    assert reversed_.done == [(), *threads[::-1], ()]
    same(made, other)
    assert made.calls[1].logp.tolist() == [-float(t) for t in made.calls[1].sampled]


def test_another_seed_is_another_rollout_and_calls_of_one_rollout_differ():
    one, two = (
        run(PROTOCOL, Seeded(), PROMPT, sampling=SamplingParams(seed=seed)) for seed in (1, 2)
    )
    assert one.ids.tolist() != two.ids.tolist()
    assert len({tuple(call.sampled.tolist()) for call in one.calls[1:4]}) == 3


def test_all_threads_of_a_fork_are_open_at_the_same_time():
    class Barrier(Seeded):
        def __init__(self):
            super().__init__()
            self.barrier = asyncio.Barrier(len(LABELS))

        async def generate(self, request):
            if request.path:
                await self.barrier.wait()  # passes only when every thread has started
            async for chunk in super().generate(request):
                yield chunk

    async def bounded():
        return await asyncio.wait_for(run_async(PROTOCOL, Barrier(), PROMPT), 10)

    assert asyncio.run(bounded()).finish == "eos"


class Hanging(Seeded):
    """A thread that never goes on after its first ids."""

    def __init__(self, path, after=2):
        super().__init__()
        self.path, self.after, self.hangs = path, after, asyncio.Event()

    async def generate(self, request):
        count = 0
        async for chunk in super().generate(request):
            if request.path == self.path and count == self.after:
                self.hangs.set()
                await asyncio.Event().wait()
            count += 1
            yield chunk


def test_cancelling_the_rollout_cancels_its_open_calls():
    engine = Hanging((0, "2"))

    async def cancelled():
        task = asyncio.create_task(run_async(PROTOCOL, engine, PROMPT))
        await engine.hangs.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Nothing is left to the garbage collector.
        assert sorted(engine.closed) == sorted(engine.started)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(cancelled())
    assert (0, "2") not in engine.done


def test_a_call_that_takes_too_long_keeps_its_ids_and_counts_as_failed():
    whole = run(PROTOCOL, Seeded(), PROMPT)
    made = run(PROTOCOL, Hanging((0, "2")), PROMPT, timeout=0.2)
    assert made.counts == {"thread_error": 1}
    assert made.finish == "eos"
    assert made.calls[2].sampled.tolist() == whole.calls[2].sampled[:2].tolist()
    assert made.calls[1].sampled.tolist() == whole.calls[1].sampled.tolist()


def test_a_call_that_fails_keeps_its_ids_and_is_counted():
    class Failing(Seeded):
        async def generate(self, request):
            async for chunk in super().generate(request):
                if request.path == (0, "3"):
                    yield dataclasses.replace(chunk, failed=True)
                    return
                yield chunk

    made = run(PROTOCOL, Failing(), PROMPT)
    assert (made.finish, made.counts) == ("eos", {"thread_error": 1})
    assert len(made.calls[3].sampled) == 1


def test_an_exception_of_an_engine_closes_the_other_calls_and_is_raised():
    class Broken(Hanging):
        async def generate(self, request):
            if request.path == (0, "3"):
                await self.hangs.wait()
                raise RuntimeError("a bug")
            async for chunk in super().generate(request):
                yield chunk

    engine = Broken((0, "1"))
    with pytest.raises(RuntimeError, match="a bug"):
        run(PROTOCOL, engine, PROMPT)
    assert (0, "1") in engine.closed


def test_log_probs_are_none_where_an_engine_gives_none_for_a_part():
    class Partial(Seeded):
        async def generate(self, request):
            count = 0
            async for chunk in super().generate(request):
                yield dataclasses.replace(chunk, logp=None) if count == 1 else chunk
                count += 1

    assert all(call.logp is None for call in run(PROTOCOL, Partial(), PROMPT).calls)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": -1.0}, "SamplingParams.temperature = -1.0 must be at least 0"),
        ({"temperature": float("nan")}, "SamplingParams.temperature = nan must be at least 0"),
        ({"temperature": 1e-9}, "is too low for float32"),
        ({"top_p": 0.0}, "SamplingParams.top_p = 0.0 must be above 0"),
        ({"top_k": -1}, "SamplingParams.top_k = -1 must be at least 0"),
        ({"seed": -1}, "SamplingParams.seed = -1 must be at least 0"),
    ],
)
def test_parameters_that_describe_no_distribution_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**wrong)
