"""`tw sft --hosts`: two real processes on loopback, four devices each, killed and started again."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from programs.jobs import PROCESSES, Job

from tw_jax import hosts, sharding
from tw_jax.checkpoint import Checkpoints
from tw_jax.checksums import json_digest
from tw_jax.cli import main
from tw_jax.config import load_config
from tw_jax.models.transformer import network
from tw_jax.programs import sft
from tw_jax.train.state import abstract_state
from tw_jax.trie.pack import PackingStats

STEPS = 12
SETS = [f"Sft.steps={STEPS}", "Sft.save_every=3", "Model.attention='reference'"]


def run(config, folder):
    with Job(config, folder, SETS) as job:
        job.finish()
    return job


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def state_of(config, folder, tmp_path):
    """The last checkpoint, read by one process, and the position of each that wrote it."""
    copy = tmp_path / f"copy_of_{folder.name}"
    shutil.copytree(folder / "checkpoints" / str(STEPS), copy / str(STEPS))
    record = copy / str(STEPS) / "extra" / "metadata"
    content = json.loads(record.read_text())
    extras, content["processes"] = content["processes"], [{}]
    del content["sha256"]
    record.write_text(json.dumps(content | {"sha256": json_digest(content)}))
    cfg = load_config(sft.Sft, [str(config)])
    mesh = sharding.make_mesh(cfg.mesh)
    abstract = abstract_state(network(cfg.model), cfg.optim, mesh=mesh, rules=cfg.rules)
    with Checkpoints(copy, keep=1) as checkpoints:
        state, _ = checkpoints.restore(STEPS, abstract)
    state = state.replace(key=jax.random.key_data(state.key))
    return jax.tree.leaves(jax.device_get(state)), [extra["batches"] for extra in extras]


def packing(folder):
    found = json.loads((folder / "packing.json").read_text())
    return {name: value for name, value in found.items() if "second" not in name}


class Both:
    """The shares of both processes, joined to the batches of one process."""

    def __init__(self, shares):
        self.shares = shares

    @property
    def stats(self):
        all_stats = [vars(share.stats) for share in self.shares]
        return PackingStats(
            **{name: sum(stats[name] for stats in all_stats) for name in all_stats[0]}
        )

    @property
    def unusable(self):
        return sum(share.unusable for share in self.shares)

    def __next__(self):
        return jax.tree.map(lambda *rows: np.concatenate(rows), *map(next, self.shares))

    def get_state(self):
        return {"shares": [share.get_state() for share in self.shares]}


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """An uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = run(made / "sft.gin", folder)
    assert "8 devices of 2 processes, step 0" in job.output(0)
    assert f"{folder}:" not in job.output(1), "one process prints"
    return folder


def test_processes_with_another_config_stop_all_of_them_with_a_sentence(made, tmp_path):
    with Job(made / "sft.gin", tmp_path / "run", SETS, odd=["Optim.beta2=0.5"]) as job:
        assert job.wait() == [2, 2]
    for index in range(PROCESSES):
        assert (
            "tw: The processes of this job do not agree in config: process 1 has "
            "'Optim.beta2 = 0.5' where process 0 has 'Optim.beta2 = 0.95'" in job.output(index)
        )
    assert list((tmp_path / "run").iterdir()) == [], "nothing is written before they agree"


@pytest.mark.parametrize(
    ("script", "command"),
    [("tpu_vm.sh", "gcloud"), ("gke_xpk.sh", "xpk"), ("slurm.sbatch", "srun")],
)
def test_a_launch_script_starts_its_command_on_every_host(script, command, tmp_path):
    fake = tmp_path / command
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = Path(__file__).parents[2] / "experiments" / "launch" / script
    names = ("TPU", "ZONE", "PROJECT", "CLUSTER", "IMAGE")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **dict.fromkeys(names, "a")}
    words = ["bash", str(path), "sft", "x.gin", "--set", "Sft.steps=1"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sft x.gin --set Sft.steps=1 --hosts" in " ".join(done.stdout.split())
    assert subprocess.run(words[:2], env=environment, capture_output=True).returncode != 0


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_same_command_goes_on(made, whole, tmp_path, numbers):
    config, killed = made / "sft.gin", tmp_path / "killed"
    with Job(config, killed, SETS) as job:
        job.wait_for(lambda: lines(killed) >= 1)
        job.processes[1].terminate()
        assert job.wait() == [130, 130], job.output(0) + job.output(1)
    stopped = lines(killed)
    assert stopped < STEPS, "it was stopped too late to lose anything"
    for index in range(PROCESSES):
        assert f"tw: Stopped after step {stopped} of {STEPS}, which is saved" in job.output(index)

    with Job(config, killed, SETS) as job:
        job.wait_for(lambda: lines(killed) > stopped)
        job.processes[1].kill()
        statuses = job.wait(seconds=3 * hosts.LOST_SECONDS)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, None)
    assert stopped < lines(killed) < STEPS, "it was killed too late to lose anything"

    with Job(config, killed, SETS) as job:
        job.finish()
    assert [line["step"] for line in numbers(killed)] == list(range(STEPS))
    assert numbers(killed) == numbers(whole)
    assert packing(killed) == packing(whole)
    leaves, positions = state_of(config, killed, tmp_path)
    others, other_positions = state_of(config, whole, tmp_path / "whole")
    assert positions == other_positions
    assert [position["share"] for position in positions] == [[0, 2], [1, 2]]
    for a, b in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_same_rows(
    made, whole, tmp_path, monkeypatch, numbers, close
):
    open_batches, one = sft.open_batches, tmp_path / "one"

    def open_both(cfg, mesh, tokenizer):
        shares = []
        for share in range(PROCESSES):
            monkeypatch.setattr(sharding, "row_share", lambda *_, i=share: (i, PROCESSES))
            shares.append(open_batches(cfg, mesh, tokenizer))
        return Both(shares)

    monkeypatch.setattr(sft, "open_batches", open_both)
    words = [w for s in (f"Sft.workdir='{one}'", *SETS) for w in ("--set", s)]
    assert main(["sft", str(made / "sft.gin"), *words]) == 0
    for got, want in zip(numbers(whole), numbers(one), strict=True):
        close("sharded", got, want)
    assert packing(whole) == packing(one)


@pytest.mark.slow
def test_a_run_of_two_processes_is_not_resumed_by_one(made, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    words = [w for s in (f"Sft.workdir='{tmp_path}/run'", *SETS) for w in ("--set", s)]
    assert main(["sft", str(made / "sft.gin"), *words]) == 2
    assert "was written by 2 processes, this job has 1" in capsys.readouterr().err


@pytest.mark.slow
def test_what_fails_in_one_process_ends_the_others(made, tmp_path):
    # The last records are of one share only, and unusable.
    source = (made / "data" / "train.jsonl").read_text().splitlines()
    source[1::2] = [line.replace("</Thread>", "") for line in source[1::2]]
    (tmp_path / "bad.jsonl").write_text("\n".join(source) + "\n")
    with Job(
        made / "sft.gin", tmp_path / "run", [*SETS, f"Data.path='{tmp_path}/bad.jsonl'"]
    ) as job:
        statuses = job.wait(seconds=300 + 2 * hosts.LOST_SECONDS)
    assert 0 not in statuses
    assert f"tw: {tmp_path}/bad.jsonl:" in job.output(1)
