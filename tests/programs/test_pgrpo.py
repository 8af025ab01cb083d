"""`tw pgrpo`: a run writes its files, resumes exactly, and continues after bad rollouts."""

import dataclasses
import itertools
import json
import math
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from tw_jax import metrics
from tw_jax.checkpoint import Checkpoints, read_note, restore_params
from tw_jax.cli import main
from tw_jax.config import load_config
from tw_jax.data import records
from tw_jax.data.stored import trajectory_of
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.programs.pgrpo import Pgrpo
from tw_jax.rollouts import step
from tw_jax.rollouts.generate import Generator
from tw_jax.tasks import grader
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece

pytestmark = pytest.mark.usefixtures("quick_programs")
HANGS = r"3^{13!}"
"""A power that sympy would expand, which takes minutes and gigabytes."""
ROOT = Path(__file__).parents[2]
OF_THE_LOOP = {
    *("step", "wall_seconds", "steps_per_second", "tokens_per_second"),
    *("data_seconds", "save_seconds"),
}
"""Numbers that `TrainingLoop` writes for every algorithm."""


@pytest.fixture(scope="module")
def trained(runs):
    assert main(["pgrpo", str(runs / "pgrpo.gin"), "--debug"]) == 0
    return runs


def pgrpo(runs, folder, *words):
    sets = [f"Pgrpo.workdir='{folder}'", *words]
    return main(["pgrpo", str(runs / "pgrpo.gin"), *[w for s in sets for w in ("--set", s)]])


def params(folder):
    return jax.tree.leaves(jax.device_get(restore_params(folder / "checkpoints")))


def test_every_step_has_its_line(trained):
    lines = metrics.read(trained / "pgrpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    expected = {
        *("reward", "correct", "longest_tokens", "total_tokens", "ratio_min", "ratio_max"),
        *("loss", "grad_norm", "seconds", "groups", "timeouts", "reward_acceleration"),
    }
    for line in lines:
        assert line.keys() >= expected
        assert 0.999 <= line["ratio_min"] <= line["ratio_max"] <= 1.001
        assert line["longest_tokens"] <= line["total_tokens"]
    assert "eval_correct" in lines[1]
    assert lines[1]["eval_without_answer"] == 0
    assert "eval_pass_at_2" in lines[2]
    assert "eval_correct" not in lines[0]
    assert ["initial_eval_correct" in line for line in lines] == [True, False, False]


def test_sampler_and_trainer_agree_with_more_rows_than_ids(trained, tolerance):
    cfg = load_config(Pgrpo, [str(trained / "pgrpo.gin")])
    assert load_tokenizer(cfg.tokenizer).vocab_size < cfg.model.vocab_size
    for line in metrics.read(trained / "pgrpo" / "metrics.jsonl"):
        assert line["mismatch_mean"] < tolerance["sampler_logp"]


def test_every_number_of_a_line_is_explained(trained):
    page = (ROOT / "docs" / "pgrpo.md").read_text(encoding="utf-8")
    for line in metrics.read(trained / "pgrpo" / "metrics.jsonl"):
        own = {name for name in line if "eval_" not in name} - OF_THE_LOOP
        assert {name for name in own if f"`{name}`" not in page} == set()


