"""The command line: verbs from modules, configs from files, sentences instead of tracebacks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from repo.documents import inherited
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

OUTER = '''
"""A program that runs another one."""

from tw_jax.config import configurable
from tw_jax.programs.train import Train


@configurable
class Outer:
    """Holds the other root."""

    train: Train
    n: int = 0
'''

OTHER = OUTER.replace("Outer", "Other").replace("train: Train", "m: int = 0")

LEARN = '''
"""Learns from terms."""

from tw_jax.config import configurable, interface


@interface
class Term:
    """A reward."""


@configurable
class Learn:
    """A run."""

    terms: tuple[Term, ...] = ()


seen = []


def run(cfg):
    seen.append(cfg)
'''

EXTENSION = '''
"""My rewards."""

from tw_jax.config import configurable
from tw_jax.programs.learn import Term


@configurable
class Short(Term):
    """Rewards short texts."""

    weight: float = 1.0
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
    (tmp_path / "configs/train/toy.gin").write_text("Train.status = 0\n")
    monkeypatch.setattr(tw_jax.programs, "__path__", [str(folder)])
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield sys.modules
    for name in set(sys.modules) - before:
        if name.startswith("tw_jax.programs.") or name in ("my_rewards", "failing_module"):
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
    cfg = load_config(Evaluate, "configs/evaluate/demo.gin", inherit=inherited)
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
    Path("bad.gin").write_text("Train.status = 0\nOptim.rl = 1\n")
    Path("run.gin").write_text("include 'configs/train/toy.gin'\nOptim.lr = 1.0\n")
    Path("tiny.gin").write_text("Model.num_layers = 1\n")
    Path("misspelt.gin").write_text("Model.num_layers = 1\nModel.num_lairs = 1\n")
    files = ["bad.gin", TOY, "run.gin", "tiny.gin", "misspelt.gin", "nowhere.gin"]
    assert cli.main(["config", "check", *files]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{TOY}: ok",
        "run.gin: ok",
        "tiny.gin: a fragment, names and syntax are ok",
    ]
    bad, misspelt, nowhere = err.splitlines()
    assert bad == "tw: bad.gin:2: Unknown field Optim.rl. Optim has lr."
    assert misspelt.startswith("tw: misspelt.gin:2: Unknown field Model.num_lairs. Model has ")
    assert nowhere == "tw: nowhere.gin: there is no such config file."
    assert programs["tw_jax.programs.train"].seen == []
    assert cli.main(["config", "check", TOY]) == 0


@pytest.mark.parametrize(
    ("folder", "lines", "included", "verb"),
    [
        (".", ["Outer.n = 1", "Train.status = 1"], [], "outer"),
        (".", ["Train.status = 1"], [], "train"),
        (".", ["Train.status = 1"], ["Outer.n = 1"], "train"),
        ("outer", ["Train.status = 1"], ["Outer.n = 1"], "outer"),
        (".", ["Train.status = 1", "Other.n = 1"], [], None),
        (".", ["Optim.lr = 1.0"], ["Outer.n = 1", "Train.status = 1"], "outer"),
        ("train", ["Optim.lr = 1.0"], [], None),
        (".", ["Time.n = 1", "Train = 3"], [], None),
    ],
)
def test_the_verb_of_a_file_is_that_of_the_root_that_it_binds(
    folder, lines, included, verb, programs
):
    Path("programs/outer.py").write_text(OUTER)
    Path("programs/other.py").write_text(OTHER)
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "part.gin").write_text("\n".join(included))
    file = Path(folder, "a.gin")
    file.write_text("\n".join(["include 'part.gin'", *lines]))
    assert cli.verb_of(file) == verb


# Modules of --import.


def test_a_module_of_the_current_folder_joins_a_union(programs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    Path("programs/learn.py").write_text(LEARN)
    Path("my_rewards.py").write_text(EXTENSION)
    Path("run.gin").write_text("Short.weight = 2.0\nLearn.terms = (@Short(), @Short())\n")
    words = ["learn", "run.gin"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == (
        "tw: run.gin:1: Unknown config class Short. Learn reaches Learn. A class of another module "
        "joins them after --import MODULE.\n"
    )
    assert cli.main([*words, "--import", "my_rewards"]) == 0
    (cfg,) = programs["tw_jax.programs.learn"].seen
    assert [type(term).__name__ for term in cfg.terms] == ["Short", "Short"]
    assert cfg.terms[0].weight == 2.0
    assert cli.main(["config", "check", "run.gin", "--import", "my_rewards"]) == 0
    assert cli.main(["config", "show", "learn", "--import", "my_rewards"]) == 0
    assert "Short: Rewards short texts." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("my_rewadrs", "--import my_rewadrs: there is no module 'my_rewadrs' in the current"),
        ("my_rewards.py", "--import my_rewards.py: there is no module 'my_rewards.py'"),
        ("a/b.py", "--import a/b.py: there is no module"),
        ("", "--import : there is no module ''"),
    ],
)
def test_a_missing_module_is_named_in_a_sentence(module, sentence, programs, capsys):
    Path("my_rewards.py").write_text('"""A module."""')
    assert cli.main(["train", TOY, "--import", module]) == 2
    assert capsys.readouterr().err.startswith(f"tw: {sentence}")


@pytest.mark.parametrize("line", ["import no_such_package", "raise ValueError('mine')"])
def test_an_error_within_a_module_keeps_its_traceback(line, programs):
    Path("failing_module.py").write_text(line)
    with pytest.raises(ImportError, match=r"no_such_package|failing_module failed: mine"):
        cli.main(["train", TOY, "--import", "failing_module"])


def test_a_checkpoint_is_described_only_where_a_class_inherits(programs, monkeypatch):
    asked = []

    class Load:
        @staticmethod
        def describe(folder):
            asked.append(folder)
            return "Optim.lr = 7.0\n"

    assert cli.main(["train", TOY]) == 0
    assert asked == []
    monkeypatch.setitem(sys.modules, "tw_jax.models.load", Load)
    monkeypatch.setattr(
        programs["tw_jax.programs.train"].Train, "inherits", "workdir", raising=False
    )
    assert cli.main(["train", TOY]) == 0
    assert asked == []
    assert cli.main(["train", TOY, "--set", "Train.workdir=run"]) == 0
    assert asked == ["run"]
    assert programs["tw_jax.programs.train"].seen[-1].optim.lr == 7.0


def test_the_package_runs_as_a_module():
    words = [sys.executable, "-m", "tw_jax"]
    done = subprocess.run([*words, "sfft", "x.gin"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("tw: 'sfft' is not a verb. Verbs: ")


def test_config_without_a_command_shows_the_usage(programs, capsys):
    assert cli.main(["config"]) == 2
    assert "tw config show VERB" in capsys.readouterr().err


# Errors.


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tarin", TOY], "'tarin' is not a verb. Verbs: broken, time, train, config."),
        (["train", "nowhere.gin"], "nowhere.gin: there is no such config file."),
        (["train", TOY, "--set", "Optim.lr=fast"], "Optim.lr = 'fast' must be float, but is str."),
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
    with pytest.raises(ValueError, match="not a verb"):
        cli.main(["tarin", "--debug"])


def test_a_bug_keeps_its_traceback(programs):
    with pytest.raises(KeyError):
        cli.main(["train", TOY, "--set", "Train.fail=bug"])


def test_an_interrupt_is_a_word_not_a_traceback(programs, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_config", interrupt)
    assert cli.main(["train", TOY]) == 130
    assert capsys.readouterr().err == "tw: interrupted.\n"


def test_every_config_program_of_the_package_has_its_root_and_run():
    for verb in cli._verbs():
        program = cli._program(verb)
        if not hasattr(program, "main"):
            assert callable(program.run)
            with pytest.raises((ValueError, TypeError), match=r"Unknown config class|lacks"):
                load_config(cli._root(program, verb), [], ["Nothing.at_all=1"])
