"""Floors and doors: which file may import which (docs/architecture.md)."""

import ast
import subprocess
import sys

import pytest
from repo.sources import ROOT, imported_names, name_of, python_files, tree

import tw_jax

# import-linter checks whole distributions only, so doors to parts of one are checked here.
DOORS = {
    "flax.linen": {"tw_jax/models/transformer.py"},
    "flax.nnx": set(),
    "jax.experimental.multihost_utils": {"tw_jax/hosts.py"},
    "jax.experimental.pallas": {"tw_jax/attention/pallas_tpu.py"},
    "jax.experimental.pjit": set(),
    "jax.experimental.topologies": {"tw_jax/aot/topology.py"},
}
BEHIND_THE_FRONT = {"data", "programs", "cli"}
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"


def test_floors_and_doors_of_pyproject_hold() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with the dev extra")
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("part", DOORS)
def test_a_part_of_a_distribution_is_imported_at_its_door_alone(part: str) -> None:
    users = {
        name_of(path)
        for path in python_files()
        for _, name in imported_names(tree(path))
        if name == part or name.startswith(f"{part}.")
    }
    assert users == DOORS[part]


def test_there_are_at_most_50_public_names_and_no_two_of_one_thing() -> None:
    assert tw_jax.__all__ == sorted(tw_jax.__all__)
    assert 40 <= len(tw_jax.__all__) <= 50
    assert len({id(getattr(tw_jax, name)) for name in tw_jax.__all__}) == len(tw_jax.__all__)


def test_importing_the_package_loads_no_other_part_of_it_and_no_jax() -> None:
    script = "import sys, tw_jax; print(tw_jax.__all__ and sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = ast.literal_eval(done.stdout)
    assert not {"jax", "numpy", "matplotlib"} & {*loaded}
    assert [name for name in loaded if name.startswith("tw_jax")] == ["tw_jax"]


def test_the_front_hands_out_names_of_the_lower_floors_only() -> None:
    found = [getattr(tw_jax, name) for name in tw_jax.__all__]
    homes = [getattr(one, "__module__", one.__name__) for one in found]
    rooms = {home.split(".")[1] for home in homes if home.startswith("tw_jax.")}
    assert {"trie", "forkjoin", "train", "sample"} <= rooms
    assert not rooms & BEHIND_THE_FRONT
