"""Links that are written for a reader of the repository lead to the same place on the site.

README.md and CHANGELOG.md are included by pages of docs/, so their links are read from the
repository's root; a link to either leads to the page that includes it. Any other file outside docs/
is not a page, so a link to it downloads the file. A link to a file that does not exist is left
alone, and the build warns about it.
"""

import os
import pathlib
import re

from sphinx.application import Sphinx

DOCS = pathlib.Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
PAGES = {ROOT / "README.md": DOCS / "index.md", ROOT / "CHANGELOG.md": DOCS / "changelog.md"}
"""A file outside docs/ and the page that includes it."""

LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def rewrite(text: str, *, source: pathlib.Path, page: pathlib.Path) -> str:
    """The text of `source` with the links that it needs as a part of `page`.

    Args:
      text: Markdown.
      source: folder of the file that the text is in.
      page: folder of the page that shows it.
    """

    def replaced(match: re.Match[str]) -> str:
        target = (source / match[1]).resolve()
        if not target.exists():
            return match[0]
        target = PAGES.get(target, target)
        scheme = "" if target.is_relative_to(DOCS) else "path:"
        return f"]({scheme}{os.path.relpath(target, page)}"

    return LINK.sub(replaced, text)


def _on_source(app: Sphinx, docname: str, content: list[str]) -> None:
    folder = (DOCS / docname).parent
    content[0] = rewrite(content[0], source=folder, page=folder)


def _on_include(app: Sphinx, path: pathlib.Path, docname: str, content: list[str]) -> None:
    source = (DOCS / path).resolve().parent
    content[0] = rewrite(content[0], source=source, page=(DOCS / docname).parent)


def setup(app: Sphinx) -> dict[str, bool]:
    """Rewrites the links of every page and of every included file."""
    app.connect("source-read", _on_source)
    app.connect("include-read", _on_include)
    return {"parallel_read_safe": True}
