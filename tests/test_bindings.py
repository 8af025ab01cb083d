"""gin text to bindings: where includes are looked for, and which place an error names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tw_jax.config import configurable, load_config


@configurable
class Model:
    """A decoder."""

    depth: int
    width: int = 64

    def check(self):
        if self.width % 8:
            raise ValueError(f"Model.width = {self.width} must be a multiple of 8.")


@configurable
class Sft:
    """A run."""

    model: Model
    workdir: str | None = None
    axes: tuple[tuple[str, int], ...] = ()


REST = ["Sft.model = @Model()", "Model.depth = 2", "Sft.workdir = 'runs'"]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("include", "folder", "working"),
    [
        ("tiny.gin", "configs/sft", "/"),
        ("../models/tiny.gin", "configs/models", "/"),
        ("configs/models/tiny.gin", "elsewhere/configs/models", "elsewhere"),
    ],
)
def test_includes_are_found_beside_the_file_and_from_the_working_directory(
    include, folder, working, tmp_path, monkeypatch
):
    write(tmp_path / folder / "tiny.gin", "Model.depth = 2")
    run = write(tmp_path / "configs/sft/run.gin", "\n".join([f"include '{include}'", *REST[::2]]))
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / working if working != "/" else "/")
    assert load_config(Sft, [run]).model.depth == 2


def test_includes_are_not_looked_for_in_the_folders_above(tmp_path, monkeypatch):
    write(tmp_path / "tiny.gin", "Model.depth = 2")
    run = write(tmp_path / "configs/sft/run.gin", "\n".join(["include 'tiny.gin'", *REST[::2]]))
    monkeypatch.chdir("/")
    with pytest.raises(
        FileNotFoundError, match=r"run\.gin:1: there is no 'tiny.gin' in the folder of this file"
    ):
        load_config(Sft, [run])


@pytest.mark.parametrize(
    ("line", "column", "what"),
    [
        ("Model.depth = seven", 14, "Failed to parse token 'seven'"),
        ("Model.depth == 3", 12, "expected ':' or '='"),
        ("Model.depth = 2 * 3", 16, "Expected newline"),
        ("Sft.axes = (1, 2", None, "EOF in multi-line statement"),
        ("Sft.workdir = 'open", None, ""),
    ],
)
def test_a_syntax_error_points_at_its_line_and_column(line, column, what, tmp_path):
    file = write(tmp_path / "run.gin", "\n".join([*REST, line, ""]))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the text is judged below)
        load_config(Sft, [file])
    first, *excerpt = str(caught.value).split("\n")
    assert what in first
    if column is not None:
        assert first.startswith(f"{file}:4: ")
        assert excerpt == [f"  {line}", f"  {' ' * column}^"]


def test_a_missing_file_and_a_missing_include_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^nowhere.gin: there is no such config file"):
        load_config(Sft, ["nowhere.gin"])
    file = write(tmp_path / "run.gin", "include 'nowhere.gin'")
    with pytest.raises(FileNotFoundError, match=r"^\S*run.gin:1: there is no 'nowhere.gin'"):
        load_config(Sft, [file])


def test_files_that_include_one_another_are_refused(tmp_path):
    write(tmp_path / "a.gin", "include 'b.gin'")
    b = write(tmp_path / "b.gin", "include 'a.gin'")
    with pytest.raises(ValueError, match=r"in a circle: .*b.gin -> .*a.gin -> .*b.gin"):
        load_config(Sft, [b])


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        ("Model.depth = seven", "Failed to parse token 'seven'"),
        ("Model.dpeth = 3", "Unknown field Model.dpeth"),
        ("Model.depth = 'seven'", "Model.depth = 'seven' must be int, but is str."),
        ("Model.width = 7", "Model.width = 7 must be a multiple of 8."),
        ("include 'nowhere.gin'", "there is no 'nowhere.gin' in the folder of this file"),
        ("import os", "A config file must not import"),
    ],
)
def test_an_error_names_the_file_it_is_in_and_the_chain_of_includes(last, sentence, tmp_path):
    c = write(tmp_path / "c.gin", f"\nModel.depth = 2\n{last}\n")
    b = write(tmp_path / "b.gin", "# b\ninclude 'c.gin'")
    a = write(tmp_path / "a.gin", "\n".join(["include 'b.gin'", *REST[::2]]))
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        load_config(Sft, [a])
    told = f"{c}:3, included by {b}:2, included by {a}:1: {sentence}"
    assert str(caught.value).startswith(told)


def test_a_syntax_error_behind_an_include_shows_the_line_of_its_own_file(tmp_path):
    write(tmp_path / "b.gin", "# one\n# two\n# three\nModel.width = 8")
    a = write(tmp_path / "a.gin", "include 'b.gin'\n\nModel.depth = seven\n# four")
    with pytest.raises(ValueError, match=r"Model.depth = seven") as caught:
        load_config(Sft, [a])
    assert str(caught.value).startswith(f"{a}:3: Failed")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"Model.depth = {'[' * 10_000}{']' * 10_000}", ":1: More than 50 brackets are nested"),
        (f"Model.depth = {'(' * 10_000}", ":1: "),
        ("\n".join([*(f"m{n} = %m{n + 1}" for n in range(5000)), "Model.depth = %m0"]), "nested"),
        ("Model.depth = {[1]: 2}", ":1: unhashable type"),
        (f"Model.depth = {'9' * 5000}", ":1: "),
        ("Model.depth = \0", ":1: "),
        ("Model.depth = ", ":1: "),
        ("Model:", ":2: "),
        ("%", ":1: "),
    ],
)
def test_hostile_gin_ends_in_a_sentence(text, sentence, tmp_path):
    file = write(tmp_path / "run.gin", text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the text is judged below)
        load_config(Model, [file])
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", ["[" * 10_000, "9" * 5000, "'", "{[1]:2}", "0x" + "f" * 9000])
def test_a_hostile_single_binding_ends_in_a_sentence(value):
    with pytest.raises((ValueError, TypeError)) as caught:
        load_config(Model, [], [f"Model.depth={value}"])
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_not_text_is_refused_with_a_sentence(tmp_path):
    file = tmp_path / "run.gin"
    file.write_bytes(b"Model.depth = 2\n\xff")
    with pytest.raises(ValueError, match=r"run.gin: byte 16 is not UTF-8"):
        load_config(Model, [file])


def test_a_long_chain_of_includes_ends_in_a_sentence(tmp_path):
    for number in range(200):
        write(tmp_path / f"{number}.gin", f"include '{number + 1}.gin'")
    with pytest.raises(ValueError, match="nested in more than 50 includes"):
        load_config(Model, [tmp_path / "0.gin"])
