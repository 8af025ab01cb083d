"""The pure protocol of fork and join, and the loop that drives it: no model, no input or output.

A `Protocol` maps the answer of an engine to the next decision. `steps` is that loop as a generator:
it yields engine requests and is sent engine results, so that replay of a written text, the
asynchronous orchestrator and the check of the jitted sampler all run the same lines. Methods are
packages beside this file, such as `forkjoin/threadweaver/`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Protocol as Interface

import numpy as np

from tw_jax.bounds import require, require_temperature
from tw_jax.forkjoin.calls import Call, Provenance, StopReason, Trajectory


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one rollout is sampled, as plain numbers.

    Attributes:
      temperature: Divides the logits. 0 takes the most likely token.
      top_p: Sample only from the smallest set of most likely tokens whose probability reaches
        top_p. 1 disables the limit.
      top_k: Sample only from the k most likely tokens. 0 disables the limit.
      seed: With it and the same parameters a rollout can be drawn again, whatever is sampled
        beside it. Engines use the low 32 bits.

    Raises:
      ValueError: A number is out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that describe no distribution."""
        require_temperature(self)
        require(self, "top_p", above=0, most=1)
        require(self, "top_k", least=0)
        require(self, "seed", least=0, below=2**63)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One call for an engine.

    Attributes:
      path: () for the parent; (round, label) for a thread.
      context: [n] int32 ids to continue from.
      provenance: [n] int8, a `Provenance` for each context id.
      stops: ids that end the call; the one that was drawn is the last id of the answer.
      max_tokens: The call ends after this many ids, at least 1.
      shared: length of the context prefix that sibling requests have in common.
      number: The call's place in its rollout, from 0, in protocol order.
      sampling: parameters of the rollout; `sampling.seed` is the rollout's seed.
    """

    path: tuple[int | str, ...]
    context: np.ndarray
    provenance: np.ndarray
    stops: frozenset[int]
    max_tokens: int
    shared: int
    number: int = 0
    sampling: SamplingParams = SamplingParams()

    @property
    def seed(self) -> int:
        """A 32-bit seed for this call, made of the rollout's seed and the call's number.

        It depends on nothing else, so the order in which calls start or finish changes no id. The
        jitted sampler folds the same two numbers into its keys and does not use this seed.
        """
        mixed = np.random.SeedSequence([self.sampling.seed, self.number])
        return int(mixed.generate_state(1)[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The answer of an engine: ids up to and including the stop id, if one was drawn.

    A failed call is a `Result` with `failed=True` and the ids that arrived before the failure. It
    is never an exception, because no error may lose a trajectory.
    """

    sampled: np.ndarray  # [m] int32
    logp: np.ndarray | None = None  # [m] float32, nats, as `Call.logp`
    failed: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Thread:
    """One child of a fork.

    Attributes:
      label: the number as written in its outline, e.g. "2" or "2.1".
      header: ids forced after the parent's context in the child's own context.
      join_header: ids forced before the thread's text in the joined path.
    """

    label: str
    header: np.ndarray
    join_header: np.ndarray


@dataclasses.dataclass(frozen=True)
class Continue:
    """Go on decoding the parent: what stopped it was no fork."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fork:
    """Start these threads, each with at most `max_tokens` sampled ids."""

    threads: tuple[Thread, ...]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Finish:
    """The rollout is over; `reason` becomes `Trajectory.finish`."""

    reason: str


Decision = Continue | Fork | Finish


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A run of ids of one provenance, to append to the parent's context."""

    ids: np.ndarray
    provenance: Provenance


@dataclasses.dataclass(frozen=True, eq=False)
class JoinEdit:
    """What a join appends to the parent, and what follows."""

    pieces: tuple[Piece, ...]
    then: Continue | Finish
    events: tuple[str, ...] = ()


class Protocol(Interface):
    """Decisions of one method. Every function is pure and total: malformed text never raises."""

    def parent_stops(self) -> frozenset[int]:
        """Ids that end a parent call."""
        ...

    def thread_stops(self) -> frozenset[int]:
        """Ids that end a thread call."""
        ...

    def parent_budget(self, context_tokens: int, prompt_tokens: int) -> int:
        """Ids that the next parent call may sample; 0 or less ends the rollout by length."""
        ...

    def decide(
        self,
        sampled: np.ndarray,
        stop_reason: StopReason,
        *,
        context_tokens: int,
        prompt_tokens: int,
        rounds: int,
    ) -> tuple[Decision, tuple[str, ...]]:
        """After a parent call: its new ids and why it ended; also the events to count.

        `context_tokens` counts the new ids; `rounds` is the number of forks so far.
        """
        ...

    def join(self, threads: Sequence[Thread], calls: Sequence[Call]) -> JoinEdit:
        """After the threads of a fork, in outline order."""
        ...

    def stop_reason(self, sampled: np.ndarray, stops: frozenset[int], failed: bool) -> StopReason:
        """Why a call ended, read from its ids alone."""
        ...


