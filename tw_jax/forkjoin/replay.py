"""Trajectories from written text or recorded calls, through the protocol that inference runs.

So training contexts always equal inference contexts. `replay` answers each request with the ids of
a text at that position and compares every forced id with the text. A text that the protocol would
not have produced is refused with its position and never repaired. `rebuild` answers with recorded
calls of the jitted sampler or of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.protocol import Protocol, Request, Result, steps


class ReplayError(ValueError):
    """The text is not what the protocol would have produced.

    Attributes:
      position: Index of the token at which they differ.
      forced: The id that the protocol forces there, and its reason; None for other errors.
    """

    def __init__(self, message: str, position: int, forced: tuple[int, str] | None = None) -> None:
        """Stores the place beside the message."""
        super().__init__(message)
        self.position, self.forced = position, forced


def _run(
    protocol: Protocol, prompt: np.ndarray, answer: Callable[[Sequence[Request]], list[Result]]
) -> Trajectory:
    """Drives `steps` with prepared answers; the orchestrator does the same with an engine."""
    rollout = steps(protocol, prompt)
    try:
        requests = next(rollout)
        while True:
            requests = rollout.send(answer(requests))
    except StopIteration as stop:
        return stop.value


class _Written:
    """Answers from a document's ids."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = ids
        self._stops: dict[frozenset[int], np.ndarray] = {}
        self._matched = 0  # ids that some context has been compared with, or that were answered

    def answer(self, requests: Sequence[Request]) -> list[Result]:
        """Answers calls. The ids that a join forces are compared in the next parent call."""
        if len(requests) == 1 and not requests[0].path:
            return [self._parent(requests[0])]
        answers, at = [], self._matched
        for number, request in enumerate(requests):
            header = request.context[request.shared :]
            # In the text only the first header has its leading newline.
            header = header[1:] if number else header
            self._match(header, at, f"the header of thread {request.path[1]}")
            answers.append(self._answer(at + len(header), request))
            at += len(header) + len(answers[-1])
        return [Result(answer) for answer in answers]

    def _parent(self, request: Request) -> Result:
        self._match(request.context[self._matched :], self._matched, "a join")
        answer = self._answer(len(request.context), request)
        self._matched = len(request.context) + len(answer)
        return Result(answer)

    def _answer(self, at: int, request: Request) -> np.ndarray:
        ends = self._ends(request.stops)
        following = int(np.searchsorted(ends, at))
        is_closed = following < len(ends)
        length = int(ends[following]) + 1 - at if is_closed else len(self._ids) - at
        what = f"call {request.path}" if request.path else "a parent call"
        if not is_closed:
            raise ReplayError(
                f"The text ends inside {what} that began at token {at}. The call must end with one "
                f"of the ids {sorted(request.stops)}; close the thread, or end the text with an "
                "end of sequence.",
                len(self._ids),
            )
        if length > request.max_tokens:
            raise ReplayError(
                f"{what.capitalize()} at token {at} is {length} tokens long and its budget is "
                f"{request.max_tokens}. Raise ForkJoin.max_thread, max_new or max_context.",
                at,
            )
        return self._ids[at : at + length]

    def _ends(self, stops: frozenset[int]) -> np.ndarray:
        """Positions of the stop ids in the text; computed once, because there may be many calls."""
        if stops not in self._stops:
            self._stops[stops] = np.flatnonzero(np.isin(self._ids, list(stops)))
        return self._stops[stops]

    def _match(self, expected: np.ndarray, at: int, what: str) -> None:
        have = self._ids[at : at + len(expected)]
        differs = have != expected[: len(have)]
        if len(have) == len(expected) and not differs.any():
            return
        first = int(differs.argmax()) if differs.any() else len(have)
        found = f"{have[first]}" if first < len(have) else "the end of the text"
        raise ReplayError(
            f"Token {at + first} is {found} where the protocol forces {expected[first]} ({what}). "
            "The text is not in canonical form, or a block has more than ForkJoin.max_threads "
            "threads, or the tokenizer joins a forced token with its neighbour.",
            at + first,
            (int(expected[first]), what),
        )


def replay(protocol: Protocol, ids: np.ndarray, prompt_tokens: int) -> Trajectory:
    """The calls that inference would have made to write this text.

    Args:
      protocol: The method, with its limits.
      ids: [n] int32, prompt and response, with the end of sequence that was sampled.
      prompt_tokens: Length of the prompt.

    Raises:
      ReplayError: If the text differs from the ids that the protocol forces, ends early, or
        continues after its end of sequence.
    """
    ids = np.asarray(ids, np.int32)
    trajectory = _run(protocol, ids[:prompt_tokens], _Written(ids).answer)
    made = trajectory.ids
    length = min(len(made), len(ids))
    differs = made[:length] != ids[:length]
    if len(made) != len(ids) or differs.any():
        at = int(differs.argmax()) if differs.any() else length
        raise ReplayError(
            f"Replay ends by {trajectory.finish!r} after {len(made)} tokens and the text has "
            f"{len(ids)}; they differ at token {at}. Cut the text at its end of sequence, or raise "
            "the limits in ForkJoin.",
            at,
        )
    return trajectory


class RecordError(ValueError):
    """Recorded calls are not those that the protocol makes."""


class _Recorded:
    """Answers from recorded calls, in protocol order."""

    def __init__(self, calls: Sequence[Result]) -> None:
        self._calls = list(calls)
        self.next = 0

    def answer(self, requests: Sequence[Request]) -> list[Result]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Result:
        if self.next >= len(self._calls):
            raise RecordError(
                f"The protocol asks for call {self.next} {request.path} and {len(self._calls)} "
                "were recorded. Use the limits (ForkJoin) that they were recorded with."
            )
        call = self._calls[self.next]
        self.next += 1
        ends = np.flatnonzero(np.isin(call.sampled, list(request.stops)))
        length = min([request.max_tokens, *(ends[:1] + 1)])
        drawn = len(call.sampled)
        if drawn > length or (drawn < length and not call.failed):
            raise RecordError(
                f"Call {self.next - 1} {request.path} ends after {drawn} tokens. It must end "
                f"with its first stop id, or after {request.max_tokens} tokens without one; use "
                "the limits (ForkJoin) that it was recorded with."
            )
        return call


def rebuild(protocol: Protocol, prompt: np.ndarray, calls: Sequence[Result]) -> Trajectory:
    """The trajectory of recorded calls. The protocol adds contexts, forced ids and joins.

    Args:
      protocol: The protocol, with the limits under which the calls were drawn.
      prompt: [n] int32 ids.
      calls: The recorded calls, in protocol order.

    Raises:
      RecordError: If the protocol would have made other calls.
    """
    recorded = _Recorded(calls)
    trajectory = _run(protocol, np.asarray(prompt, np.int32), recorded.answer)
    if recorded.next != len(calls):
        raise RecordError(
            f"{len(calls)} calls were recorded and the protocol makes {recorded.next}. Use the "
            "limits (ForkJoin) that they were recorded with."
        )
    return trajectory
