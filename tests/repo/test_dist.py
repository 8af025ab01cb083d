"""The wheel holds the package and nothing else, and `tw` runs from it in an empty environment."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile

import pytest
import yaml
from repo.sources import PACKAGE, ROOT

pytest.importorskip("build", reason="build comes with the dev extra")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPT = '''
import jax
import tw_jax as tw

def answer(a, b):
    return f"""<Parallel>
<Outlines>
<Outline>1: {a} times {b // 10 * 10}</Outline>
<Outline>2: {a} times {b % 10}</Outline>
</Outlines>
<Thread>
1: {a * (b // 10 * 10)}
</Thread><Thread>
2: {a * (b % 10)}
</Thread>
</Parallel>
The product is {a * b}."""

tokenizer, chat = tw.load_tokenizer(tw.Bytes()), tw.Chat(template="plain")
limits = tw.ForkJoin(max_new=400, max_threads=2)
texts = {f"What is {a} * {b}?": answer(a, b) for a, b in ((12, 34), (7, 81), (23, 56))}
tries = [tw.trajectory_trie(tw.trajectory(tokenizer, chat, *qa, limits)) for qa in texts.items()]
batch = tw.stack_rows(tw.pack(tries, tw.Packing(row_tokens=512)), 512)
network = tw.network(tw.presets.TINY, num_ids=tokenizer.vocab_size)
optim = tw.Optim(algorithm="muon", peak_lr=1e-2)
state = tw.initial_state(network, optim, key=jax.random.key(0))
step = jax.jit(tw.make_sft_step(network, optim, steps=50))
for _ in range(50):
    state, metrics = step(state, batch)
protocol = tw.ThreadWeaver(tw.make_table(tokenizer), limits)
sampler = tw.make_sampler(network, protocol, tw.Sampler(rows=3, temperature=0.0))
for rollout in sampler(state.params, [chat.prompt(tokenizer, question) for question in texts]):
    print([rollout.rounds, tokenizer.decode(rollout.ids)])
'''
"""What a reader of the quickstart would write for three trajectories of their own."""
NOT_SOURCES = {".git", ".venv", "build", "dist", "runs", "_build", "__pycache__"}


def run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    """What a command prints. Python's own variables, which may name the checkout, are not set."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, pathlib.Path]:
    """What `make dist` builds, from a copy of the checkout: the suffix and the file."""
    copy = tmp_path_factory.mktemp("dist") / "checkout"
    ignore = shutil.ignore_patterns(*NOT_SOURCES, "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignore)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=copy)
    return {path.suffix: path for path in (copy / "dist").iterdir()}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> pathlib.Path:
    """An environment with the wheel that sees the other packages of the running environment.

    A .pth file adds their folder to the path. Python does not read the .pth files of that folder,
    so an editable install of the checkout has no effect.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", built[".whl"], cwd=folder)
    (own,) = folder.glob("lib/python*/site-packages")
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "others.pth").write_text("\n".join(sorted(others)) + "\n", encoding="utf-8")
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert held == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"tw_jax/py.typed", "tw_jax/__init__.pyi"} <= held


def test_the_source_distribution_holds_no_tests_and_what_its_wheel_needs(built) -> None:
    with tarfile.open(built[".gz"]) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "requirements.txt"} <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"tw_jax", "tw_jax.egg-info"}


def test_the_package_is_imported_from_the_wheel(installed, tmp_path) -> None:
    script = """
import json, pathlib, tw_jax
print(json.dumps([tw_jax.__file__, [str(getattr(tw_jax, name)) for name in tw_jax.__all__]]))
"""
    place, names = json.loads(run(installed / "bin" / "python", "-c", script, cwd=tmp_path))
    assert pathlib.Path(place).is_relative_to(installed)
    assert not pathlib.Path(place).is_relative_to(ROOT)
    assert names


def test_tw_runs_from_the_wheel(installed, tmp_path) -> None:
    tw = installed / "bin" / "tw"
    assert "sft" in run(tw, "--help", cwd=tmp_path)
    assert "row_tokens" in run(tw, "config", "show", "sft", cwd=tmp_path)


def test_a_script_of_30_lines_trains_on_own_trajectories_and_samples_with_forks(
    installed, tmp_path
) -> None:
    assert len([line for line in SCRIPT.splitlines() if line.strip()]) <= 30
    (tmp_path / "own.py").write_text(SCRIPT, encoding="utf-8")
    shown = run(installed / "bin" / "python", "own.py", cwd=tmp_path)
    rollouts = [ast.literal_eval(line) for line in shown.splitlines()]
    assert [rounds for rounds, _ in rollouts] == [1, 1, 1]
    made = [
        re.search(r"\* \d+\?[\s\S]*</Thread><Thread>[\s\S]* is (\d+)\.", t) for _, t in rollouts
    ]
    assert [found[1] for found in made] == ["408", "567", "1288"]


@pytest.mark.slow  # downloads the dependencies
def test_the_wheel_installs_with_its_dependencies_in_an_empty_environment(built, tmp_path) -> None:
    venv.create(tmp_path / "empty", with_pip=True)
    bin = tmp_path / "empty" / "bin"
    run(bin / "pip", "install", "--quiet", built[".whl"], cwd=tmp_path)
    assert "sft" in run(bin / "tw", "--help", cwd=tmp_path)
    shown = run(bin / "python", "-c", "import tw_jax; print(tw_jax.__file__)", cwd=tmp_path)
    assert pathlib.Path(shown.strip()).is_relative_to(tmp_path)


def test_hooks_run_what_make_check_runs_before_its_tests() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^check: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    *checks, tests = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert tests.startswith("$(PYTEST)")
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == checks


def test_hooks_are_a_valid_configuration_of_pre_commit() -> None:
    pytest.importorskip("pre_commit", reason="pre-commit comes with the dev extra")
    command = (sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml")
    run(*command, cwd=ROOT)


def test_the_citation_is_of_this_version_and_names_both_papers() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (cited["title"], cited["version"]) == (PROJECT["name"], PROJECT["version"])
    assert (cited["cff-version"], cited["license"]) == ("1.2.0", PROJECT["license"])
    papers = {paper["title"]: paper["identifiers"][0]["value"] for paper in cited["references"]}
    assert papers == {
        "ThreadWeaver: Adaptive Threading for Efficient Parallel Reasoning in Language Models": (
            "arXiv:2512.07843"
        ),
        "Learning Adaptive Parallel Reasoning with Language Models": "arXiv:2504.15466",
    }


def test_the_changelog_begins_with_what_is_not_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert sections[0] == "[Unreleased]"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds
