"""A folder is held by one job at a time, and its configs tell which runs wrote there."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import re
import subprocess
import sys

import pytest
from repo.documents import root_of
from repo.sources import PACKAGE, VERBS, has_config

from tw_jax import hosts, workdir
from tw_jax.config import configurable

HOLD = """
import sys, time
from tw_jax import workdir
with workdir.held([sys.argv[1]], "tw sft first.gin"):
    print("held", flush=True)
    time.sleep(600)
"""


@configurable
class Toy:
    """A run.

    Attributes:
      workdir: its folder.
      rate: a number.
    """

    workdir: str
    rate: float = 1.0


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_job_holds_is_refused_until_that_job_is_killed(
    other, tmp_path, monkeypatch
):
    monkeypatch.setattr(workdir, "PATIENCE_SECONDS", 0.1)
    told = rf"run is in use by process {other.pid} on \S+, started .* UTC: tw sft first\.gin\. Two"
    with pytest.raises(ValueError, match=told), workdir.held([str(tmp_path / "run")], "tw"):
        pass
    (tmp_path / "run" / ".lock").write_text("[1]")  # whatever stands there, the lock counts
    told = "run is in use by another job"
    with pytest.raises(ValueError, match=told), workdir.held([str(tmp_path / "run")], "tw"):
        pass
    other.kill()
    monkeypatch.setattr(workdir, "PATIENCE_SECONDS", 30)
    with workdir.held([str(tmp_path / "run")], "tw"):
        pass


def test_one_process_cannot_hold_a_folder_twice(tmp_path):
    folder = str(tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    with workdir.held([folder, folder], "tw sft a.gin"):
        told = r"is in use by process \d+ on .*: tw sft a\.gin\."
        with pytest.raises(ValueError, match=told), workdir.held([str(tmp_path / "link")], "tw"):
            pass
    with workdir.held([folder], "tw"):
        pass


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), workdir.held([str(tmp_path)], "tw"):
        raise KeyError
    with workdir.held([str(tmp_path)], "tw"):
        pass


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.warns(UserWarning, match="cannot be locked .* no other job writes there"),
        workdir.held([str(tmp_path)], "tw"),
    ):
        pass


def test_every_process_of_a_job_is_refused_with_the_sentence_of_process_0(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "require_shared", lambda folder: None)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "gather", lambda _: ["run is in use by another job.", None])
    with pytest.raises(ValueError, match="in use by"), workdir.held([str(tmp_path)], "tw"):
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(hosts, "gather", lambda _: [None, None])
    with workdir.held([str(tmp_path)], "tw"):
        pass


def test_earlier_configs_are_kept_under_numbers(tmp_path):
    for rate in (1.0, 2.0, 2.0, 3.0):
        workdir.record(Toy(workdir=str(tmp_path), rate=rate))
    rates = {
        file.name: re.findall(r"Toy.rate = (.*)", file.read_text()) for file in tmp_path.iterdir()
    }
    assert rates == {"config.gin": ["3.0"], "config.1.gin": ["1.0"], "config.2.gin": ["2.0"]}


@pytest.mark.parametrize("verb", sorted(filter(has_config, VERBS)))
def test_a_program_with_a_workdir_records_its_config(verb):
    source = (PACKAGE / "programs" / f"{verb}.py").read_text(encoding="utf-8")
    has_workdir = "workdir" in {field.name for field in dataclasses.fields(root_of(verb))}
    assert has_workdir == ("workdir.record(cfg)" in source)


def test_the_header_names_the_commit_of_this_checkout_only(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    package = tmp_path / "tw_jax"
    package.mkdir()
    (package / "workdir.py").write_text("")
    monkeypatch.setattr(workdir, "__file__", str(package / "workdir.py"))
    assert "commit" not in workdir.origin()
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert re.search(r", commit [0-9a-f]{40}$", workdir.origin())
    (package / "workdir.py").write_text("changed")
    assert workdir.origin().endswith(" with local changes")
    nested = tmp_path / "venv" / "tw_jax"
    nested.mkdir(parents=True)
    monkeypatch.setattr(workdir, "__file__", str(nested / "workdir.py"))
    assert "commit" not in workdir.origin()
