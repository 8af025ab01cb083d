"""One tiny run of every program, from problems to a graded model, made once for all their tests."""

import contextlib

import jax
import pytest

from tw_jax import metrics
from tw_jax.cli import main

CONFIG = """
Model.vocab_size = 384
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
ForkJoin.max_new = 60
ForkJoin.max_thread = 20
"""
MAKE = """
Make.workdir = '{folder}/data'
Make.task = @Multiplication()
Make.train = 40
Make.held_out = 3
Make.vocab_size = 320
Multiplication.min_value = 11
Multiplication.max_value = 99
Multiplication.min_factors = 2
Multiplication.max_factors = 2
Multiplication.parallel = True
Multiplication.lone_pair = 'fork'
"""
SFT = """
Sft.workdir = '{folder}/sft'
Sft.steps = 4
Sft.save_every = 2
Sft.model = @Model()
Sft.tokenizer = @SentencePiece()
Sft.data = @Data()
Sft.forkjoin = @ForkJoin()
Sft.packing = @Packing()
Sft.optim = @Optim()
Sft.mesh = @Mesh()
ForkJoin.max_new = 1000
ForkJoin.max_thread = 200
Mesh.data = 8
Mesh.fsdp = 1
Data.path = '{folder}/data/train.jsonl'
Data.chat = @Chat()
Sft.batch_rows = 8
Packing.row_tokens = 384
Optim.peak_lr = 1e-3
"""
SAMPLE = """
Sample.workdir = '{folder}/samples'
Sample.checkpoint = '{folder}/sft/checkpoints'
Sample.model = @Model()
Sample.tokenizer = @SentencePiece()
Sample.chat = @Chat()
Sample.forkjoin = @ForkJoin()
Sample.sampler = @Sampler()
Sample.problems = '{folder}/data/held_out.jsonl'
Sample.samples = 2
Sampler.rows = 8
Sampler.max_prompt = 40
"""
EVALUATE = """
Evaluate.workdir = '{folder}/graded'
Evaluate.sample = @Sample()
Evaluate.grader = @Grader()
Grader.mode = 'number'
Evaluate.timed = 1
Evaluate.training = '{folder}/sft'
"""
# A model that is hardly trained is never right, so only lengths differ within a group.
PGRPO = """
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
Pgrpo.max_prompts = 4
Pgrpo.rollouts = 2
Pgrpo.sampler = @Sampler()
Pgrpo.grader = @Grader()
Grader.mode = 'number'
Pgrpo.reward = @Reward()
Pgrpo.loss = @PolicyLoss()
Pgrpo.aggregation = @Aggregation()
Pgrpo.packing = @Packing()
Pgrpo.optim = @Optim()
Pgrpo.mesh = @Mesh()
Pgrpo.evaluation = @Evaluation()
ForkJoin.max_new = 40
ForkJoin.max_thread = 10
Evaluation.problems = '{folder}/data/held_out.jsonl'
Evaluation.samples = 2
Evaluation.temperature = 1.0
Evaluation.every = 2
Mesh.fsdp = 1
Mesh.data = 8
Sampler.rows = 16
Sampler.max_prompt = 40
Pgrpo.microbatch_rows = 8
Packing.row_tokens = 256
Optim.peak_lr = 1e-3
Optim.schedule = 'constant'
Reward.overlong = @SoftOverlong()
SoftOverlong.limit_tokens = 60
SoftOverlong.buffer_tokens = 60
"""


@contextlib.contextmanager
def _quickly():
    """Compiles without LLVM's passes, because tests here check what programs read and write."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_programs():
    """For files of tests that spend most of their time in the compiler."""
    with _quickly():
        yield


@pytest.fixture(scope="session")
def numbers():
    """The lines of metrics in a run's folder, without times."""

    def read(folder):
        lines = metrics.read(folder / "metrics.jsonl")
        return [{n: v for n, v in line.items() if "second" not in n} for line in lines]

    return read


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with the data of `make`, and with a config of each program, VERB.gin."""
    folder = tmp_path_factory.mktemp("runs")
    for name, text in (
        ("make", MAKE),
        ("sft", CONFIG + SFT),
        ("sample", CONFIG + SAMPLE),
        ("evaluate", CONFIG + SAMPLE + EVALUATE),
        ("pgrpo", CONFIG + PGRPO),
    ):
        (folder / f"{name}.gin").write_text(text.format(folder=folder), encoding="utf-8")
    with _quickly():
        assert main(["make", str(folder / "make.gin")]) == 0
    return folder


@pytest.fixture(scope="session")
def runs(made):
    """The same folder after `sft`, `sample` and `evaluate`."""
    with _quickly():
        for name in ("sft", "sample", "evaluate"):
            assert main([name, str(made / f"{name}.gin")]) == 0
    return made
