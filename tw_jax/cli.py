"""The command line: `tw VERB CONFIG.gin` finds a verb's program, builds its config and runs it.

A verb is a module of `tw_jax.programs`; there is no other list of verbs. A program has a root
config that is named like the verb (`Sft` in `programs/sft.py`) and `run(cfg) -> int | None`; or it
has `main(argv) -> int` and reads its arguments itself. Only the program of the verb is imported.
This file does not depend on any program. It locks the workdir that the config names until the
program ends, see `workdir.py`. With `--hosts` the same command runs on every host of a job, if the
program sets `MANY_HOSTS = True`.
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
from tw_jax import bindings, hosts, workdir
from tw_jax.builder import MissingFieldError
from tw_jax.config import describe, load_config, operative
from tw_jax.fields import reachable
from tw_jax.table import check_names

USAGE = """\
Usage: tw VERB CONFIG.gin [--set Class.field=value ...] [--import MODULE ...] [--hosts]
       tw config show VERB          lists the fields that a config of this verb may set
       tw config check FILE ...     builds the configs of runs, checks the names of fragments
       tw VERB --help

--import imports a Python module before the config is built, so that its config classes can be used
in it. The module is searched for in the current folder and among the installed packages. tw config
takes --import too.

Anywhere: --debug shows the traceback of an error.
"""

USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError)
"""Errors that are shown as one sentence; any other error is a bug and keeps its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after `tw`; by default those of the process.

    Returns:
      The exit status: the program's own, or 0 if it returns none, or 2 after an error of the user.
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
    _add_import(parser)
    parser.add_argument(
        "--hosts", action="store_true", help="one process of a job: this command runs on every host"
    )
    args = parser.parse_args(rest)
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
            f"tw {verb} runs in one process, on one host with all of its devices. Run it on one "
            "host only, without --hosts."
        )
    # This is printed first, because JAX aborts a process whose wait ends without the others.
    wait = f"waits {hosts.JOIN_SECONDS} seconds at most for all processes of its job"
    print(f"tw: this process {wait}.", file=sys.stderr)
    hosts.join()


def _load(program: ModuleType, verb: str, args: argparse.Namespace) -> Any:
    """Builds the config; all processes of a job stop if one of them has another config."""
    facts = {"verb": verb, "package": workdir.origin(), "jax": jax.__version__}
    try:
        _import(args.modules)
        cfg = _build(_root(program, verb), args.file, args.set)
    except USER_ERRORS as error:
        hosts.agree(**facts, config=_sentence(error))
        raise
    hosts.agree(**facts, config=operative(cfg))
    return cfg


def _build(root: type[Any], file: str, bindings: Sequence[str] = ()) -> Any:
    """Builds a config; its checkpoint may be gone if the config leaves no field to it.

    Raises:
      FileNotFoundError: a field is to be taken from a checkpoint that does not exist.
    """
    absent: list[FileNotFoundError] = []

    def inherit(folder: str) -> str:
        # Imported only if a config has a checkpoint.
        load = importlib.import_module("tw_jax.models.load")
        try:
            return load.describe(folder)
        except FileNotFoundError as error:
            absent.append(error)
            return ""

    try:
        return load_config(root, file, bindings, inherit=inherit)
    except MissingFieldError as error:
        if absent:
            raise FileNotFoundError(f"{absent[0]} {error}") from error
        raise


# Modules of --import.


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        metavar="MODULE",
        dest="modules",
        action="append",
        default=[],
        help="import a module whose config classes the config uses",
    )


def _import(modules: Sequence[str]) -> None:
    """Imports modules as `python -m` finds them: the current folder comes first."""
    if modules and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    for name in modules:
        try:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ModuleNotFoundError(name=name)
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, and what it imports does not
            raise ValueError(
                f"--import {name}: there is no module {name!r} in the current folder or among the "
                "installed packages. Name it as in Python's import, such as my_rewards."
            ) from None
        except USER_ERRORS as error:
            # This is code of the user, who needs the traceback.
            raise ImportError(f"--import {name} failed: {error}") from error


# tw config.


