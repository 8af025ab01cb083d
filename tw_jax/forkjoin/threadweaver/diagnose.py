"""Says in words what is wrong with a written response that the protocol could not have produced."""

from __future__ import annotations

import contextlib

import numpy as np

from tw_jax.forkjoin.replay import ReplayError, replay
from tw_jax.forkjoin.threadweaver.grammar import Document, normalise, point
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.interface import Tokenizer


def explain(
    error: ReplayError,
    document: Document,
    protocol: ThreadWeaver,
    *,
    tokenizer: Tokenizer,
    chat: Chat,
    question: str,
    response: str,
) -> str:
    """Returns the broken rule, a remedy, and the line, the column and an excerpt of the response.

    Args:
      error: The error of the replay.
      document: The response, parsed.
      protocol: The protocol, with its limits.
      tokenizer: The tokenizer of the replay.
      chat: The chat template of the replay.
      question: The question, without template.
      response: The response that does not replay.
    """
    prompt = len(chat.prompt(tokenizer, question))
    advice = _normalising(protocol, tokenizer, chat, question=question, response=response)
    rule = None if advice else _broken_rule(document, protocol)
    if rule is not None:
        sentence, at = rule
        advice = "Correct the block, or leave the record out."
    else:
        ids = chat.document(tokenizer, question, response)
        sentence = _in_words(error, ids, tokenizer)
        at = min(len(tokenizer.decode(ids[prompt : error.position])), len(response))
    advice = advice or (
        "Normalising the response does not help. Raise the limit that it exceeds, change the "
        "response, or leave the record out."
    )
    return f"{sentence} {advice}\n{point(response, at)}"


def _in_words(error: ReplayError, ids: np.ndarray, tokenizer: Tokenizer) -> str:
    if error.forced is None:
        return str(error)
    forced, reason = error.forced
    found = tokenizer.decode(ids[error.position : error.position + 1])
    return (
        f"The response has {found!r} where the protocol forces {tokenizer.decode([forced])!r} "
        f"({reason}). Either it is not in canonical form, or the tokenizer joins a forced token "
        "with its neighbour."
    )


def _broken_rule(document: Document, protocol: ThreadWeaver) -> tuple[str, int] | None:
    """The first rule of blocks that a response breaks, and the character where the block begins."""
    most = protocol.limits.max_threads
    for block in document.blocks:
        at, outlines, threads = block.at[0], block.outlines, block.threads
        counts = f"{_count(outlines, 'outline')} and {_count(threads, 'thread')}"
        if len(outlines) != len(threads):
            return f"A block has {counts}. It needs one thread for each outline.", at
        pairs = zip(outlines, threads, strict=True)
        wrong = next(((o, t) for o, t in pairs if o.number != t.number), None)
        if wrong is not None:
            outline, thread = wrong
            numbers = f"{_short(thread.number)} where its outline has {_short(outline.number)}"
            return (
                f"A thread has the number {numbers}. "
                "Threads must have the numbers of the outlines, in the same order.",
                thread.at[0],
            )
        if len(threads) > most:
            return f"A block has {counts}, and ForkJoin.max_threads = {most} allows fewer.", at
        empty = next((thread for thread in threads if not thread.body), None)
        if empty is not None:
            return f"Thread {_short(empty.number)} is empty. Each thread needs a text.", empty.at[0]
    return None


def _short(number: str) -> str:
    """The number of an outline or a thread, cut off if it is long: models write the text."""
    return number if len(number) <= 20 else f"{number[:20]}..."


def _count(things: tuple[object, ...], name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")


def _normalising(
    protocol: ThreadWeaver, tokenizer: Tokenizer, chat: Chat, *, question: str, response: str
) -> str:
    """The advice to normalise a response, if it would help; else ""."""
    text = normalise(response)
    if text != response:
        ids = chat.document(tokenizer, question, text)
        with contextlib.suppress(ReplayError):
            replay(protocol, ids, len(chat.prompt(tokenizer, question)))
            return "Normalise the response (threadweaver.grammar.normalise), and it replays."
    return ""
