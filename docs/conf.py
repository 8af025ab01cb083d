"""The documentation site: `make docs-site` builds docs/_build/html, without a network."""

import importlib.metadata
import os
import pathlib
import sys

from pygments.lexers import PythonLexer
from sphinx.application import Sphinx

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]  # the package of this checkout
os.environ["JAX_PLATFORMS"] = "cpu"  # docstrings need no accelerator

project = "tw_jax"
author = "The tw_jax authors"
copyright = f"2026, {author}"
release = version = importlib.metadata.version("tw_jax")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "links",
    "public_names",
]
exclude_patterns = ["_build", "extensions"]

# Docstrings are Google style, and a name between single backticks is code, linked where it can be.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # fields of dataclasses
napoleon_use_rtype = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # as they are written, without the fields of a config
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

# GitHub's anchors, so that a link to a heading works here and in the repository.
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"tw_jax {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_domain_indices = False


def setup(app: Sphinx) -> None:
    """Gin's values are Python's."""
    app.add_lexer("gin", PythonLexer)
