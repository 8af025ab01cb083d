"""The control tokens of each method, one id each in every vocabulary that is used with it.

The one place that lists them: a tokenizer gets a list as its argument and knows no method.
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
"""Marks of reasoning that pretrained vocabularies have; text from outside must not become them."""
