"""The door: `tw VERB CONFIG.gin` finds a verb's program, builds its config and runs it.

A verb is a module of `tw_jax.programs`; nothing else lists them. A program has a root config named
as the verb (`Sft` in `programs/sft.py`) and `run(cfg) -> int | None`; or it has `main(argv) -> int`
and reads its arguments itself. Only the program asked for is imported. This file knows no program;
it locks the workdir that the config names until the program ends, see `workdir.py`. With `--hosts`
the same command runs on every host of a job, if the program says `MANY_HOSTS = True`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

import tw_jax.programs
from tw_jax import hosts, workdir
from tw_jax.config import describe, load_config, operative

USAGE = """\
Usage: tw VERB CONFIG.gin [--set Class.field=value ...] [--hosts]
       tw config show VERB          what a config of this verb may say
       tw config check FILE ...     builds configs/VERB/x.gin, runs nothing
       tw VERB --help

Anywhere: --debug shows the traceback of an error.
"""

FRAGMENTS = ("models", "mesh")
"""Folders of configs/ whose files are included by others and build nothing by themselves."""

USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError)
"""What is raised with a sentence for the user; anything else is a bug and keeps its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after `tw`; those of the process by default.

    Returns:
      The exit status: 0, what the program returned, or 2 for an error of the user.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"tw: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if debug:
            raise
        print(f"tw: {str(stop) or 'interrupted.'}", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    verb, *rest = words
    if verb == "config":
        return _config(rest)
    program = _program(verb)
    if hasattr(program, "main"):
        return program.main(rest)
    parser = argparse.ArgumentParser(
        prog=f"tw {verb}", description=_summary(verb), epilog=f"Fields: tw config show {verb}"
    )
    parser.add_argument("file", metavar="CONFIG.gin")
    parser.add_argument(
        "--set", metavar="Class.field=value", action="append", default=[], help="bind one field"
    )
    parser.add_argument(
        "--hosts", action="store_true", help="one process of a job: this command runs on every host"
    )
    parser.add_argument("--import", metavar="MODULE", dest="modules", action="append", default=[])
    args = parser.parse_args(rest)
    sys.path[:0] = [os.getcwd()] if args.modules else []
    for name in args.modules:
        importlib.import_module(name)
    if args.hosts:
        _join(program, verb)
    else:
        hosts.require_alone()
    _keep_programs()
    cfg = _load(program, verb, args)
    with workdir.held(_workdirs(cfg), " ".join(["tw", *words])):
        return program.run(cfg) or 0


def _join(program: ModuleType, verb: str) -> None:
    if not getattr(program, "MANY_HOSTS", False):
        raise NotImplementedError(
            f"tw {verb} runs in one process: want one host, with all devices that it has. Leave "
            "--hosts out, and run it on one host only."
        )
    # Said before, for JAX aborts a process that waits in vain.
    wait = f"waits {hosts.JOIN_SECONDS} seconds at most for all processes of its job"
    print(f"tw: this process {wait}.", file=sys.stderr)
    hosts.join()


def _load(program: ModuleType, verb: str, args: argparse.Namespace) -> Any:
    """Builds the config; every process of a job stops where one of them has another."""
    facts = {"verb": verb, "package": workdir.origin(), "jax": jax.__version__}
    try:
        cfg = load_config(_root(program, verb), [args.file], args.set)
    except USER_ERRORS as error:
        hosts.agree(**facts, config=_sentence(error))
        raise
    hosts.agree(**facts, config=operative(cfg))
    return cfg


def _config(words: list[str]) -> int:
    match words:
        case ["show", verb]:
            print(describe(_root(_program(verb), verb)), end="")
            return 0
        case ["check", _, *_]:
            return max([_check(file) for file in words[1:]])
    print(USAGE, file=sys.stderr)
    return 2


def _check(file: str) -> int:
    """Builds the config of one file and says how it went."""
    verb = Path(file).absolute().parent.name
    if verb in FRAGMENTS:
        print(f"{file}: a fragment, checked where it is included")
        return 0
    try:
        load_config(_root(_program(verb), verb), [file])
    except USER_ERRORS as error:
        sentence = _sentence(error)
        place = "" if sentence.startswith(file) else f"{file}: "
        print(f"tw: {place}{sentence}", file=sys.stderr)
        return 2
    print(f"{file}: ok")
    return 0


def _workdirs(cfg: Any) -> list[str]:
    """The folders that a program writes: its own, and that of a program it runs first."""
    folders = [getattr(one, "workdir", None) for one in (cfg, *vars(cfg).values())]
    return [folder for folder in folders if folder]


# Programs.


def _verbs() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(tw_jax.programs.__path__))


def _program(verb: str) -> ModuleType:
    if verb not in _verbs():
        raise ValueError(f"{verb!r} is no verb. Verbs: {', '.join([*_verbs(), 'config'])}.")
    return importlib.import_module(f"{tw_jax.programs.__name__}.{verb}")


def _root(program: ModuleType, verb: str) -> type[Any]:
    if hasattr(program, "main"):
        raise ValueError(f"tw {verb} reads no config. See tw {verb} --help.")
    return getattr(program, verb.capitalize())


def _summary(verb: str) -> str:
    """The first line of a program's docstring, read without importing the program."""
    source = Path(tw_jax.programs.__path__[0], f"{verb}.py").read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0]
    return first.removeprefix(f"`tw {verb}`: ")


def _help() -> str:
    verbs = _verbs()
    width = max(map(len, verbs), default=0)
    return "\n".join([USAGE, "Verbs:", *(f"  {v:<{width}}  {_summary(v)}" for v in verbs)])


# Compiled programs, and what an error says.


def _keep_programs() -> None:
    """Keeps compiled programs from run to run; JAX_COMPILATION_CACHE_DIR says where, '' nowhere.

    A run that goes on, or that samples as another one did, then starts without compiling.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"]:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "tw_jax" / "xla"))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else error.strerror
    return str(error)
