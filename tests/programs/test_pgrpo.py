"""`tw pgrpo`: a run leaves what it should, goes on exactly, and survives groups without signal."""

import json

import jax
import numpy as np
import pytest

from tw_jax import metrics
from tw_jax.checkpoint import restore_params
from tw_jax.cli import main
from tw_jax.data import records

PGRPO = """
Model.vocab_size = 320
Model.num_layers = 1
Model.width = 32
Model.mlp_width = 64
Model.num_heads = 2
Model.num_kv_heads = 1
Model.head_width = 16
Model.qk_norm = True
Model.tie_embeddings = True
Model.rope = @Rope()
SentencePiece.path = '{folder}/data/tokenizer.model'
Chat.template = 'plain'
ForkJoin.max_threads = 3
ForkJoin.max_new = 40
ForkJoin.max_thread = 10
Pgrpo.workdir = '{folder}/pgrpo'
Pgrpo.steps = 3
Pgrpo.save_every = 1
Pgrpo.init = '{folder}/sft/checkpoints'
Pgrpo.model = @Model()
Pgrpo.tokenizer = @SentencePiece()
Pgrpo.chat = @Chat()
Pgrpo.forkjoin = @ForkJoin()
Pgrpo.problems = '{folder}/data/train.jsonl'
Pgrpo.prompts = 2
Pgrpo.most_prompts = 4
Pgrpo.rollouts = 2
Pgrpo.sampler = @Sampler()
Pgrpo.grader = @Grader()
Pgrpo.reward = @Reward()
Pgrpo.loss = @PolicyLoss()
Pgrpo.aggregation = @Aggregation()
Pgrpo.packing = @Packing()
Pgrpo.optim = @Optim()
Pgrpo.mesh = @Mesh()
Pgrpo.evaluation = @Evaluation()
Evaluation.problems = '{folder}/data/held_out.jsonl'
Evaluation.samples = 2
Evaluation.temperature = 1.0
Evaluation.every = 2
Mesh.fsdp = 1
Mesh.data = 8
Sampler.rows = 16
Sampler.max_prompt = 40
Packing.rows = 8
Packing.row_tokens = 256
Optim.peak_lr = 1e-3
Optim.schedule = 'constant'
Reward.overlong = @SoftOverlong()
SoftOverlong.limit_tokens = 60
SoftOverlong.buffer_tokens = 60
"""
# A model that knows nothing is never right: what varies within a group is its length.


@pytest.fixture(scope="module")
def trained(runs):
    (runs / "pgrpo.gin").write_text(PGRPO.format(folder=runs), encoding="utf-8")
    assert main(["pgrpo", str(runs / "pgrpo.gin"), "--debug"]) == 0
    return runs


def pgrpo(runs, folder, *words):
    sets = [f"Pgrpo.workdir='{folder}'", *words]
    return main(["pgrpo", str(runs / "pgrpo.gin"), *[w for s in sets for w in ("--set", s)]])


def params(folder):
    return jax.tree.leaves(jax.device_get(restore_params(folder / "checkpoints")))


def numbers(folder):
    """The lines of a run without what time it took."""
    lines = metrics.read(folder / "metrics.jsonl")
    return [{n: v for n, v in line.items() if "second" not in n} for line in lines]


def test_every_step_has_its_line(trained):
    lines = metrics.read(trained / "pgrpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    wanted = {
        *("reward", "correct", "longest_tokens", "total_tokens", "ratio_min", "ratio_max"),
        *("loss", "grad_norm", "seconds", "groups", "timeouts", "reward_acceleration"),
    }
    for line in lines:
        assert line.keys() >= wanted
        assert 0.999 <= line["ratio_min"] <= line["ratio_max"] <= 1.001
        assert line["longest_tokens"] <= line["total_tokens"]
    assert "eval_correct" in lines[1]
    assert "eval_pass_at_2" in lines[2]
    assert "eval_correct" not in lines[0]


def test_every_rollout_is_kept_with_its_calls_log_probs_reward_and_advantage(trained):
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
            np.testing.assert_allclose(advantage, reward - reward.mean(), atol=1e-6)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(trained, tmp_path, monkeypatch):
    from tw_jax.train import loop

    stops = iter([False, True, False])
    monkeypatch.setattr(loop, "_stops", lambda caught, index: next(stops))
    assert pgrpo(trained, tmp_path) == 130
    assert pgrpo(trained, tmp_path) == 0
    assert numbers(tmp_path) == numbers(trained / "pgrpo")
    for a, b in zip(params(trained / "pgrpo"), params(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rollouts_that_a_crash_left_are_not_sampled_again(trained, tmp_path, monkeypatch):
    from tw_jax.programs import pgrpo as program

    def crash(*_, **__):
        raise RuntimeError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(program, "pack_groups", crash)
        with pytest.raises(RuntimeError, match="power"):
            pgrpo(trained, tmp_path, "Pgrpo.steps=1")
    left = (tmp_path / "rollouts" / ".000000.jsonl").read_text().splitlines()
    assert len(left) >= 4

    sampled = program.Rollouts._rollouts
    again = []
    monkeypatch.setattr(
        program.Rollouts,
        "_rollouts",
        lambda self, problems, *rest: again.append(len(problems)) or sampled(self, problems, *rest),
    )
    assert pgrpo(trained, tmp_path, "Pgrpo.steps=1") == 0
    assert again == [3]  # the held-out problems of the evaluation, and no others
    first = records.open_records(tmp_path / "rollouts" / "000000.jsonl")
    assert [json.loads(line)["id"] for line in left] == [one.id for one in first]
    assert not (tmp_path / "rollouts" / ".000000.jsonl").exists()


def test_a_step_whose_groups_all_lack_signal_changes_nothing(trained, tmp_path):
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


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("Sampler.top_p=0.9", "want a temperature above 0, top_p 1.0 and top_k 0"),
        ("Pgrpo.rollouts=1", "Pgrpo.rollouts = 1: want at least 2"),
        ("Pgrpo.rollouts=3", "want a multiple of Pgrpo.rollouts = 3"),
        ("Pgrpo.most_prompts=1", "want at least Pgrpo.prompts = 2"),
        ("Pgrpo.init='nowhere'", "nowhere: no such folder of checkpoints"),
        ("Packing.row_tokens=32", "want at most 32"),
        ("Pgrpo.band=(0.99999999, 1.00000001)", "times the sampler's; want"),
    ],
)
def test_bad_settings_end_in_a_sentence(trained, tmp_path, capsys, word, sentence):
    assert pgrpo(trained, tmp_path, word) == 2
    assert sentence in capsys.readouterr().err
