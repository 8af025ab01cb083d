"""Documents that are generated from the code. `make docs` writes them; a test compares them."""

import importlib
import pathlib

from repo.figure import draw, draw_multiplication, draw_threads
from repo.fits import fits
from repo.sources import ROOT, VERBS, has_config

from tw_jax import config

CONFIGS = ROOT / "configs"

LISTING = """# Configs

One folder per verb holds its runs: `tw sft configs/sft/demo.gin`. A verb's root config has the
verb's name, and `tw config show sft` lists every field that a file may set. The other folders hold
fragments, which a run includes. The first line of a file describes it; this page lists those
lines and is written by `make docs`.
"""
FIELDS = """# Config fields

Every field that a `.gin` file may set, by verb, with its type and default. A field without a
default must be set. Written by `make docs` from the classes themselves.
"""


def first_line(path: pathlib.Path) -> str:
    """The first line of a config file, a comment that describes it."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    if not line.startswith("# "):
        raise ValueError(
            f"{path.relative_to(ROOT)} begins with {line!r} instead of a comment that describes "
            "the file. Put a line '# ...' at its top."
        )
    return line.removeprefix("# ")


def root_of(verb: str) -> type:
    """The root config of a verb: the class in its program that has the verb's name."""
    return getattr(importlib.import_module(f"tw_jax.programs.{verb}"), verb.capitalize())


def listing() -> str:
    """configs/README.md."""
    parts = [LISTING]
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        parts.append(f"\n## {folder.name}/\n\n")
        parts += [f"- `{p.name}`: {first_line(p)}\n" for p in sorted(folder.glob("*.gin"))]
    return "".join(parts)


def fields() -> str:
    """docs/configs.md."""
    parts = [FIELDS]
    for verb in filter(has_config, VERBS):
        parts.append(f"\n## tw {verb}\n\n```text\n{config.describe(root_of(verb)).rstrip()}\n```\n")
    return "".join(parts)


MADE = {
    "configs/README.md": listing,
    "docs/configs.md": fields,
    "docs/fits.md": fits,
    "docs/trie.svg": draw,
    "docs/images/threads.svg": draw_threads,
    "docs/images/trie.svg": draw_multiplication,
}
"""Paths from the root of the repository, and the functions that make their texts."""


def main() -> None:
    """Writes all generated documents."""
    for name, make in MADE.items():
        (ROOT / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