Steps = Generator[list[Request], Sequence[Result], Trajectory]


def steps(
    protocol: Protocol, prompt: np.ndarray, sampling: SamplingParams = SamplingParams()
) -> Steps:
    """Runs one rollout as a generator of engine requests.

    Yields a list of requests that may run at the same time and expects the list of their results,
    in order. Returns the `Trajectory`.

    Args:
      protocol: the method.
      prompt: [n] int32 ids, at least one.
      sampling: passed on in each request.

    Raises:
      ValueError: The prompt is empty, or a result is longer than its request allows.
    """
    prompt = np.asarray(prompt, np.int32)
    if not len(prompt):
        raise ValueError("The prompt has 0 tokens. It needs at least 1; give a chat template.")
    path = _Path(prompt)
    calls: list[Call] = []
    counts: Counter[str] = Counter()
    rounds = 0

    def finish(reason: str) -> Trajectory:
        ids, provenance = path.arrays()
        return Trajectory(
            prompt_tokens=len(prompt),
            calls=tuple(calls),
            ids=ids,
            provenance=provenance,
            rounds=rounds,
            finish=reason,
            counts=dict(counts),
        )

    while True:
        budget = protocol.parent_budget(len(path), len(prompt))
        if budget < 1:
            return finish("length")
        context, provenance = path.arrays()
        request = Request(
            path=(),
            context=context,
            provenance=provenance,
            stops=protocol.parent_stops(),
            max_tokens=budget,
            shared=len(context),
            number=len(calls),
            sampling=sampling,
        )
        call = _call(protocol, request, (yield [request])[0])
        calls.append(call)
        if call.stop_reason is StopReason.ERROR:
            counts["engine_error"] += 1
        path.append(call.sampled, Provenance.SAMPLED)
        decision, events = protocol.decide(
            call.sampled,
            call.stop_reason,
            context_tokens=len(path),
            prompt_tokens=len(prompt),
            rounds=rounds,
        )
        counts.update(events)
        if isinstance(decision, Finish):
            return finish(decision.reason)
        if isinstance(decision, Continue):
            continue
        context, provenance = path.arrays()
        requests = [
            Request(
                path=(rounds, thread.label),
                context=np.concatenate([context, thread.header]),
                provenance=np.concatenate(
                    [provenance, _marks(Provenance.FORCED, len(thread.header))]
                ),
                stops=protocol.thread_stops(),
                max_tokens=decision.max_tokens,
                shared=len(context),
                number=len(calls) + index,
                sampling=sampling,
            )
            for index, thread in enumerate(decision.threads)
        ]
        results = yield requests
        children = [_call(protocol, q, r) for q, r in zip(requests, results, strict=True)]
        calls += children
        edit = protocol.join(decision.threads, children)
        counts.update(edit.events)
        for piece in edit.pieces:
            path.append(piece.ids, piece.provenance)
        rounds += 1
        if isinstance(edit.then, Finish):
            return finish(edit.then.reason)


class _Path:
    """The growing joined path in one buffer, of which contexts are views.

    A text may stop the parent at every token without ever forking. With a copy for each call its
    contexts would take memory and time that grow with the square of its length.
    """

    def __init__(self, prompt: np.ndarray) -> None:
        self._ids, self._marks = np.zeros(0, np.int32), np.zeros(0, np.int8)
        self._length = 0
        self.append(prompt, Provenance.PROMPT)

    def __len__(self) -> int:
        return self._length

    def append(self, ids: np.ndarray, provenance: Provenance) -> None:
        length = self._length + len(ids)
        if length > len(self._ids):
            # Earlier views keep the buffer that they were cut from.
            more = max(length, 2 * len(self._ids)) - self._length
            self._ids = np.concatenate([self._ids[: self._length], np.zeros(more, np.int32)])
            self._marks = np.concatenate([self._marks[: self._length], np.zeros(more, np.int8)])
        self._ids[self._length : length] = ids
        self._marks[self._length : length] = provenance
        self._length = length

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and provenance so far; what is appended later does not change them."""
        return self._ids[: self._length], self._marks[: self._length]


def _marks(provenance: Provenance, length: int) -> np.ndarray:
    return np.full(length, provenance, np.int8)


def _call(protocol: Protocol, request: Request, result: Result) -> Call:
    sampled = np.asarray(result.sampled, np.int32)
    if len(sampled) > request.max_tokens:
        raise ValueError(
            f"The engine returned {len(sampled)} ids for call {request.number} {request.path}, "
            f"which allows {request.max_tokens}. The engine must obey Request.max_tokens."
        )
    logp = None if result.logp is None else np.asarray(result.logp, np.float32)
    stop_reason = protocol.stop_reason(sampled, request.stops, result.failed)
    return Call(request.path, request.context, request.provenance, sampled, logp, stop_reason)
