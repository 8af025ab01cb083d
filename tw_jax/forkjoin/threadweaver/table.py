"""ThreadWeaver's `Table`: control ids and the automaton of outline numbers, off a tokenizer."""

from __future__ import annotations

import numpy as np

from tw_jax.forkjoin.table import (
    AFTER_DOT,
    IDLE,
    IN_NUMBER,
    MAX_LABEL,
    NUMBER_CHARACTERS,
    RADIX,
    STATES,
    TABLED_LABELS,
    WANT_COLON,
    WANT_DIGIT,
    Table,
    encode_label,
)
from tw_jax.tokenizer.interface import Tokenizer, require_single_ids


def make_table(tokenizer: Tokenizer) -> Table:
    """Reads the control ids and the outline automaton off a tokenizer.

    Raises:
      ValueError: a control token, a digit, the newline or the colon is not exactly one id.
    """
    tags = ("<Outlines>", "</Outlines>", "<Outline>", "<Thread>", "</Thread>", "</Parallel>")
    require_single_ids(tokenizer, (*tags, *NUMBER_CHARACTERS, "\n", ":"))
    tag = {text: tokenizer.id_of(text) for text in tags}
    automaton = _automaton(tokenizer, tag["<Outline>"])
    labels = [tokenizer.encode(f":{n}")[1:] for n in range(1, TABLED_LABELS + 1)]
    width = max(len(ids) for ids in labels)
    return Table(
        outlines=tag["<Outlines>"],
        end_outlines=tag["</Outlines>"],
        outline=tag["<Outline>"],
        thread=tag["<Thread>"],
        end_thread=tag["</Thread>"],
        end_parallel=tag["</Parallel>"],
        newline=tokenizer.id_of("\n"),
        colon=tokenizer.id_of(":"),
        eos=np.array(tokenizer.eos_ids, np.int32),
        next_state=automaton[0],
        pushed=automaton[1],
        pushed_length=automaton[2],
        completes=automaton[3],
        character=np.array([tokenizer.id_of(c) for c in NUMBER_CHARACTERS], np.int32),
        label=np.array([np.pad(ids, (0, width - len(ids))) for ids in labels], np.int32),
        label_length=np.array([len(ids) for ids in labels], np.int32),
    )


def _automaton(
    tokenizer: Tokenizer, outline: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs the character automaton over every token's text, from every state."""
    shape = (STATES, tokenizer.vocab_size)
    next_state, pushed = np.zeros(shape, np.int8), np.zeros(shape, np.int32)
    pushed_length, completes = np.zeros(shape, np.int8), np.zeros(shape, bool)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.piece(token)
        # Most tokens fail at their first character; IDLE stays IDLE without looking.
        if text and (text[0] in NUMBER_CHARACTERS or text[0] == ":" or text[0].isspace()):
            for state in range(1, STATES):
                after, digits, done = _read(text, state)
                next_state[state, token] = after
                kept = digits[: MAX_LABEL + 1]
                pushed[state, token] = encode_label(kept[:MAX_LABEL]) - RADIX ** len(
                    kept[:MAX_LABEL]
                )
                pushed_length[state, token] = len(kept)
                completes[state, token] = done
    next_state[:, outline] = WANT_DIGIT
    pushed[:, outline] = pushed_length[:, outline] = 0
    completes[:, outline] = False
    return next_state, pushed, pushed_length, completes


def _read(text: str, state: int) -> tuple[int, str, bool]:
    """State after the characters, number characters read, and whether the colon was met."""
    digits = ""
    for character in text:
        if character in "0123456789" and state in (WANT_DIGIT, IN_NUMBER, AFTER_DOT):
            state, digits = IN_NUMBER, digits + character
        elif character == "." and state == IN_NUMBER:
            state, digits = AFTER_DOT, digits + character
        elif character.isspace() and state in (WANT_DIGIT, WANT_COLON):
            pass
        elif character.isspace() and state == IN_NUMBER:
            state = WANT_COLON
        elif character == ":" and state in (IN_NUMBER, WANT_COLON):
            return IDLE, digits, True
        else:
            return IDLE, "", False
    return state, digits, False
