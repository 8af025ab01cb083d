"""API pages: one table says on which page each public name of `tw_jax` is documented.

A page of docs/api/ holds the directive `public-names`, which is replaced by the docstrings of the
names of its topic. A name of `tw_jax.__all__` that no topic has is a warning, and so is a name that
is not public or has two topics; `make docs-site` treats warnings as errors.
"""

import inspect
import sys
import typing
from collections import Counter
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import tw_jax

TOPICS = {
    "models": """
        Model Rope Llama3Rope YarnRope Lora presets network Network load_model LanguageModel Mesh
        make_mesh
    """,
    "text": "Bytes HuggingFace SentencePiece load_tokenizer Chat",
    "trajectories": """
        trajectory Trajectory Call ForkJoin ThreadWeaver make_table cost_from_calls
    """,
    "tries": "trajectory_trie group_tries Trie Packing pack stack_rows TrieBatch",
    "training": """
        Optim initial_state TrainState make_sft_step advantages Scored pack_groups PolicyLoss
        make_pgrpo_step
    """,
    "sampling": "Sampler make_sampler",
    "rewards": "grade Task Problem RewardTerm",
    "pictures": "timeline_figure trie_figure",
    "configs": "configurable load_config",
}
"""A page of docs/api/ and the public names that it documents, in this order."""


def complaints(public: list[str]) -> Iterator[str]:
    """One sentence for each name that is not documented exactly once.

    Args:
      public: `tw_jax.__all__`.
    """
    pages = Counter(name for names in TOPICS.values() for name in names.split())
    for name in sorted({*public} - {*pages}):
        yield f"tw_jax.{name} is public and has no page. Add it to a topic of {__name__}.py."
    for name in sorted({*pages} - {*public}):
        yield f"tw_jax.{name} is not public. Remove it from {__name__}.py."
    for name in sorted(name for name, count in pages.items() if count > 1):
        yield f"tw_jax.{name} has {pages[name]} pages. Keep one topic of {__name__}.py."


def directive_of(name: str) -> str:
    """The directive that documents a public name, as a MyST block."""
    found: Any = getattr(tw_jax, name)
    if inspect.ismodule(found):
        lines = [f".. automodule:: tw_jax.{name}", "   :members:"]
    elif inspect.isclass(found):
        lines = [f".. autoclass:: tw_jax.{name}", "   :members:"]
    elif callable(found) and not typing.get_origin(found):
        lines = [f".. autofunction:: tw_jax.{name}"]
    else:
        lines = [f".. py:data:: tw_jax.{name}", "", *(f"   {line}" for line in _alias(name, found))]
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def _alias(name: str, found: Any) -> list[str]:
    """The lines under the assignment of a type or constant, which has no docstring of its own."""
    for module in [module for module in sys.modules if module.startswith("tw_jax.")]:
        if getattr(sys.modules[module], name, None) is found:
            docs = ModuleAnalyzer.for_module(module).find_attr_docs()
            if ("", name) in docs:
                return [f"``{found}``", "", *docs["", name]]
    return []


class PublicNames(SphinxDirective):
    """Documents the names of one topic."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The docstrings of the topic's names, one after another."""
        names = TOPICS[self.arguments[0]].split()
        return self.parse_text_to_nodes("\n".join(directive_of(name) for name in names))


def _skipped(app: Sphinx, kind: str, name: str, found: Any, skip: bool, options: Any) -> bool:
    """Methods that every config or every tuple has."""
    made = (inspect.getdoc(found) or "").startswith("Alias for field number")
    return skip or made or name in {"check", "replace"}


def _report(app: Sphinx) -> None:
    for sentence in complaints(tw_jax.__all__):
        logging.getLogger(__name__).warning(sentence)


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive and the check of the table to a build."""
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-skip-member", _skipped)
    app.connect("builder-inited", _report)
    return {"parallel_read_safe": True}