def test_every_rollout_is_kept_with_its_calls_log_probs_reward_and_advantage(trained, close):
    files = sorted((trained / "pgrpo" / "rollouts").iterdir())
    assert [file.name for file in files] == ["000000.jsonl", "000001.jsonl", "000002.jsonl"]
    for file in files:
        found = list(records.read(file))
        groups: dict[int, list] = {}
        for one in found:
            groups.setdefault(one.extra["group"], []).append(one)
            assert all(call.logp is not None for call in one.calls)
            parts = ("correctness", "acceleration", "overlong")
            assert one.extra["reward"] == pytest.approx(sum(one.extra[p] for p in parts))
        for group in groups.values():
            assert len(group) == 2
            assert len({one.question for one in group}) == 1
            advantage = np.array([one.extra["advantage"] for one in group])
            reward = np.array([one.extra["reward"] for one in group])
            close("rounding", advantage, reward - reward.mean(), of=np.abs(reward).max())


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(trained, tmp_path, monkeypatch, numbers):
    from tw_jax.train import loop

    stops = iter([False, True, False])
    monkeypatch.setattr(loop, "_stops", lambda caught, index: next(stops))
    assert pgrpo(trained, tmp_path) == 130
    assert pgrpo(trained, tmp_path) == 0
    assert numbers(tmp_path) == numbers(trained / "pgrpo")
    for a, b in zip(params(trained / "pgrpo"), params(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def crash(trained, tmp_path, monkeypatch):
    """Crashes a run after the rollouts of a step are drawn; returns the file that has them."""

    def run(at, *words):
        pack, steps = step.pack_groups, iter(range(at))

        def fail(*args, **named):
            if next(steps, None) is None:
                raise RuntimeError("the power went out")
            return pack(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(step, "pack_groups", fail)
            with pytest.raises(RuntimeError, match="power"):
                pgrpo(trained, tmp_path, *words)
        return tmp_path / "rollouts" / f".{at:06}.jsonl"

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The number of problems in each call of the sampler."""
    counts, generate = [], Generator.__call__

    def count(self, params, problems, *rest, **named):
        counts.append(len(problems))
        return generate(self, params, problems, *rest, **named)

    monkeypatch.setattr(Generator, "__call__", count)
    return counts


def test_rollouts_that_a_crash_left_are_not_sampled_again(trained, tmp_path, crash, drawn):
    unfinished = crash(0, "Pgrpo.steps=1")
    left = unfinished.read_text().splitlines()
    assert len(left) >= 4
    drawn.clear()
    assert pgrpo(trained, tmp_path, "Pgrpo.steps=1") == 0
    assert drawn == [3, 3]  # the held-out problems before and after, and no others
    first = records.open_records(tmp_path / "rollouts" / "000000.jsonl")
    assert [json.loads(line)["id"] for line in left] == [one.id for one in first]
    assert not unfinished.exists()
    assert same_first_batch(trained, tmp_path)


def test_rollouts_of_a_step_that_is_not_next_are_drawn_again(trained, tmp_path, crash, drawn):
    words = ["Pgrpo.steps=2", "Pgrpo.save_every=2"]
    crash(1, *words)  # nothing is saved yet, so step 0 makes the parameters of step 1 again
    drawn.clear()
    assert pgrpo(trained, tmp_path, *words) == 0
    assert drawn == [3, 4, 4, 3]


def test_a_rollout_that_a_crash_cut_short_is_drawn_again(trained, tmp_path, crash, drawn):
    unfinished = crash(0, "Pgrpo.steps=1")
    unfinished.write_bytes(unfinished.read_bytes()[:-40])
    drawn.clear()
    with pytest.warns(UserWarning, match="the last line was cut short"):
        assert pgrpo(trained, tmp_path, "Pgrpo.steps=1") == 0
    assert drawn == [3, 4, 3]  # the problems of the cut record, between two evaluations
    assert same_first_batch(trained, tmp_path)


def test_rollouts_that_an_attempt_with_other_settings_left_are_drawn_again(
    trained, tmp_path, drawn
):
    # Before the first checkpoint, settings may change, so an attempt marks its rollouts.
    first = (trained / "pgrpo" / "rollouts" / "000000.jsonl").read_text()
    (tmp_path / "rollouts").mkdir()
    left = first.replace('"extra": {', '"extra": {"run": "0123456789abcdef", ')
    (tmp_path / "rollouts" / ".000000.jsonl").write_text(left)
    assert pgrpo(trained, tmp_path, "Pgrpo.steps=1") == 0
    assert drawn == [3, 4, 3]
    assert same_first_batch(trained, tmp_path)


def test_the_reference_of_a_resumed_run_is_the_model_that_it_began_with(trained, tmp_path, numbers):
    without_evaluation(trained, tmp_path)
    init, run = tmp_path / "init", tmp_path / "run"
    shutil.copytree(trained / "sft" / "checkpoints", init)
    words = [f"Pgrpo.init='{init}'", "PolicyLoss.kl_coef=0.1", "Pgrpo.max_prompts=24"]
    assert pgrpo(tmp_path, run, *words, "Pgrpo.steps=1") == 0
    # The run that made the first parameters continues, so its newest ones are different.
    with Checkpoints(init, keep=9) as checkpoints:
        noise = np.random.default_rng(0).normal
        other = jax.tree.map(lambda leaf: leaf + noise(size=leaf.shape), restore_params(init))
        checkpoints.save(5, {"params": other}, read_note(init))
    assert pgrpo(tmp_path, run, *words, "Pgrpo.steps=2") == 0
    assert [line["step"] for line in numbers(run)] == [0, 1]
    assert all(line["tokens"] > 0 for line in numbers(run))
    assert all(0 <= line["reference_kl"] < 0.01 for line in numbers(run))


def without_evaluation(trained, folder):
    """Writes the config without held-out problems into a folder."""
    text = (trained / "pgrpo.gin").read_text().splitlines()
    kept = [line for line in text if not line.startswith(("Evaluation", "Pgrpo.evaluation"))]
    (folder / "pgrpo.gin").write_text("\n".join(kept))


def same_first_batch(trained, folder):
    name = "rollouts/000000.jsonl"
    return (folder / name).read_bytes() == (trained / "pgrpo" / name).read_bytes()


@pytest.fixture(scope="module")
def bad_rollouts(runs, tmp_path_factory):
    """A run in which one rollout of each step but the last is bad, each in another way.

    The first answer keeps a worker busy beyond its deadline. The second does too, but its worker is
    killed. The reward of the third is not a number. Every other rollout is graded correct, so that
    every group has signal.
    """
    folder = tmp_path_factory.mktemp("bad_rollouts")
    bad, killed, rewarded = [], [], []
    generate, start, reward = Generator.__call__, grader._Worker._start, step.reward

    def generated(self, params, problems, ids, **named):
        groups = generate(self, params, problems, ids, **named)
        at, *rest = ids[0][0].split("/")
        if len(rest) == 3 and len(bad) == int(at):  # an id of an evaluation has two parts
            bad.append(groups[0].trajectories[0])
            if len(bad) <= 2:
                texts = [rf"</think>\boxed{{{HANGS}}}", *groups[0].texts[1:]]
                groups[0] = groups[0]._replace(texts=texts)
        return groups

    def start_worker(self):
        pipe, process = start(self), self._process

        def kill():
            killed.append(process.is_alive())
            process.kill()  # as the kernel does if memory is short

        if len(bad) == 2:
            threading.Timer(0.2, kill).start()
        return pipe

    def reward_of(trajectory, *rest, **named):
        rewarded.append(trajectory)
        is_bad = len(bad) > 2 and trajectory is bad[2]
        correctness = math.nan if is_bad else float(len(rewarded) % 2)
        return reward(trajectory, *rest, **named)._replace(correctness=correctness)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "__call__", generated)
        patch.setattr(grader._Worker, "_start", start_worker)
        patch.setattr(step, "reward", reward_of)
        words = ["Pgrpo.steps=4", "Evaluation.every=4", "Grader.workers=1", "Grader.item_seconds=3"]
        words += ["Grader.mode='mathematics'"]
        assert pgrpo(runs, folder, *words) == 0
    return folder, killed


def test_bad_rollouts_do_not_stop_a_run(bad_rollouts, numbers):
    lines = numbers(bad_rollouts[0])
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0]
    assert all(np.isfinite(leaf).all() for leaf in params(bad_rollouts[0]))


def test_a_grader_that_hangs_is_counted(bad_rollouts, numbers):
    assert [line["timeouts"] for line in numbers(bad_rollouts[0])] == [1, 1, 0, 0]


def test_a_worker_that_dies_is_counted(bad_rollouts, numbers):
    folder, killed = bad_rollouts
    assert killed == [True]
    assert numbers(folder)[1]["timeouts"] == 1


def test_a_reward_that_is_no_number_is_counted_and_its_group_is_not_trained(bad_rollouts, numbers):
    folder, _ = bad_rollouts
    lines = numbers(folder)
    assert [line["groups_not_finite"] for line in lines] == [0, 0, 1, 0]
    assert all(np.isfinite(line["reward"]) for line in lines)
    first, second, *others = records.read(folder / "rollouts" / "000002.jsonl")
    assert [first.extra["advantage"], second.extra["advantage"]] == [0, 0]
    assert any(one.extra["advantage"] for one in others)


def test_a_rollout_longer_than_a_row_is_rewarded_and_not_trained(trained, tmp_path, numbers):
    first = list(records.read(trained / "pgrpo" / "rollouts" / "000000.jsonl"))
    most = max(nodes(trained, one) for one in first) - 1
    words = ["Pgrpo.steps=1", "Pgrpo.evaluation=None", f"Packing.row_tokens={most}"]
    text = (trained / "pgrpo.gin").read_text().splitlines()
    kept = [line for line in text if not line.startswith("Evaluation")]
    (tmp_path / "pgrpo.gin").write_text("\n".join(kept))
    assert pgrpo(tmp_path, tmp_path / "run", *words) == 0
    found = list(records.read(tmp_path / "run" / "rollouts" / "000000.jsonl"))
    is_long = [nodes(trained, one) > most for one in found]
    assert 0 < sum(is_long) < len(found)
    (line,) = numbers(tmp_path / "run")
    assert line["untrained"] == sum(is_long)
    for one, long in zip(found, is_long, strict=True):
        assert one.extra["reward"] is not None
        assert not (long and one.extra["is_trained"])


def nodes(runs, rollout):
    """Nodes of its trie: every beginning of a call's tokens, counted once."""
    table = make_table(load_tokenizer(SentencePiece(path=str(runs / "data" / "tokenizer.model"))))
    limits = ForkJoin(max_threads=3, max_new=40, max_thread=10)
    made = trajectory_of(ThreadWeaver(table, limits), rollout)
    texts = [made.ids, *(np.concatenate([c.context, c.sampled]) for c in made.calls)]
    return len({text[: n + 1].tobytes() for text in texts for n in range(len(text))})


def test_a_step_whose_groups_all_lack_signal_changes_nothing(trained, tmp_path, numbers):
    words = ["Pgrpo.steps=1", "Reward.overlong='keep'", "Pgrpo.evaluation=None"]
    unused = ["SoftOverlong.limit_tokens", "SoftOverlong.buffer_tokens", "Evaluation"]
    text = (trained / "pgrpo.gin").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(tuple(unused))]
    (tmp_path / "pgrpo.gin").write_text("\n".join(kept))
    assert pgrpo(tmp_path, tmp_path / "run", *words) == 0
    (line,) = numbers(tmp_path / "run")
    assert line["groups"] == 0
    assert line["groups_drawn"] == 4
    assert line["skipped"] == 1
    before = jax.tree.leaves(jax.device_get(restore_params(trained / "sft" / "checkpoints")))
    for a, b in zip(before, params(tmp_path / "run"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_that_learns_nothing_says_so_on_the_console(trained, tmp_path, capsys):
    words = ["Pgrpo.steps=6", "Pgrpo.max_prompts=2", "Sampler.rows=16", "Reward.overlong='keep'"]
    without_evaluation(trained, tmp_path)
    text = (tmp_path / "pgrpo.gin").read_text().splitlines()
    kept = [line for line in text if not line.startswith("SoftOverlong")]
    (tmp_path / "pgrpo.gin").write_text("\n".join(kept))
    assert pgrpo(tmp_path, tmp_path / "run", *words) == 0
    console = capsys.readouterr()
    assert "Steps 0 to 4 had no group whose rewards differ" in console.out
    assert "Use easier problems" in console.out
    assert console.out.endswith("6 of 6 steps did not change the model.\n")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("Sampler.top_p=0.9", "Set a temperature above 0, top_p 1.0 and top_k 0"),
        ("Pgrpo.rollouts=1", "Pgrpo.rollouts = 1 must be at least 2"),
        ("Pgrpo.rollouts=3", "is not a multiple of Pgrpo.rollouts = 3"),
        ("Pgrpo.max_prompts=1", "Pgrpo.max_prompts = 1 must be at least 2"),
        ("Pgrpo.init='nowhere'", "nowhere: no such folder of checkpoints"),
        ("Packing.row_tokens=32", "every rollout is longer than a row of 32 tokens"),
        ("Sampler.max_prompt=5", "train.jsonl:1: the prompt of the problem"),
        ("ForkJoin.max_context=6", "tokens, and ForkJoin.max_context allows 1 to 5"),
        ("Pgrpo.microbatch_rows=0", "Pgrpo.microbatch_rows = 0 must be at least 1"),
        ("Pgrpo.max_mismatch=1e-30", "Pgrpo.max_mismatch allows 1e-30"),
        ("Evaluation.temperature=0.0", "would draw the same text each time"),
        ("Pgrpo.inner_steps=3", "Pgrpo.inner_steps = 3 must be at least 1 and at most 2"),
        ("Pgrpo.microbatch_rows=4", "must be a multiple of 8, the number of devices"),
    ],
)
def test_bad_settings_end_in_a_sentence(trained, tmp_path, capsys, word, sentence):
    assert pgrpo(trained, tmp_path, word) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "changes", "sentence"),
    [
        ("Pgrpo.problems", {"answer": " "}, "x.jsonl:2: the answer of the problem 'train-1'"),
        ("Pgrpo.problems", {"id": "train-0"}, "x.jsonl:2 has the id 'train-0', and so has"),
        ("Evaluation.problems", {"id": "train-0"}, "x.jsonl:2 has the id 'train-0', and so has"),
    ],
)
def test_problems_that_cannot_be_rewarded_or_told_apart_are_refused_at_the_start(
    made, tmp_path, capsys, field, changes, sentence
):
    first, second = itertools.islice(records.read(made / "data" / "train.jsonl"), 2)
    records.write(tmp_path / "x.jsonl", [first, dataclasses.replace(second, **changes)])
    assert pgrpo(made, tmp_path / "run", f"{field}='{tmp_path / 'x.jsonl'}'") == 2
    assert sentence in capsys.readouterr().err
