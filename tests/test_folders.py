"""A folder is replaced as a whole or not at all, whatever happens on the way."""

from __future__ import annotations

import pytest

from tw_jax import folders


def fill(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_new_folder_takes_the_place_of_the_old_and_keeps_what_is_not_stale(tmp_path):
    fill(tmp_path / "out", a="old", b="old")
    with folders.replacing(tmp_path / "out", lambda name: name == "a") as new:
        assert content(new) == {"b": "old"}
        fill(new, c="new")
        assert content(tmp_path / "out") == {"a": "old", "b": "old"}
    assert content(tmp_path / "out") == {"b": "old", "c": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_folder_and_no_part_of_the_new(tmp_path, error):
    fill(tmp_path / "out", a="old")

    def fails():
        with folders.replacing(tmp_path / "out", bool) as new:
            fill(new, a="new")
            raise error

    with pytest.raises(type(error)):
        fails()
    assert content(tmp_path / "out") == {"a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_crash_left_is_put_right(tmp_path):
    fill(tmp_path / ".out.old", a="old")
    fill(tmp_path / ".out.part", a="half")
    with folders.replacing(tmp_path / "out", lambda _: False) as new:
        assert content(new) == {"a": "old"}
    assert content(tmp_path / "out") == {"a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
