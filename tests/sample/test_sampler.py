"""The jitted sampler against the host protocol and against full passes over packed tries."""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.forkjoin import tries
from tw_jax.forkjoin.calls import StopReason
from tw_jax.forkjoin.engine import Chunk
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.orchestrator import run
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.metrics import count_compiles
from tw_jax.sample import cache as caches
from tw_jax.sample import sampler as samplers
from tw_jax.sample.draw import sampling_arrays, scripted
from tw_jax.sample.state import DONE
from tw_jax.trie.batch import stack_rows

TOKENIZER = fakes.Characters()
TABLE = make_table(TOKENIZER)
NETWORK = fakes.path_network(TOKENIZER.vocab_size)
PARAMS = NETWORK.init(jax.random.key(1))
CALLS, LONGEST = 24, 48


@functools.cache
def build(draw=scripted, rows=4, prefill_chunk=8, **limits):
    limits = {"max_context": 400, "max_new": 160, "max_thread": 20, "max_threads": 4} | limits
    protocol = ThreadWeaver(TABLE, ForkJoin(**limits))
    cfg = samplers.Sampler(rows=rows, max_prompt=20, prefill_chunk=prefill_chunk)
    return samplers.make_sampler(NETWORK, protocol, cfg, draw=draw or samplers.draw)


class FromScript:
    """The host's engine on the same script, call by call."""

    def __init__(self, script):
        self.script = script

    async def generate(self, request):
        call = self.script[min(request.number, CALLS - 1)]
        line = np.resize(call, request.max_tokens)
        line[LONGEST:] = call[-1]
        ends = np.flatnonzero(np.isin(line, list(request.stops)))
        yield Chunk(line[: ends[0] + 1] if len(ends) else line)


