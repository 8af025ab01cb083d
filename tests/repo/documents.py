"""Documents that are generated from the code. `make docs` writes them; a test compares them."""

import importlib
import pathlib

import tiny
from repo.figure import draw, draw_multiplication, draw_quickstart, draw_threads
from repo.fits import fits
from repo.notebook import notebook
from repo.sources import ROOT, VERBS, has_config

from tw_jax import config
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.models.load import LanguageModel
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.sentencepiece import SentencePiece

CONFIGS = ROOT / "configs"


def inherited(folder: str) -> str:
    """What a checkpoint would say of its model, for configs whose checkpoints do not exist."""
    return config.operative(
        LanguageModel(
            model=tiny.MODEL,
            tokenizer=SentencePiece(path=f"{folder}/tokenizer.model"),
            chat=Chat(template="plain"),
            forkjoin=ForkJoin(),
        )
    )


LISTING = """# Configs

After reading this page you can write the config of a run and change one from the command line. One
folder per verb holds its runs: `tw sft configs/sft/demo.gin`. The other folders hold fragments,
which runs include. The end of the page lists the first line of each file. `make docs` writes this
page.

## How to write one

A file is [gin](https://github.com/google/gin-config) text. A line binds a field of a class, and a
later line of the same field wins. A verb's root class has the verb's name, `tw config show sft`
lists every field that a file may set, and `tw config check FILE ...` checks files without running
them.

```text
include '../models/tiny.gin'        # found in this file's folder, else in the working directory
Sft.workdir = 'runs/mine'           # text needs quotes
Sft.steps = %steps                  # a macro ...
steps = 900                         # ... which is bound once, before or after its use
Sft.batch_rows = %gin.REQUIRED      # another file or --set must bind this
Optim:                              # a block binds several fields of one class
  peak_lr = 2.5e-3
  algorithm = 'muon'
SentencePiece.path = 'tokenizer.model'
Lora.rank = 8
```

- **Classes need no line to be connected.** A field of one config class, such as `Sft.model`, is
  built from the bindings of the class. A default such as `Sft.mesh` is built again if its class is
  bound.
- **A union** takes the class that has bindings: `SentencePiece.path` chooses the tokenizer. If none
  or several of its classes have bindings, the error lists the lines that choose, such as
  `Sft.tokenizer = @Bytes()`. A line always wins.
- **An optional** such as `Model.lora` is built if its class is bound and only this field leads to
  the class. Otherwise it needs a line, `Model.lora = @Lora()`. `Model.lora = None` in a later file
  or line switches it off.
- **Scopes** make two configs of one class: `Pair.left = @a/Model()` is built with `a/Model.width =
  8` and, for other fields, with the unscoped bindings of `Model`.
- **Includes** may bind classes that a verb does not use, so that one fragment serves all verbs.
  Misspelt names are refused there, too. In the run's own file, a binding that nothing uses is an
  error.
- **The command line** comes last: `--set Sft.steps=10`, `--set steps=10` for a macro,
  `--set Model.lora=None`. Text needs no quotes.
- **Your own classes**: `tw pgrpo run.gin --import my_rewards` imports `my_rewards.py` of the
  current folder, and its config classes can be used in `run.gin`. A file cannot import.
"""
FIELDS = """# Config fields

On this page you can look up every field that a `.gin` file may set, by verb, with its type and
default. A field without a default must be set, except if its type is one config class, which is
then built. `make docs` writes this page from the classes.
"""


def first_line(path: pathlib.Path) -> str:
    """The first line of a config file, a comment that describes it."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    if not line.startswith("# "):
        raise ValueError(
            f"{path.relative_to(ROOT)} must open with a comment that says what the file is, not "
            f"with {line!r}. Put one line, '# ...', at its top."
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


def quickstart() -> str:
    """docs/quickstart.ipynb, without the sentence that leads to it."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    return notebook(page.replace("The same page is a [notebook](quickstart.ipynb).\n\n", ""))


MADE = {
    "configs/README.md": listing,
    "docs/configs.md": fields,
    "docs/fits.md": fits,
    "docs/trie.svg": draw,
    "docs/images/threads.svg": draw_threads,
    "docs/images/trie.svg": draw_multiplication,
    "docs/images/quickstart.svg": draw_quickstart,
    "docs/quickstart.ipynb": quickstart,
}
"""Paths from the root of the repository, and the functions that make their texts."""


def main() -> None:
    """Writes all generated documents."""
    for name, make in MADE.items():
        (ROOT / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
