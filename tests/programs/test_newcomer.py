"""The way of a newcomer: an own Qwen3 folder, own texts, adapters, an own reward, and back.

Each command runs in a process of its own, in the newcomer's folder, with the files that a newcomer
writes. The folder is written by transformers: a random Qwen3 with the vocabulary of Qwen3. Its
final norm has the scale 30, because trained models have large ones, and with a scale of 1 its
random output head could give no token a high probability. Its weights stay frozen, so all that the
model learns is in the adapters and in the rows of the control tokens.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from qwen import write_tokenizer

from tw_jax import metrics
from tw_jax.checkpoint import restore_params
from tw_jax.data import records
from tw_jax.models.load import load_model
from tw_jax.models.lora import trained, without_adapters
from tw_jax.tokenizer.control import THREADWEAVER

pytestmark = [pytest.mark.slow, pytest.mark.torch]
ROOT = Path(__file__).parents[2]
FILES = {
    "import.gin": """
Convert.workdir = 'imported'
Import.source = 'hub'
Import.compute_dtype = 'float32'
""",
    "shared.gin": """
Lora.rank = 16
Lora.alpha = 32
ForkJoin.max_new = 100
ForkJoin.max_thread = 16
Packing.row_tokens = 256
Sampler.rows = 8
Sampler.max_prompt = 32
""",
    "sft.gin": """
include 'shared.gin'
Sft.workdir = 'sft'
Sft.init = 'imported/checkpoints'
Sft.steps = 120
Sft.batch_rows = 1
Data.path = 'own.jsonl'
Optim.peak_lr = 1e-2
""",
    "sample.gin": """
include 'shared.gin'
Sample.workdir = 'samples'
Sample.checkpoint = 'sft/checkpoints'
Sample.problems = 'problems.jsonl'
Sample.samples = 2
""",
    "my_rewards.py": '''
"""A reward for short responses."""

from tw_jax.config import configurable
from tw_jax.rollouts.terms import JudgedRollout, RewardTerm


@configurable
class Short(RewardTerm):
    """A penalty on each sampled token.

    Attributes:
      per_token: The penalty of one token.
    """

    per_token: float = 0.01

    def score(self, rollout: JudgedRollout) -> float:
        """Returns 0 or less."""
        return -self.per_token * rollout.cost.total
''',
    "pgrpo.gin": """
include 'shared.gin'
Pgrpo.workdir = 'pgrpo'
Pgrpo.init = 'sft/checkpoints'
Pgrpo.steps = 2
Pgrpo.problems = 'problems.jsonl'
Pgrpo.prompts = 2
Pgrpo.max_prompts = 4
Pgrpo.rollouts = 4
Pgrpo.microbatch_rows = 1
Grader.mode = 'number'
Reward.terms = (@Short(),)
Optim.peak_lr = 1e-3
Optim.warmup_steps = 0
""",
    "export.gin": """
Convert.workdir = 'exported'
Export.checkpoint = 'pgrpo/checkpoints'
Export.dtype = 'float32'
""",
    "greedy.gin": """
include 'shared.gin'
Sample.workdir = 'greedy'
Sample.checkpoint = 'pgrpo/checkpoints'
Sample.problems = 'problems.jsonl'
Sampler.temperature = 0
ForkJoin.parallel = False
ForkJoin.max_new = 40
""",
}


def question(a, b):
    return {"question": f"What is {a} + {b} + {a} * {b}?", "answer": str(a + b + a * b)}


def response(a, b):
    return f"""<think>
<Parallel>
<Outlines>
<Outline>1: sum</Outline>
<Outline>2: product</Outline>
</Outlines>
<Thread>
1: {a} + {b} = {a + b}
</Thread><Thread>
2: {a} * {b} = {a * b}
</Thread>
</Parallel>
</think>

\\boxed{{{a + b + a * b}}}"""


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_trajectories(path):
    """12 trajectories; those of lines 5, 10 and 15 are broken."""
    pairs = [(a, b) for a in range(2, 6) for b in range(7, 10)]
    lines = [question(a, b) | {"response": response(a, b)} for a, b in pairs]
    text = response(2, 7)
    broken = (
        text.replace("<Thread>\n2: 2 * 7 = 14\n</Thread>", ""),
        text.replace("</Parallel>\n", ""),
        text.replace("<Outline>2: product</Outline>\n", ""),
    )
    for number, wrong in enumerate(broken, start=1):
        assert wrong != text
        lines.insert(5 * number - 1, question(2, 7) | {"response": wrong})
    write_lines(path, lines)


def write_hub_folder(folder):
    """A tiny random Qwen3 as on the Hub."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=151_936,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=False,
            eos_token_id=151_645,
        )
    )
    with torch.no_grad():
        model.model.norm.weight.fill_(30)
    model.save_pretrained(folder)


def tw(folder, *words):
    """Runs a command in the folder, as a user does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tw_jax", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def succeeds(folder, *words):
    done = tw(folder, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def params(folder):
    return jax.device_get(restore_params(folder / "checkpoints"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The newcomer's folder, with the import of the model."""
    folder = tmp_path_factory.mktemp("newcomer")
    write_hub_folder(folder / "hub")
    write_trajectories(folder / "own.jsonl")
    pairs = [(2, 7), (3, 8), (4, 9), (5, 8)]
    write_lines(folder / "problems.jsonl", [question(a, b) for a, b in pairs])
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    assert "chat template 'qwen'" in succeeds(folder, "convert", "import.gin").stdout
    return folder