def random_script(seed: int) -> np.ndarray:
    """Calls that mix well-formed blocks with everything that can go wrong."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(CALLS):
        kind = rng.integers(8)
        labels = [str(n) for n in rng.permutation(rng.integers(1, 14, rng.integers(1, 7)))]
        labels += ["2.1"] * int(rng.integers(2))
        listed = "".join(f"<Outline>{label}: a</Outline>" for label in labels[:4])
        texts.append(
            {
                0: f"a<Parallel><Outlines>{listed}</Outlines>",
                1: f"<Outlines>{listed}</Outlines>",
                2: " ab\n</Thread>",
                3: " abc" + "<end>" * int(rng.integers(2)) + "\n</Thread></Outlines>",
                4: "a" * int(rng.integers(30)) + "</Thread>" + listed + "</Outlines>",
                5: "</Outlines>",
                6: "".join(rng.choice(["a", "1", ":", "<Outline>", " "], 20)) + "<eos>",
                7: "<Outlines><Outline>12",
            }[int(kind)]
        )
    rows = [TOKENIZER.encode(text)[:LONGEST] for text in texts]
    filler = [rng.integers(1, TOKENIZER.vocab_size, LONGEST - len(row)) for row in rows]
    return np.array([np.concatenate(pair) for pair in zip(rows, filler, strict=True)], np.int32)


def assert_same_calls(made, want):
    assert (made.finish, made.rounds, made.counts) == (want.finish, want.rounds, want.counts)
    assert made.ids.tolist() == want.ids.tolist()
    assert made.provenance.tolist() == want.provenance.tolist()
    assert [c.path for c in made.calls] == [c.path for c in want.calls]
    for mine, theirs in zip(made.calls, want.calls, strict=True):
        assert mine.context.tolist() == theirs.context.tolist()
        assert mine.sampled.tolist() == theirs.sampled.tolist()
        assert mine.stop_reason is theirs.stop_reason


@jax.jit
def full_pass(tokens, depth, span, temperature):
    hidden, _ = NETWORK.apply(PARAMS, tokens, depth, span)
    return jax.nn.log_softmax(NETWORK.unembed(PARAMS, hidden) / temperature, axis=-1)


def recomputed(trajectory, temperature=1.0):
    """Log-probs of every weighted node from one full pass over the packed trie."""
    trie = tries.trajectory_trie(trajectory)
    batch = stack_rows([[trie]], 1024 if len(trie) <= 1024 else 2048)
    logp = full_pass(batch.tokens, batch.depth, batch.span, temperature)
    of_node = np.asarray(logp)[0, batch.parent[0], batch.tokens[0]]
    found, walked = [], {}
    for node in range(len(trie)):
        walked[int(trie.parent[node]), int(trie.tokens[node])] = node
    for call in trajectory.calls:
        node = -1
        for token in call.context.tolist():
            node = walked[node, token]
        for token in call.sampled.tolist():
            node = walked[node, token]
            found.append(of_node[node])
    return np.array(found)


PROMPTS = [TOKENIZER.encode(text) for text in ("abc", "a", "abcdefgh1234567", "b:")]


@pytest.mark.parametrize(("unfinished", "rounds"), [("continue", 3), ("abort", 1)])
@pytest.mark.parametrize("seed", range(6))
def test_the_program_makes_the_calls_of_the_host_protocol(seed, unfinished, rounds, close):
    sampler = build(unfinished_thread=unfinished, max_rounds=rounds)
    scripts = np.stack([random_script(4 * seed + n) for n in range(4)])
    made = sampler(PARAMS, PROMPTS, jnp.asarray(scripts))
    for prompt, script, trajectory in zip(PROMPTS, scripts, made, strict=True):
        assert_same_calls(trajectory, run(sampler.protocol, FromScript(script), prompt))
        drawn = np.concatenate([call.logp for call in trajectory.calls])
        close("sampler_logp", drawn, recomputed(trajectory), of=1.0)


def test_random_scripts_reach_every_outcome():
    finishes, counts, hits = set(), set(), set()
    limits = ForkJoin(max_new=160, max_thread=20, max_threads=4, max_rounds=1)
    for seed in range(32):
        protocol = ThreadWeaver(TABLE, limits)
        made = run(protocol, FromScript(random_script(seed)), PROMPTS[0])
        finishes.add(made.finish)
        counts |= set(made.counts)
        hits |= {(bool(call.path), call.stop_reason) for call in made.calls}
    assert {"eos", "length", "rounds"} <= finishes
    assert {"stray_outlines", "duplicate_outline", "thread_eos", "thread_length"} <= counts
    assert {(True, StopReason.LENGTH), (True, StopReason.EOS), (False, StopReason.EOS)} <= hits


def test_growing_through_buckets_and_dropping_dead_slots_changes_nothing(close):
    listed = "".join(f"<Outline>{n}: a</Outline>" for n in range(1, 5))
    parent = TOKENIZER.encode(f"<Outlines>{listed}</Outlines>")
    thread = TOKENIZER.encode(" abcdefgh abcdefgh abcdefgh\n</Thread>")
    script = np.zeros((1, CALLS, LONGEST), np.int32)
    for call in range(CALLS):
        line = parent if call % 5 == 0 else thread
        script[0, call, : len(line)] = line
    sampler = build(rows=1, max_context=1000, max_new=900, max_thread=40, max_rounds=16)
    (made,) = sampler(PARAMS, PROMPTS[:1], jnp.asarray(script))
    assert len(made.ids) > 600 > caches.bucket(1)
    assert_same_calls(made, run(sampler.protocol, FromScript(script[0]), PROMPTS[0]))
    drawn = np.concatenate([call.logp for call in made.calls])
    close("sampler_logp", drawn, recomputed(made), of=1.0)


def test_sampled_log_probs_are_those_of_the_tempered_distribution(close):
    sampler = build(draw=None)
    sampling = sampling_arrays(4, temperature=0.7, top_p=1.0, top_k=0, seed=3)
    for trajectory in sampler(PARAMS, PROMPTS, sampling):
        drawn = np.concatenate([call.logp for call in trajectory.calls])
        want = recomputed(trajectory, temperature=0.7)
        close("sampler_logp", drawn, want, of=1.0)


def test_a_rollout_does_not_depend_on_its_batch_neighbours():
    sampler = build(draw=None)
    sampling = sampling_arrays(4, temperature=1.0, top_p=0.9, top_k=0, seed=3)
    together = sampler(PARAMS, PROMPTS, sampling)
    swapped = jax.tree.map(lambda a: a[::-1], sampling)
    apart = sampler(PARAMS, PROMPTS[::-1], swapped)[::-1]
    alone = [
        sampler(PARAMS, [p], jax.tree.map(lambda a, n=n: a[n : n + 1], sampling))[0]
        for n, p in enumerate(PROMPTS)
    ]
    for a, b, c in zip(together, apart, alone, strict=True):
        assert a.ids.tolist() == b.ids.tolist() == c.ids.tolist()


def test_more_prompts_than_rows_are_decoded_in_turns():
    sampler = build(draw=None)
    sampling = sampling_arrays(6, temperature=1.0, top_p=1.0, top_k=0, seed=0)
    prompts = [PROMPTS[n % 4] for n in range(6)]
    made = sampler(PARAMS, prompts, sampling)
    assert len(made) == 6
    first = sampler(PARAMS, prompts[:4], jax.tree.map(lambda a: a[:4], sampling))
    assert [t.ids.tolist() for t in made[:4]] == [t.ids.tolist() for t in first]


def test_no_prompts_make_no_rollouts():
    assert build()(PARAMS, []) == []


def test_new_temperatures_and_seeds_do_not_recompile():
    sampler = build(draw=None)
    sampler(PARAMS, PROMPTS, sampling_arrays(4, temperature=1.0, top_p=1.0, top_k=0, seed=0))
    before = sampler.jitted.advance._cache_size()
    for temperature, top_p, top_k in ((0.0, 1.0, 0), (0.5, 0.9, 0), (1.3, 1.0, 5)):
        sampling = sampling_arrays(4, temperature=temperature, top_p=top_p, top_k=top_k, seed=top_k)
        sampler(PARAMS, PROMPTS, sampling)
    assert sampler.jitted.advance._cache_size() <= before + 1  # at most one more capacity bucket


def test_a_prompt_without_room_ends_by_length():
    sampler = build(max_context=5, max_new=10)
    made = sampler(PARAMS, [PROMPTS[2], PROMPTS[0]], jnp.zeros((2, CALLS, LONGEST), jnp.int32))
    assert [t.finish for t in made] == ["length", "length"]
    assert [len(t.calls) for t in made] == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "Prompt 0 has 0 tokens"),
        ([1] * 21, "Prompt 0 has 21 tokens. It must have 1 to 20"),
        ([1, 4000], "Prompt 0 holds id 4000"),
    ],
)
def test_bad_prompts_are_refused_in_a_sentence(prompt, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()(PARAMS, [np.array(prompt, np.int32)])


def test_rollouts_of_a_prompt_encoded_once_are_those_of_it_encoded_each_time(close):
    sampler = build(draw=None)
    prompts = [TOKENIZER.encode("abc 12"), TOKENIZER.encode("dd")]
    sampling = sampling_arrays(4, temperature=1.0, top_p=1.0, top_k=0, seed=5)
    once = sampler(PARAMS, prompts, sampling, repeats=2)
    each = sampler(PARAMS, [prompts[0], prompts[0], prompts[1], prompts[1]], sampling)
    assert len(once) == 4
    for a, b in zip(once, each, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        for call, other in zip(a.calls, b.calls, strict=True):
            np.testing.assert_array_equal(call.sampled, other.sampled)
            close("sampler_logp", call.logp, other.logp, of=1.0)
    assert not np.array_equal(once[0].ids, once[1].ids)  # they draw with seeds of their own


def test_repeats_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"repeats = 3 does not divide Sampler.rows = 4"):
        build(draw=None)(PARAMS, [TOKENIZER.encode("ab")], repeats=3)


def test_a_network_with_more_ids_than_the_tokenizer_is_refused():
    wide = fakes.path_network(TOKENIZER.vocab_size + 8)
    protocol = ThreadWeaver(TABLE, ForkJoin())
    with pytest.raises(ValueError, match="must be at least as many"):
        samplers.make_sampler(wide, protocol, samplers.Sampler())
    num_ids = TOKENIZER.vocab_size
    samplers.make_sampler(wide._replace(num_ids=num_ids), protocol, samplers.Sampler())


# A running state: rows are admitted, decoded for some turns, collected and released.


def same_rollout(one, other, close):
    """Ids bit by bit; log-probs may come from another capacity of the cache."""
    assert one.ids.tolist() == other.ids.tolist()
    assert [c.path for c in one.calls] == [c.path for c in other.calls]
    for mine, theirs in zip(one.calls, other.calls, strict=True):
        close("sampler_logp", mine.logp, theirs.logp, of=1.0)


def forking(seed):
    """A script of three forks: it keeps a row busy for many turns."""
    listed = "".join(f"<Outline>{n}: a</Outline>" for n in (1, 2, 3))
    texts = [f"<Outlines>{listed}</Outlines>", *[" abc\n</Thread>"] * 3] * 3 + ["ab<eos>"] * CALLS
    rng, lines = np.random.default_rng(seed), []
    for text in texts[:CALLS]:
        ids = TOKENIZER.encode(text.replace("abc", "abcdefgh"[: rng.integers(1, 9)]))[:LONGEST]
        lines.append(np.pad(ids, (0, LONGEST - len(ids)), constant_values=1))
    return np.array(lines, np.int32)


def is_done(state):
    return np.asarray(state.phase) == DONE


def finish(sampler, state):
    while not is_done(state).all():
        state = sampler.make_room(sampler.advance(PARAMS, state, 7))
    return state


@pytest.mark.parametrize("turns", [1, 2, 13, 40])
def test_a_rollout_does_not_depend_on_its_row_nor_on_when_it_was_admitted(turns, close):
    sampler = build(draw=None)
    sampling = sampling_arrays(4, temperature=1.0, top_p=0.9, top_k=0, seed=3)
    alone = sampler(PARAMS, PROMPTS, sampling)
    state = sampler.empty()
    where = {0: 2, 1: 0, 2: 3, 3: 1}  # request to row
    # Two requests start, the others join them in the middle of their decoding.
    for some in ((0, 1), (2,), (3,)):
        given = jax.tree.map(lambda a, s=some: a[np.array(s)], sampling)
        rows = [where[n] for n in some]
        state = sampler.admit(PARAMS, state, rows, [PROMPTS[n] for n in some], given)
        state = sampler.make_room(sampler.advance(PARAMS, state, turns))
    state = finish(sampler, state)
    made = sampler.collect(state, [where[n] for n in range(4)], PROMPTS)
    assert len({t.ids.tobytes() for t in alone}) == 4
    for one, other in zip(made, alone, strict=True):
        same_rollout(one, other, close)


def test_rows_of_a_running_state_are_used_again_while_others_decode(close):
    sampler = build(max_rounds=4)
    scripts = np.stack([forking(seed) for seed in range(7)])
    prompts = [PROMPTS[n % 4] for n in range(7)]
    want = [run(sampler.protocol, FromScript(s), p) for s, p in zip(scripts, prompts, strict=True)]
    state = sampler.empty(scripts)
    waiting, running, made, together = list(range(7)), {}, {}, 0
    while waiting or running:
        free = [row for row in range(4) if row not in running]
        # One at a time, so that rows start and end at different turns.
        if free and waiting:
            row, n = free[-1], waiting.pop(0)
            running[row] = n
            state = sampler.admit(PARAMS, state, [row], [prompts[n]], scripts[n : n + 1])
        state = sampler.make_room(sampler.advance(PARAMS, state, 5))
        ended = [row for row in running if is_done(state)[row]]
        together += bool(ended) and len(ended) < len(running)
        for row, trajectory in zip(
            ended, sampler.collect(state, ended, [prompts[running[r]] for r in ended]), strict=True
        ):
            made[running.pop(row)] = trajectory
        state = sampler.release(state, ended)
        assert not np.asarray(state.cache.used)[ended].any()
    assert together >= 3
    for n, trajectory in made.items():
        assert_same_calls(trajectory, want[n])
        drawn = np.concatenate([call.logp for call in trajectory.calls])
        close("sampler_logp", drawn, recomputed(trajectory), of=1.0)


def test_a_group_that_is_admitted_later_is_encoded_once(close):
    sampler = build(draw=None)
    sampling = sampling_arrays(4, temperature=1.0, top_p=1.0, top_k=0, seed=5)
    prompts = [PROMPTS[2], PROMPTS[0]]
    each = sampler(PARAMS, [p for p in prompts for _ in range(2)], sampling)
    first, second = (jax.tree.map(lambda a, n=n: a[n : n + 2], sampling) for n in (0, 2))
    state = sampler.admit(PARAMS, sampler.empty(), [3, 0], prompts[:1], first, repeats=2)
    state = sampler.advance(PARAMS, state, 6)
    state = sampler.admit(PARAMS, state, [1, 2], prompts[1:], second, repeats=2)
    state = finish(sampler, state)
    made = sampler.collect(state, [3, 0, 1, 2], [p for p in prompts for _ in range(2)])
    for one, other in zip(made, each, strict=True):
        same_rollout(one, other, close)

    def encoded(count, repeats):
        """Rows in which a prompt is encoded when it is admitted for `count` rollouts."""
        return sampler._prefill_rows(count // repeats, 4 // repeats)

    assert (encoded(2, 2), encoded(2, 1), encoded(4, 1), encoded(4, 4)) == (1, 2, 4, 1)


def test_advance_returns_after_its_turns_and_compiles_nothing_new():
    sampler = build(max_rounds=4)
    script = forking(0)[None]
    state = sampler.admit(PARAMS, sampler.empty(script), [1], PROMPTS[:1], script)
    state = sampler.advance(PARAMS, state, 1)
    compiled = sampler.jitted.advance._cache_size()
    # Lane 0 of the parent draws one token a turn.
    for turns in (0, 1, 2, 5):
        before = np.asarray(state.log.length)[1]
        state = sampler.advance(PARAMS, state, turns)
        assert np.asarray(state.log.length)[1] == before + turns
    assert np.asarray(state.log.length)[[0, 2, 3]].tolist() == [0, 0, 0]
    assert sampler.jitted.advance._cache_size() == compiled


def test_a_full_state_of_rollouts_that_come_and_go_compiles_nothing_after_warm_up():
    sampler = build(draw=None)

    def batch(seed):
        sampling = sampling_arrays(2, temperature=1.0, top_p=1.0, top_k=0, seed=seed)
        state = sampler.admit(PARAMS, sampler.empty(), [0, 2], PROMPTS[:2], sampling)
        state = sampler.advance(PARAMS, state, 3)
        state = sampler.admit(PARAMS, state, [3, 1], PROMPTS[2:], sampling)
        state = finish(sampler, state)
        sampler.collect(state, [0, 2], PROMPTS[:2])
        return sampler.release(state, [0, 2])

    batch(0)
    with count_compiles() as compiles:
        batch(1)
        batch(2)
    assert compiles.count == 0


def test_a_row_that_is_decoding_is_not_given_away():
    sampler = build(draw=None)
    one = sampling_arrays(1, temperature=1.0, top_p=1.0, top_k=0, seed=0)
    state = sampler.admit(PARAMS, sampler.empty(), [1], PROMPTS[:1], one)
    with pytest.raises(ValueError, match="Row 1 of 4 is still decoding"):
        sampler.admit(PARAMS, state, [1], PROMPTS[1:2], one)
    with pytest.raises(ValueError, match="Row 1 of 4 is still decoding"):
        sampler.release(state, [1])
    with pytest.raises(ValueError, match="Row 4 of 4"):
        sampler.admit(PARAMS, state, [4], PROMPTS[1:2], one)
    with pytest.raises(ValueError, match="2 rollouts need 2 different rows"):
        sampler.admit(PARAMS, state, [0, 0], PROMPTS[:2], one)


def test_greedy_rollouts_record_the_log_probs_of_the_model(close):
    sampler = build(draw=None)
    sampling = sampling_arrays(4, temperature=0.0, top_p=0.5, top_k=3, seed=0)
    for trajectory in sampler(PARAMS, PROMPTS, sampling):
        drawn = np.concatenate([call.logp for call in trajectory.calls])
        assert (drawn < 0).any()
        close("sampler_logp", drawn, recomputed(trajectory), of=1.0)
