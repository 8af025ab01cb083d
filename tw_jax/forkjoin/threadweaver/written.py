"""Written responses to trajectories, with the checks that a replay alone does not make.

`trajectory` is for scripts, and `replay_response` for callers that have a protocol already. Both
accept the same texts and refuse the others in the same words.
"""

from __future__ import annotations

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.replay import ReplayError, replay
from tw_jax.forkjoin.threadweaver.diagnose import explain
from tw_jax.forkjoin.threadweaver.grammar import Document, GrammarError, parse, point
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.ids import check_ids
from tw_jax.tokenizer.interface import Tokenizer


def trajectory(
    tokenizer: Tokenizer,
    chat: Chat,
    question: str,
    response: str,
    limits: ForkJoin = ForkJoin(),  # noqa: B008  (immutable)
) -> Trajectory:
    """Returns the calls that inference would have made to write a response.

    The response is replayed through the protocol, so that the contexts of training are those of
    inference. `trajectory_trie` makes a trie of the result. Nothing is corrected: a text that the
    protocol could not have written is refused.

    Args:
      tokenizer: Must have the control tokens, as those of `load_tokenizer` do.
      chat: Turns the question into a prompt.
      question: The question, without template. Control strings in it stay text.
      response: The response in ThreadWeaver's format: `<Parallel>` holds `<Outlines>` with one
        numbered `<Outline>` for each `<Thread>`. The end of sequence is added.
      limits: Limits of fork and join.

    Returns:
      The trajectory. Its calls have no log-probs, because nothing was sampled.

    Raises:
      ValueError: If a tag is not closed, a block has no outlines, a thread has no outline with its
        number, or the response exceeds a limit. The message names the line and the column.
    """
    protocol = ThreadWeaver(make_table(tokenizer), limits)
    return replay_response(protocol, tokenizer, chat, question=question, response=response)


def replay_response(
    protocol: ThreadWeaver,
    tokenizer: Tokenizer,
    chat: Chat,
    *,
    question: str,
    response: str,
) -> Trajectory:
    """As `trajectory`, with a protocol whose table was made of the same tokenizer.

    Raises:
      ValueError: See `trajectory`.
    """
    ids = chat.document(tokenizer, question, response)
    check_ids(ids, tokenizer.vocab_size, "The response")
    try:
        # The grammar sees what the protocol leaves to the model (a block that is never closed),
        # and points at the character, which says more than a token index.
        document = parse(response)
    except GrammarError as error:
        raise ValueError(str(error)) from error
    bare = next((block for block in document.blocks if not block.outlines), None)
    if bare and protocol.limits.parallel:
        raise ValueError(
            "A block has no outlines, so nothing forks and its threads would be trained as one "
            "text of the parent. Write an outline for each thread, or leave the record out.\n"
            f"{point(response, bare.at[0])}"
        )
    try:
        made = replay(protocol, ids, len(chat.prompt(tokenizer, question)))
    except ReplayError as error:
        sentence = explain(
            error,
            document,
            protocol,
            tokenizer=tokenizer,
            chat=chat,
            question=question,
            response=response,
        )
        raise ValueError(sentence) from error
    _refuse_unforked(document, made, protocol)
    return made


def _refuse_unforked(document: Document, made: Trajectory, protocol: ThreadWeaver) -> None:
    """Refuses threads that no call wrote, because no outline has their number."""
    written = sum(len(block.threads) for block in document.blocks)
    forked = sum(call.is_thread for call in made.calls)
    if protocol.limits.parallel and written != forked:
        raise ValueError(
            f"The response has {written} threads, and the protocol forks {forked} of them. Each "
            "needs an outline with its number, of at most 8 characters. Add the outlines, or leave "
            "the record out."
        )
