"""The modules of docs/extending.md work as the page says, through the command line.

They run in processes of their own, because a config class that is imported is known to all configs.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tw_jax import metrics
from tw_jax.data import records

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A folder with the modules of the page, each under the name that the text before it gives."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(code, encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"my_rewards.py", "my_tasks.py"}
    return tmp_path


def config(path, folder, *without):
    """A copy of a config without the lines that mention these words."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    copy = folder / path.name
    copy.write_text("".join(line for line in lines if not any(word in line for word in without)))
    return str(copy)


def tw(folder, *words):
    """Runs a command in the folder, as a user does."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    code = "from tw_jax.cli import main\nif __name__ == '__main__':\n    raise SystemExit(main())"
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_own_term_changes_the_reward_and_has_its_metric(runs, folder):
    sets = [
        f"Pgrpo.workdir='{folder}/run'",
        "Pgrpo.steps=2",
        "Pgrpo.grader=@Backwards()",
        "Reward.terms=(@TokenPenalty(),)",
        "TokenPenalty.per_thousand=2.0",
    ]
    words = [word for one in sets for word in ("--set", one)]
    modules = ["--import", "my_rewards", "--import", "my_tasks"]
    path = config(runs / "pgrpo.gin", folder, "Grader", "Evaluation")
    tw(folder, "pgrpo", path, *modules, *words)
    lines = metrics.read(folder / "run" / "metrics.jsonl")
    assert len(lines) == 2
    for number, line in enumerate(lines):
        rollouts = list(records.read(folder / "run" / "rollouts" / f"{number:06}.jsonl"))
        parts = [rollout.extra for rollout in rollouts]
        for part in parts:
            assert part["reward_token_penalty"] == -2.0 * part["total"] / 1000
            total = part["correctness"] + part["acceleration"] + part["overlong"]
            assert part["reward"] == total + part["reward_token_penalty"]
            assert part["reward_token_penalty"] < 0
        mean = sum(part["reward_token_penalty"] for part in parts) / len(parts)
        assert line["reward_token_penalty"] == pytest.approx(mean)
        right = [rollout.text.strip().endswith(rollout.answer) for rollout in rollouts]
        assert [part["is_correct"] for part in parts] == right


def test_an_own_task_makes_data(made, folder):
    sets = [f"Make.workdir='{folder}/data'", "Make.task=@Backwards()", "Make.vocab_size=305"]
    words = [word for one in sets for word in ("--set", one)]
    path = config(made / "make.gin", folder, "Multiplication")
    tw(folder, "make", path, "--import", "my_tasks", *words)
    examples = list(records.read(folder / "data" / "train.jsonl"))
    assert len(examples) == 40
    for number, example in enumerate(examples):
        assert example.id == f"train-{number}"
        assert example.extra == {"number": example.answer[::-1]}
        assert example.response.endswith(example.answer)