@pytest.fixture(scope="module")
def adapted(imported):
    """The folder and the messages of the supervised run."""
    return imported, succeeds(imported, "sft", "sft.gin", "--set", "Data.unusable=drop")


@pytest.fixture(scope="module")
def reinforced(adapted):
    """The folder and the messages of two steps of P-GRPO."""
    folder, _ = adapted
    return folder, succeeds(folder, "pgrpo", "pgrpo.gin", "--import", "my_rewards")


def test_all_broken_records_are_listed_in_words(imported):
    done = tw(imported, "sft", "sft.gin")
    assert done.returncode == 2
    listed = [line for line in done.stderr.splitlines() if line.startswith("own.jsonl:")]
    assert [line.split(". ")[0] for line in listed] == [
        "own.jsonl:5: A block has 2 outlines and 1 thread",
        "own.jsonl:10: <Parallel> is never closed",
        "own.jsonl:15: A block has 1 outline and 2 threads",
    ]
    assert "3 of 15 records cannot be used" in done.stderr
    assert metrics.read(imported / "sft" / "metrics.jsonl") == []


def test_dropped_records_are_named_once_and_counted(adapted):
    folder, done = adapted
    for line in (5, 10, 15):
        assert done.stderr.count(f"own.jsonl:{line}:") == 1
        assert f"\ntw: This record is left out. own.jsonl:{line}:" in f"\n{done.stderr}"
    assert json.loads((folder / "sft" / "packing.json").read_text())["unusable"] == 3


def test_adapters_and_the_rows_of_added_tokens_are_trained_and_nothing_else(adapted):
    folder, done = adapted
    tokenizer = load_model(folder / "imported" / "checkpoints").tokenizer
    ids = tuple(tokenizer.id_of(text) for text in THREADWEAVER)
    assert ids == tuple(range(151_669, 151_681))
    assert f"Lora.token_rows = {ids}\n" in (folder / "sft" / "config.gin").read_text()
    found = params(folder / "sft")
    jax.tree.map(
        np.testing.assert_array_equal, without_adapters(found), params(folder / "imported")
    )
    moved = trained(found)
    assert moved["embed_lora"].shape == moved["unembed_lora"].shape == (12, 64)
    # Tokens that no text has are read nowhere, but each row of the head takes part in each loss.
    written = np.array([token in response(2, 7) for token in THREADWEAVER])
    assert written.sum() == 8
    np.testing.assert_array_equal(moved["embed_lora"].any(axis=1), written)
    assert moved["unembed_lora"].any(axis=1).all()
    assert all(leaf.any() for leaf in jax.tree.leaves(moved))
    count = sum(leaf.size for leaf in jax.tree.leaves(moved))
    assert f"{count:,} trained" in done.stdout


def test_sampled_rollouts_fork(adapted):
    folder, _ = adapted
    succeeds(folder, "sample", "sample.gin")
    rollouts = list(records.read(folder / "samples" / "rollouts.jsonl"))
    assert len(rollouts) == 8
    forked = [rollout for rollout in rollouts if sum(bool(call.path) for call in rollout.calls) > 1]
    assert len(forked) >= 6


def test_two_steps_of_pgrpo_have_signal_and_the_own_reward(reinforced):
    folder, done = reinforced
    lines = metrics.read(folder / "pgrpo" / "metrics.jsonl")
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert line["groups_with_signal"] > 0
        assert line["skipped"] == 0
        assert "reference_kl" not in line
        extras = [
            rollout.extra
            for rollout in records.read(folder / "pgrpo" / "rollouts" / f"{number:06}.jsonl")
        ]
        for extra in extras:
            assert extra["reward_short"] == pytest.approx(-0.01 * extra["total"])
        mean = sum(extra["reward_short"] for extra in extras) / len(extras)
        assert line["reward_short"] == pytest.approx(mean)
    last = done.stderr.splitlines()[-1]
    assert all(f"{name}=" in last for name in ("reward", "correct", "signal", "skipped"))
    before, after = params(folder / "sft"), params(folder / "pgrpo")
    jax.tree.map(np.testing.assert_array_equal, *map(without_adapters, (before, after)))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained(before), trained(after))
    assert all(jax.tree.leaves(moved))


def test_transformers_decodes_an_export_to_the_ids_of_our_sampler(reinforced):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, _ = reinforced
    succeeds(folder, "sample", "greedy.gin")
    succeeds(folder, "convert", "export.gin")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported" / "hf").eval()
    assert next(model.parameters()).dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "exported" / "hf")
    rollouts = list(records.read(folder / "greedy" / "rollouts.jsonl"))
    assert len(rollouts) == 4
    for rollout in rollouts:
        (call,) = rollout.calls
        prompt = f"<|im_start|>user\n{rollout.question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        assert ids[0].tolist() == list(rollout.prompt)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=len(call.sampled),
            pad_token_id=151_643,
            # Rows without a token have probability 0 in our sampler.
            suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)),
        )
        assert made[0, ids.shape[1] :].tolist() == list(call.sampled)
        assert len(call.sampled) > 10
        assert tokenizer.decode(call.sampled).startswith("<think>\n<Parallel>\n<Outlines>")
