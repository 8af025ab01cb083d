"""The control tokens of each method. A vocabulary that is used with a method has one id for each.

Tokenizers receive such a list as an argument and do not depend on a method.
"""

from __future__ import annotations

THREADWEAVER = (
    "<Think>",
    "</Think>",
    "<Parallel>",
    "</Parallel>",
    "<Outlines>",
    "</Outlines>",
    "<Outline>",
    "</Outline>",
    "<Thread>",
    "</Thread>",
    "<Conclusion>",
    "</Conclusion>",
)
"""ThreadWeaver's control tokens, in the order in which they are added to a vocabulary."""

THINK = ("<think>", "</think>")
"""Marks of reasoning in pretrained vocabularies. Untrusted text is never encoded as one of them."""
