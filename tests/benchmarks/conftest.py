"""Benchmarks in miniature, through the command line."""

import json

import fakes
import pytest

from tw_jax import cli
from tw_jax.benchmarks import step
from tw_jax.data import workloads
from tw_jax.programs import bench


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `tw bench NAME --json` in miniature; returns the printed lines, the last one parsed."""

    def run(name):
        case = getattr(workloads, f"TINY_{name.upper()}")
        monkeypatch.setitem(bench.CASES, name, case)
        assert cli.main(["bench", name, "--json"]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)

    return run


@pytest.fixture
def quick_network(monkeypatch):
    """A network of one fixed layer in place of the step's decoder: it compiles in a moment."""
    monkeypatch.setattr(
        step,
        "network",
        lambda model, num_ids: fakes.path_network(model.vocab_size, num_ids=num_ids),
    )
