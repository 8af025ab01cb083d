"""The command line: verbs from modules, configs from files, sentences instead of tracebacks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import pytest
from repo.sources import ROOT

import tw_jax.programs
from tw_jax import cli, workdir
from tw_jax.config import load_config
from tw_jax.programs.evaluate import Evaluate

TRAIN = '''
"""Trains a toy.

More words.
"""

from tw_jax import workdir
from tw_jax.config import configurable


@configurable
class Optim:
    """The optimiser.

    Attributes:
      lr: learning rate.
    """

    lr: float = 0.1


@configurable
class Train:
    """A toy run.

    Attributes:
      optim: how to step.
      workdir: where to leave files.
    """

    optim: Optim
    workdir: str | None = None
    fail: str = ""
    status: int = 0


seen = []


def run(cfg):
    seen.append(cfg)
    if cfg.fail == "disk":
        raise OSError(28, "The disk is full")
    if cfg.fail == "bug":
        raise KeyError("bug")
    if cfg.fail:
        raise ValueError(cfg.fail)
    if cfg.workdir is not None:
        workdir.record(cfg)
    return cfg.status or None
'''

TIME = '''
"""`tw time`: Times things."""

seen = []


def main(argv):
    seen.append(argv)
    return 3
'''


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Two programs in place of the package's own, and a config; the folder is the working one."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "time.py").write_text(TIME)
    (folder / "broken.py").write_text('"""Cannot be imported."""\nraise RuntimeError\n')
    (tmp_path / "configs/train").mkdir(parents=True)
    (tmp_path / "configs/train/toy.gin").write_text("Train.optim = @Optim()\n")
    monkeypatch.setattr(tw_jax.programs, "__path__", [str(folder)])
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield sys.modules
    for name in set(sys.modules) - before:
        if name.startswith("tw_jax.programs."):
            del sys.modules[name]


TOY = "configs/train/toy.gin"


def test_a_verb_builds_its_root_from_the_file_and_runs_it(programs):
    assert cli.main(["train", TOY, "--set", "Optim.lr=1", "--set", "Train.status=0"]) == 0
    (cfg,) = programs["tw_jax.programs.train"].seen
    assert (type(cfg).__name__, cfg.optim.lr) == ("Train", 1.0)


def test_the_status_of_a_program_is_the_exit_status(programs):
    assert cli.main(["train", TOY, "--set", "Train.status=7"]) == 7


def test_a_program_with_main_gets_the_words_as_they_are(programs):
    assert cli.main(["time", "attention", "--json"]) == 3
    assert programs["tw_jax.programs.time"].seen == [["attention", "--json"]]


def test_only_the_program_asked_for_is_imported(programs):
    assert cli.main(["train", TOY]) == 0
    imported = {name for name in programs if name.startswith("tw_jax.programs.")}
    assert "tw_jax.programs.train" in imported
    assert not {"tw_jax.programs.time", "tw_jax.programs.broken"} & imported


def test_help_lists_every_verb_with_its_line_and_imports_none(programs, capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^  (\w+) +(\S.*)$", out.partition("Verbs:")[2], re.MULTILINE) == [
        ("broken", "Cannot be imported."),
        ("time", "Times things."),
        ("train", "Trains a toy."),
    ]
    assert "tw_jax.programs.broken" not in programs


def test_no_words_print_the_help_and_fail(programs, capsys):
    assert cli.main([]) == 2
    assert "Usage: tw VERB" in capsys.readouterr().err


def test_the_help_of_a_verb_names_the_command_that_lists_fields(programs, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "Trains a toy." in out
    assert "tw config show train" in out


# The run's own config.


def test_a_run_writes_the_config_that_starts_it_again(programs, capsys):
    workdir = Path("runs/it's 1")
    assert cli.main(["train", TOY, "--set", f"Train.workdir={workdir}", "--set", "Optim.lr=3"]) == 0
    written = (workdir / "config.gin").read_text()
    assert written.startswith("# tw_jax")
    assert "Optim.lr = 3.0" in written
    assert "Train.status = 0" in written
    assert cli.main(["train", str(workdir / "config.gin")]) == 0
    first, second = programs["tw_jax.programs.train"].seen
    assert first == second
    assert (workdir / "config.gin").read_text() == written
    assert sorted(path.name for path in workdir.iterdir()) == [".lock", "config.gin"]


def test_a_command_that_is_refused_leaves_the_config_of_the_run_as_it_was(programs):
    words = ["train", TOY, "--set", "Train.workdir=run", "--set"]
    assert cli.main([*words, "Optim.lr=3"]) == 0
    written = Path("run/config.gin").read_text()
    assert cli.main([*words, "Train.fail=Too long."]) == 2
    assert Path("run/config.gin").read_text() == written
    assert cli.main([*words, "Optim.lr=4"]) == 0
    assert "Optim.lr = 4.0" in Path("run/config.gin").read_text()
    assert Path("run/config.1.gin").read_text() == written


def test_a_workdir_that_another_job_holds_is_refused(programs, capsys):
    words = ["train", TOY, "--set", "Train.workdir=run"]
    with workdir.held(["run"], "tw train first.gin"):
        assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("tw: run is in use by process ")
    assert ": tw train first.gin. Two jobs would" in err
    assert not Path("run/config.gin").exists()
    assert cli.main(words) == 0


def test_the_folder_of_the_rollouts_of_an_evaluation_is_held_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = load_config(Evaluate, ["configs/evaluate/demo.gin"])
    assert cli._workdirs(cfg) == ["runs/demo", "runs/demo/samples"]


def test_no_workdir_no_file(programs, tmp_path):
    assert cli.main(["train", TOY]) == 0
    assert list(tmp_path.rglob("config.gin")) == []


def test_compiled_programs_are_kept_where_the_environment_says(tmp_path, monkeypatch):
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        cli._keep_programs()
        assert jax.config.values["jax_compilation_cache_dir"] is None
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        cli._keep_programs()
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "tw_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# tw config.


def test_config_show_describes_the_root(programs, capsys):
    assert cli.main(["config", "show", "train"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Train: A toy run."
    assert "optim: Optim how to step." in lines
    assert "lr: float = 0.1 learning rate." in lines


def test_config_check_builds_every_file_and_runs_none(programs, capsys):
    Path("configs/train/bad.gin").write_text("Train.optim = @Optim()\nOptim.rl = 1\n")
    Path("configs/models").mkdir()
    Path("configs/models/tiny.gin").write_text("Model.depth = 1\n")
    Path("configs/lost").mkdir()
    Path("configs/lost/a.gin").write_text("")
    files = ["configs/train/bad.gin", TOY, "configs/models/tiny.gin", "configs/lost/a.gin"]
    assert cli.main(["config", "check", *files]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{TOY}: ok",
        "configs/models/tiny.gin: a fragment, checked where it is included",
    ]
    assert err.splitlines() == [
        "tw: configs/train/bad.gin:2: Unknown field Optim.rl. Optim has lr.",
        "tw: configs/lost/a.gin: 'lost' is no verb. Verbs: broken, time, train, config.",
    ]
    assert programs["tw_jax.programs.train"].seen == []
    assert cli.main(["config", "check", TOY]) == 0


def test_config_without_a_command_shows_the_usage(programs, capsys):
    assert cli.main(["config"]) == 2
    assert "tw config show VERB" in capsys.readouterr().err


# Errors.


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tarin", TOY], "'tarin' is no verb. Verbs: broken, time, train, config."),
        (["train", "nowhere.gin"], "nowhere.gin: no such config file."),
        (["train", TOY, "--set", "Optim.lr=fast"], "Optim.lr = 'fast': want float, got str."),
        (["train", TOY, "--set", "Train.fail=Too long."], "Too long."),
        (["train", TOY, "--set", "Train.fail=disk"], "The disk is full"),
        (["train", TOY, "--set", "Train.workdir=/dev/null/x"], "/dev/null/x: Not a directory."),
        (["config", "show", "time"], "tw time reads no config. See tw time --help."),
    ],
)
def test_an_error_of_the_user_is_one_sentence(words, sentence, programs, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"tw: {sentence}\n"


def test_debug_keeps_the_traceback(programs):
    with pytest.raises(ValueError, match="no verb"):
        cli.main(["tarin", "--debug"])


def test_a_bug_keeps_its_traceback(programs):
    with pytest.raises(KeyError):
        cli.main(["train", TOY, "--set", "Train.fail=bug"])


def test_an_interrupt_is_a_word_not_a_traceback(programs, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_config", interrupt)
    assert cli.main(["train", TOY]) == 130
    assert capsys.readouterr().err == "tw: interrupted.\n"


def test_every_config_program_of_the_package_has_its_root_and_run():
    for verb in cli._verbs():
        program = cli._program(verb)
        if not hasattr(program, "main"):
            assert callable(program.run)
            with pytest.raises((ValueError, TypeError), match=r"Unknown config|lacks"):
                load_config(cli._root(program, verb), [], ["Nothing.at_all=1"])
