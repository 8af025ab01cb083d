"""Bindings of includes, names that are checked, and what a checkpoint gives."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from tw_jax.config import configurable, load_config
from tw_jax.table import check_names


@configurable
class Bytes:
    """No vocabulary."""


@configurable
class Pieces:
    """A vocabulary."""

    path: str


@configurable
class Lora:
    """Adapters."""

    rank: int


@configurable
class Model:
    """A decoder."""

    depth: int = 1
    width: int = 1
    lora: Lora | None = None


@configurable
class Sample:
    """Draws from a checkpoint."""

    inherits: ClassVar[str] = "checkpoint"

    checkpoint: str | None
    model: Model
    tokenizer: Bytes | Pieces
    forkjoin: bool = False
    rows: int = 1


@configurable
class Judge:
    """Holds a sampler and a tokenizer of its own."""

    sample: Sample
    tokenizer: Bytes | Pieces


KNOWN = {
    "one": """
LanguageModel.model = @Model()
LanguageModel.tokenizer = @Pieces()
LanguageModel.forkjoin = @ForkJoin()
Model.depth = 5
Model.width = 6
Model.lora = None
Pieces.path = 'pieces'
ForkJoin.threads = 3
""",
    "adapted": """
LanguageModel.model = @Model()
LanguageModel.tokenizer = @Bytes()
Model.lora = @Lora()
Lora.rank = 4
Model.depth = 7
""",
    "wrong": "Model.depth = 'deep'",
    "misspelt": "Model.depht = 1",
}
REST = ["Sample.checkpoint = 'one'"]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# Includes.


def test_an_include_may_bind_what_this_root_does_not_use(tmp_path):
    shared = write(
        tmp_path / "shared.gin",
        "Sampler.rows = 4",
        "Mesh:",
        "  data = %data",
        "Sft.tokenizer = @HuggingFace()",
        "a/Model.depth = 3",
        "unused = 3",
        "Lora.rank = 2",
        "Model.lora = None",
    )
    run = write(tmp_path / "run.gin", "include 'shared.gin'", "data = 2", "Model.depth = 2")
    assert load_config(Model, run) == Model(depth=2)
    with pytest.raises(ValueError, match=r"^\S*shared.gin:1: Unknown config class Sampler. Model"):
        load_config(Model, shared)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("Pgrop.steps = 3", "Unknown config class Pgrop. Similar names: Pgrpo"),
        ("Sft.stepps = 3", "Unknown field Sft.stepps. Sft has "),
        ("Model.dpeth = 3", "Unknown field Model.dpeth. Model has depth, width, lora."),
        ("Sft.optim = @Optimm()", "Unknown config class @Optimm(). Similar names: Optim"),
        ("Sft.inherits = 'x'", "Unknown field Sft.inherits."),
        ("Qqqqqqqq.x = 1", "Unknown config class Qqqqqqqq."),
    ],
)
def test_misspelt_names_in_an_include_are_refused(line, sentence, tmp_path):
    shared = write(tmp_path / "shared.gin", "# a fragment", line)
    run = write(tmp_path / "run.gin", "include 'shared.gin'")
    with pytest.raises(ValueError, match="Unknown") as caught:
        load_config(Model, run)
    assert str(caught.value).startswith(f"{shared}:2, included by {run}:1: {sentence}")
    if "dpeth" not in line:  # the package has another Model
        with pytest.raises(ValueError, match="Unknown") as caught:
            check_names(run)
        assert str(caught.value).startswith(f"{shared}:2, included by {run}:1: {sentence}")


def test_unused_bindings_of_the_main_file_and_the_shell_stay_errors(tmp_path):
    run = write(tmp_path / "run.gin", "a/Model.depth = 3")
    with pytest.raises(ValueError, match=r"run.gin:1: Bound but never used: a/Model.depth"):
        load_config(Model, run)
    with pytest.raises(ValueError, match=r"^Bound but never used: a/Model.depth"):
        load_config(Model, [], ["a/Model.depth = 3"])


def test_a_path_may_be_text_or_a_path_or_several(tmp_path):
    file = write(tmp_path / "a.gin", "Model.depth = 2")
    for files in (file, str(file), [file], (str(file),)):
        assert load_config(Model, files).depth == 2


# What a checkpoint gives.


def test_what_a_checkpoint_records_needs_no_line():
    asked = []

    def describe(folder):
        asked.append(folder)
        return KNOWN[folder]

    built = load_config(Judge, [], REST, inherit=describe)
    assert asked == ["one"]
    assert built.sample.model == Model(depth=5, width=6)
    assert built.sample.tokenizer == built.tokenizer == Pieces(path="pieces")
    assert built.sample.forkjoin is False  # another type than the checkpoint's field of this name


def test_the_files_precede_a_checkpoint_in_every_visible_scope(tmp_path):
    lines = ["Model.depth = 1", "Judge.tokenizer = @Bytes()", "dir = 'one'"]
    file = write(tmp_path / "a.gin", *lines, "Sample.checkpoint = %dir")
    built = load_config(Judge, file, inherit=KNOWN.__getitem__)
    assert built.sample.model == Model(depth=1, width=6)
    assert built.sample.tokenizer == Pieces(path="pieces")
    assert built.tokenizer == Bytes()
    scoped = {"one": "LanguageModel.model = @m/Model()\nm/Model.depth = 5\nm/Model.width = 6"}
    rest = ["Judge.tokenizer = @Bytes()", "Sample.tokenizer = @Bytes()", *REST]
    built = load_config(Judge, [], [*rest, "Model.depth = 1"], inherit=scoped.__getitem__)
    assert built.sample.model == Model(depth=1, width=6)


def test_an_inherited_adapter_comes_by_its_line_and_none_beats_it():
    inherit = KNOWN.__getitem__
    rest = ["Sample.checkpoint = 'adapted'"]
    assert load_config(Sample, [], rest, inherit=inherit).model.lora == Lora(rank=4)
    assert load_config(Sample, [], [*rest, "Lora.rank=2"], inherit=inherit).model.lora == Lora(
        rank=2
    )
    assert load_config(Sample, [], [*rest, "Model.lora=None"], inherit=inherit).model.lora is None


def test_bindings_of_the_files_choose_before_the_lines_of_a_checkpoint():
    inherit = KNOWN.__getitem__
    built = load_config(Sample, [], [*REST, "Lora.rank = 2"], inherit=inherit)
    assert built.model == Model(depth=5, width=6, lora=Lora(rank=2))
    rest = ["Sample.checkpoint = 'adapted'", "Pieces.path = 'mine'"]
    assert load_config(Sample, [], rest, inherit=inherit).tokenizer == Pieces(path="mine")


def test_two_scopes_inherit_from_their_own_checkpoints():
    @configurable
    class Pair:
        left: Sample
        right: Sample

    lines = [
        "Pair.left = @a/Sample()",
        "Pair.right = @b/Sample()",
        "a/Sample.checkpoint = 'one'",
        "b/Sample.checkpoint = 'adapted'",
    ]
    pair = load_config(Pair, [], lines, inherit=KNOWN.__getitem__)
    assert (pair.left.model.depth, pair.right.model.depth) == (5, 7)
    assert pair.left.tokenizer == Pieces(path="pieces")
    assert pair.right.model.lora == Lora(rank=4)


def test_nothing_is_inherited_without_a_function_or_a_folder():
    rest = ["Sample.tokenizer = @Bytes()"]
    for lines in ([*rest, *REST], [*rest, "Sample.checkpoint = None"]):
        inherit = None if lines[-1] == REST[0] else KNOWN.__getitem__
        assert load_config(Sample, [], lines, inherit=inherit).model == Model()


def test_a_folder_from_the_shell_that_looks_like_a_number_is_text():
    rest = ["Sample.checkpoint=2024"]
    built = load_config(Sample, [], rest, inherit={"2024": KNOWN["one"]}.__getitem__)
    assert built.checkpoint == "2024"
    assert built.model.depth == 5


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("wrong", "wrong: Model.depth = 'deep' must be int, but is str."),
        ("misspelt", "misspelt: Unknown field Model.depht. Model has depth, width, lora."),
    ],
)
def test_an_error_about_an_inherited_binding_names_the_folder(folder, sentence):
    lines = [f"Sample.checkpoint = '{folder}'", "Sample.tokenizer = @Bytes()"]
    with pytest.raises((TypeError, ValueError)) as caught:
        load_config(Sample, [], lines, inherit=KNOWN.__getitem__)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Model.depth = ", "one:1: "),
        ("import os", "one: This text must not include or import."),
        ("include 'a.gin'", "one: This text must not include or import."),
        ("depth = 3", "one: The text of a checkpoint must not define macros: depth."),
    ],
)
def test_a_text_of_a_checkpoint_that_is_no_list_of_bindings_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(Sample, [], REST, inherit=lambda folder: text)