def _config(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tw config", add_help=False)
    parser.add_argument("words", nargs="*")
    _add_import(parser)
    args = parser.parse_intermixed_args(words)
    match args.words:
        case ["show", verb]:
            root = _root(_program(verb), verb)
            _import(args.modules)
            print(describe(root), end="")
            return 0
        case ["check", _, *_]:
            _import(args.modules)
            return max([_check(file) for file in args.words[1:]])
    print(USAGE, file=sys.stderr)
    return 2


def _check(file: str) -> int:
    """Builds the config of a run, or checks the names of a fragment, and prints the outcome."""
    try:
        verb = verb_of(Path(file))
        if verb is None:
            check_names(Path(file))
        else:
            _build(_root(_program(verb), verb), file)
    except FileNotFoundError as error:
        if isinstance(error.__cause__, MissingFieldError):
            check_names(Path(file))
            print(f"{file}: names and syntax are ok; its checkpoint does not exist yet")
            return 0
        print(f"tw: {_sentence(error)}", file=sys.stderr)
        return 2
    except USER_ERRORS as error:
        sentence = _sentence(error)
        place = "" if sentence.startswith(file) else f"{file}: "
        print(f"tw: {place}{sentence}", file=sys.stderr)
        return 2
    print(f"{file}: ok" if verb else f"{file}: a fragment, names and syntax are ok")
    return 0


def verb_of(file: Path) -> str | None:
    """Returns the verb whose root config a file binds, itself or by its includes.

    If it binds several roots, it is the verb that the file's folder is named after; else the only
    root that no other one holds, first among those that the file itself binds, then among all.

    Args:
      file: a config file.

    Returns:
      None for a fragment, which binds no root, or several that do not belong together.

    Raises:
      ValueError: on a syntax error.
      FileNotFoundError: if the file or an include does not exist.
    """
    bound = [one for one in bindings.read(file) if one.key[2]]
    named = {verb.capitalize(): verb for verb in _verbs()}
    verbs = {named[one.key[1]] for one in bound if one.key[1] in named}
    roots = {verb: vars(_program(verb)).get(verb.capitalize()) for verb in sorted(verbs)}
    roots = {verb: root for verb, root in roots.items() if root is not None}
    if (folder := file.absolute().parent.name) in roots:
        return folder
    for names in (
        {one.key[1] for one in bound if not one.is_included},
        {one.key[1] for one in bound},
    ):
        found = {verb: root for verb, root in roots.items() if root.__name__ in names}
        outer = [
            verb
            for verb, root in found.items()
            if not any(root in reachable(one).values() for one in found.values() if one is not root)
        ]
        if outer:
            return outer[0] if len(outer) == 1 else None
    return None


def _workdirs(cfg: Any) -> list[str]:
    """The folders that a program writes: its own, and that of a program that it runs first."""
    folders = [getattr(one, "workdir", None) for one in (cfg, *vars(cfg).values())]
    return [folder for folder in folders if folder]


# Programs.


def _verbs() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(tw_jax.programs.__path__))


def _program(verb: str) -> ModuleType:
    if verb not in _verbs():
        raise ValueError(f"{verb!r} is not a verb. Verbs: {', '.join([*_verbs(), 'config'])}.")
    return importlib.import_module(f"{tw_jax.programs.__name__}.{verb}")


def _root(program: ModuleType, verb: str) -> type[Any]:
    if hasattr(program, "main"):
        raise ValueError(f"tw {verb} reads no config. See tw {verb} --help.")
    return getattr(program, verb.capitalize())


def _summary(verb: str) -> str:
    """The first line of a program's docstring; the program is not imported."""
    source = Path(tw_jax.programs.__path__[0], f"{verb}.py").read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0]
    return first.removeprefix(f"`tw {verb}`: ")


def _help() -> str:
    verbs = _verbs()
    width = max(map(len, verbs), default=0)
    return "\n".join([USAGE, "Verbs:", *(f"  {v:<{width}}  {_summary(v)}" for v in verbs)])


# Compiled programs, and errors.


def _keep_programs() -> None:
    """Keeps compiled programs for later runs in JAX_COMPILATION_CACHE_DIR; '' keeps none.

    A run that is resumed, or that has the shapes of another one, then starts without compiling.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"]:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "tw_jax" / "xla"))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else error.strerror
    return str(error)
