"""`Table`: the ids and arrays of a method that the jitted sampler needs.

A method that runs inside the jitted program writes numbered outlines, forks at one id, forces a
header in each thread and ends a thread at another id. Which ids these are, and how numbers are
read from tokens, is in a `Table`; the sampler reads the table and imports no method. The host
protocol of the method reads the same table, so that both make the same decisions.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol as Interface

import numpy as np

from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.protocol import Protocol

NUMBER_CHARACTERS = "0123456789."
RADIX = len(NUMBER_CHARACTERS)
"""Base of the codes that labels have on the device."""
MAX_LABEL = 8
"""Characters of an outline number; the code of a longer one would not fit an int32."""
EMPTY_CODE = 1
"""Code of the empty label. A label's code is a leading 1 and its characters, in base 11."""
TABLED_LABELS = 99
"""Labels "1".."99" are forced as the tokenizer writes them; others character by character."""

# States of the automaton that reads `<Outline>\s*([0-9]+(\.[0-9]+)*)\s*:`.
IDLE, WANT_DIGIT, IN_NUMBER, AFTER_DOT, WANT_COLON = range(5)
STATES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Everything that fork and join decisions need, as ids and arrays (numpy, host).

    Attributes:
      outlines, end_outlines, outline, thread, end_thread, end_parallel, newline, colon: ids.
      eos: [E] int32 ids that end a sequence.
      next_state: [5, V] int8 automaton over outline numbers, by state and token.
      pushed: [5, V] int32 number characters that the token adds, as base-11 digits.
      pushed_length: [5, V] int8, the number of these characters.
      completes: [5, V] bool, the token closes a number with its colon.
      character: [11] int32 ids of "0".."9" and ".".
      label: [99, W] int32 ids of "1".."99" as the tokenizer writes them, and
      label_length: [99] int32.
    """

    outlines: int
    end_outlines: int
    outline: int
    thread: int
    end_thread: int
    end_parallel: int
    newline: int
    colon: int
    eos: np.ndarray
    next_state: np.ndarray
    pushed: np.ndarray
    pushed_length: np.ndarray
    completes: np.ndarray
    character: np.ndarray
    label: np.ndarray
    label_length: np.ndarray

    @property
    def num_ids(self) -> int:
        """Number of ids of the tokenizer."""
        return self.next_state.shape[1]

    @property
    def closer(self) -> np.ndarray:
        """Ids forced after a thread that did not close itself."""
        return np.array([self.newline, self.end_thread], np.int32)

    def label_ids(self, label: str) -> np.ndarray:
        """Ids of an outline number inside a forced header."""
        if label.isascii() and label.isdigit() and label[0] != "0" and len(label) <= 2:
            number = int(label) - 1
            return self.label[number, : self.label_length[number]]
        return self.character[[NUMBER_CHARACTERS.index(c) for c in label]]

    def read_outlines(self, sampled: np.ndarray) -> tuple[list[str], bool]:
        """Outline numbers after the last `<Outlines>` of a call, in order, repeats kept.

        Returns:
          The labels, longer ones than `MAX_LABEL` left out, and whether `<Outlines>` occurred.
        """
        begins = np.flatnonzero(sampled == self.outlines)
        if not len(begins):
            return [], False
        labels, state, code, length = [], IDLE, EMPTY_CODE, 0
        for token in sampled[begins[-1] :].tolist():
            if (
                self.completes[state, token]
                and 0 < (length + int(self.pushed_length[state, token])) <= MAX_LABEL
            ):
                labels.append(decode_label(self._push(code, state, token)))
            if token == self.outline:
                code, length = EMPTY_CODE, 0
            elif length <= MAX_LABEL:
                length += int(self.pushed_length[state, token])
                code = self._push(code, state, token)
            state = int(self.next_state[state, token])
        return labels, True

    def _push(self, code: int, state: int, token: int) -> int:
        width = int(self.pushed_length[state, token])
        return code * RADIX**width + int(self.pushed[state, token])


def decode_label(code: int) -> str:
    """The label of a code: "2.1" of 1, 2, 10, 1 in base 11."""
    characters = ""
    while code >= RADIX:
        code, digit = divmod(code, RADIX)
        characters = NUMBER_CHARACTERS[digit] + characters
    return characters


def encode_label(label: str) -> int:
    """The code of a label; int32 for labels of at most `MAX_LABEL` characters."""
    code = EMPTY_CODE
    for character in label:
        code = code * RADIX + NUMBER_CHARACTERS.index(character)
    return code


class TableProtocol(Protocol, Interface):
    """A method that can run inside the jitted sampler: its decisions follow from a table."""

    @property
    def table(self) -> Table:
        """Ids and transitions."""
        ...

    @property
    def limits(self) -> ForkJoin:
        """Limits and policies."""
        ...
