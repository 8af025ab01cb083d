"""Chat templates: the ids of a prompt, and of a whole document."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tw_jax.config import configurable
from tw_jax.tokenizer.ids import join_ids
from tw_jax.tokenizer.interface import Tokenizer


@configurable
class Chat:
    r"""The chat template: the text around a question, and the end of an answer.

    "plain" is `{question}\n`, "qwen" the Qwen3 template with one user turn, and "llama" the Llama 3
    headers with one user turn. The instruction follows the question after one space, unless the
    question already ends with it, as in ThreadWeaver's tables. The newline that Qwen's template
    writes after the last `<|im_end|>` is left out, because it is never sampled.
    Source: ThreadWeaver (arXiv:2512.07843), training texts.

    Attributes:
      template: Template of the tokenizer's family.
      instruction: A sentence after every question; "" for none.
    """

    template: Literal["plain", "qwen", "llama"]
    instruction: str = ""

    def prompt(self, tokenizer: Tokenizer, question: str) -> np.ndarray:
        """Ids of the prompt, which ends before the first token of the answer.

        Args:
          tokenizer: Must have the special tokens of the template.
          question: Untrusted text. Control strings in it are encoded as plain text.

        Returns:
          [n] int32.

        Raises:
          ValueError: If the tokenizer lacks a special token of the template.
        """
        bare = not question.endswith(self.instruction)  # "" ends every question
        user = f"{question} {self.instruction}" if bare else question
        if self.template == "plain":
            return tokenizer.encode_plain(user + "\n")
        # The text between two special tokens is encoded as a whole, so that the ids equal those of
        # the whole prompt encoded at once.
        if self.template == "qwen":
            start, end = (self._special(tokenizer, s) for s in ("<|im_start|>", "<|im_end|>"))
            parts = [start, f"user\n{user}", end, "\n", start, "assistant\n"]
        else:
            names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
            start, end, turn, begin = (self._special(tokenizer, s) for s in names)
            parts = [begin, start, "user", end, f"\n\n{user}", turn]
            parts += [start, "assistant", end, "\n\n"]
        return join_ids(
            [part] if isinstance(part, int) else tokenizer.encode_plain(part) for part in parts
        )

    def answer_suffix(self, tokenizer: Tokenizer) -> np.ndarray:
        """The id that ends an answer, [1] int32. The sampler stops at the same id."""
        if self.template == "plain":
            return np.array(tokenizer.eos_ids[:1], np.int32)
        name = "<|im_end|>" if self.template == "qwen" else "<|eot_id|>"
        last = self._special(tokenizer, name)
        if last not in tokenizer.eos_ids:
            raise ValueError(
                f"Chat.template = {self.template!r}: answers end with {name} (id {last}), but the "
                f"sampler stops only at {tokenizer.eos_ids}. Add {name!r} to HuggingFace.eos."
            )
        return np.array([last], np.int32)

    def document(self, tokenizer: Tokenizer, question: str, response: str) -> np.ndarray:
        """Ids of a trajectory, [n] int32: prompt, response (trusted text), end of sequence."""
        prompt = self.prompt(tokenizer, question)
        return join_ids((prompt, tokenizer.encode(response), self.answer_suffix(tokenizer)))

    def _special(self, tokenizer: Tokenizer, text: str) -> int:
        try:
            return tokenizer.id_of(text)
        except ValueError as error:
            raise ValueError(
                f"Chat.template = {self.template!r}: {error} Use a tokenizer of that family, or "
                "set Chat.template to 'plain'."
            ) from None
