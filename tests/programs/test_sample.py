"""`tw sample`: rollouts are kept by ids, seeds belong to rollouts, and nothing is made twice."""

import numpy as np
import pytest

from tw_jax.cli import main
from tw_jax.config import load
from tw_jax.data import records
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.programs import sample
from tw_jax.programs.sample import Sample
from tw_jax.tokenizer import SentencePiece, load_tokenizer


def rollouts(folder):
    return list(records.read(folder / "rollouts.jsonl"))


def test_every_problem_has_its_rollouts_with_ids_and_log_probs(runs):
    found = rollouts(runs / "samples")
    assert {r.id for r in found} == {f"held_out-{n}/{k}" for n in range(3) for k in range(2)}
    tokenizer = load_tokenizer(SentencePiece(path=str(runs / "data" / "tokenizer.model")))
    for rollout in found:
        assert rollout.fingerprint == tokenizer.fingerprint
        assert all(len(call.logp) == len(call.sampled) for call in rollout.calls)
        assert all((np.asarray(call.logp) <= 0).all() for call in rollout.calls)


def test_item_26_a_kept_rollout_tells_the_response_alone_with_its_tags(runs):
    cfg = load(Sample, [str(runs / "sample.gin")])
    loaded = sample.load(cfg)
    for rollout in rollouts(runs / "samples"):
        prompt = cfg.chat.prompt(loaded.tokenizer, rollout.question)
        assert rollout.prompt.tolist() == prompt.tolist()
        calls = [Result(call.sampled, call.logp) for call in rollout.calls]
        made = rebuild(loaded.sampler.protocol, rollout.prompt, calls)
        assert rollout.text == loaded.tokenizer.decode(made.ids[len(prompt) :])


def test_an_interrupted_run_makes_only_what_is_missing(runs, tmp_path, capsys):
    whole = rollouts(runs / "samples")
    path = tmp_path / "rollouts.jsonl"
    lines = (runs / "samples" / "rollouts.jsonl").read_bytes().split(b"\n")
    # Two whole lines and the half of a third, as a crash leaves them.
    path.write_bytes(b"\n".join(lines[:2]) + b"\n" + lines[2][:30])
    with pytest.warns(UserWarning, match="rollouts.jsonl"):
        assert (
            main(["sample", str(runs / "sample.gin"), "--set", f"Sample.workdir='{tmp_path}'"]) == 0
        )
    assert "4 new rollouts" in capsys.readouterr().out
    want = {r.id: [c.sampled.tolist() for c in r.calls] for r in whole}
    assert {r.id: [c.sampled.tolist() for c in r.calls] for r in rollouts(tmp_path)} == want


@pytest.mark.parametrize("word", ["Sampler.temperature=0.5", "ForkJoin.max_thread=19"])
def test_rollouts_of_other_settings_are_not_mixed(runs, capsys, word):
    assert main(["sample", str(runs / "sample.gin"), "--set", word]) == 2
    name = "temperature" if "temperature" in word else "forkjoin"
    assert f"holds rollouts with another {name}" in capsys.readouterr().err


def test_a_missing_checkpoint_ends_in_a_sentence(runs, tmp_path, capsys):
    word = f"Sample.checkpoint='{tmp_path / 'none'}'"
    assert main(["sample", str(runs / "sample.gin"), "--set", word]) == 2
    assert "no such folder of checkpoints" in capsys.readouterr().err
