"""A folder of checkpoints is enough: it loads on any mesh, after a move, without its sources."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
import tokenizers

from tw_jax import checkpoint
from tw_jax.checkpoint import Checkpoints
from tw_jax.config import load_config
from tw_jax.damage import DamagedError
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.models.load import LanguageModel, describe, load_model, record_model
from tw_jax.models.lora import Lora
from tw_jax.models.rope import Rope
from tw_jax.models.transformer import network
from tw_jax.sharding import Mesh, Rules, make_mesh
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece, train_sentencepiece
from tw_jax.train.state import Optim, initial_state

MODEL = tiny.model(
    vocab_size=384,
    width=32,
    mlp_width=48,
    num_heads=2,
    num_kv_heads=1,
    head_width=16,
    rope=Rope(theta=123.0),
    attention="auto",
    lora=Lora(rank=2, alpha=4.0),
)
LIMITS = ForkJoin(max_new=77, max_threads=3, unfinished_thread="abort")
CORPUS = ["0123456789 abc: <Thread>\n1: a tale of ten letters</Thread>\n"] * 50


def trained_tokenizer(folder, kind):
    """The config of a tokenizer whose file lies in a folder, and its chat template."""
    if kind is Bytes:
        return Bytes(), Chat(template="plain", instruction="Think in 'threads'.\n")
    if kind is SentencePiece:
        path = folder / "some.model"
        train_sentencepiece(CORPUS, path, 320)
        return SentencePiece(path=str(path)), Chat(template="plain")
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[])
    )
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    built.save(str(folder / "qwen.json"))
    eos = ("<|im_end|>", "<|endoftext|>")
    return HuggingFace(path=str(folder / "qwen.json"), eos=eos), Chat(template="qwen")


def save(folder, sources, kind, model=MODEL, steps=(3,)):
    """What a training run on eight devices leaves; returns its config and its parameters."""
    tokenizer, chat = trained_tokenizer(sources, kind)
    config = LanguageModel(model=model, tokenizer=tokenizer, chat=chat, forkjoin=LIMITS)
    mesh = make_mesh(Mesh(fsdp=4, tensor=2))
    made = load_tokenizer(tokenizer)
    net = network(model, num_ids=made.vocab_size)
    state = initial_state(
        net, Optim(peak_lr=1.0), mesh=mesh, rules=Rules(kv_heads=()), key=jax.random.key(4)
    )
    with Checkpoints(folder, keep=2) as kept:
        note = record_model(folder, config, made)
        for step in steps:
            kept.save(step, state, {"batches": {"position": 1}, **note})
    return config, state.params


KINDS = (Bytes, SentencePiece, HuggingFace)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def moved(request, tmp_path_factory):
    """Checkpoints that were moved after the files that they were made from were deleted."""
    folder = tmp_path_factory.mktemp("load")
    (folder / "sources").mkdir()
    config, params = save(folder / "run" / "checkpoints", folder / "sources", request.param)
    tokenizer = load_tokenizer(config.tokenizer)
    shutil.rmtree(folder / "sources")
    shutil.move(folder / "run", folder / "elsewhere")
    return folder / "elsewhere" / "checkpoints", config, params, tokenizer


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("devices", [None, 1, 4, 8])
def test_a_moved_folder_loads_on_any_number_of_devices(moved, devices):
    folder, config, params, tokenizer = moved
    mesh, rules = None, Rules()
    if devices is not None:
        mesh = make_mesh(Mesh(fsdp=-1, data=1), jax.devices()[:devices])
    loaded = load_model(folder, mesh=mesh, rules=rules)
    assert_equal(loaded.params, params)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(loaded.params)} == {
        devices or 1
    }
    assert loaded.params["blocks"]["attention"]["q"].sharding.is_fully_replicated == (
        devices in (None, 1)
    )
    assert loaded.step == 3
    assert loaded.config.model == MODEL
    assert loaded.chat == config.chat
    assert loaded.protocol.limits == LIMITS
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert loaded.tokenizer.eos_ids == tokenizer.eos_ids
    text = "<Thread>\n1: a tale</Thread>"
    assert loaded.tokenizer.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_the_description_of_a_folder_is_the_config_that_loads_it(moved, tmp_path):
    folder, config, _, _ = moved
    file = tmp_path / "model.gin"
    file.write_text(describe(folder), encoding="utf-8")
    read = load_config(LanguageModel, [file])
    assert read == load_model(folder).config
    assert read.model == config.model
    assert read.chat == config.chat
    assert read.forkjoin == config.forkjoin
    path = getattr(read.tokenizer, "path", None)
    assert path is None or (path.startswith(str(folder)) and load_tokenizer(read.tokenizer))


def test_a_config_replaces_what_the_checkpoint_says(moved):
    folder, _, params, _ = moved
    config = load_model(folder).config
    other = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention="reference"),
        forkjoin=ForkJoin(max_new=5),
    )
    loaded = load_model(folder, config=other)
    assert loaded.protocol.limits.max_new == 5
    assert loaded.config == other
    assert_equal(loaded.params, params)
    wide = dataclasses.replace(other, model=dataclasses.replace(MODEL, mlp_width=64))
    with pytest.raises(ValueError, match="does not fit"):
        load_model(folder, config=wide)


def test_adapters_that_the_checkpoint_lacks_are_refused(moved):
    folder, *_ = moved
    config = load_model(folder).config
    lora = Lora(rank=7, alpha=4.0)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    with pytest.raises(ValueError, match=r"Leave Model\.lora out"):
        load_model(folder, config=other)


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 3 and 5 with a SentencePiece file."""
    save(tmp_path / "checkpoints", tmp_path, SentencePiece, steps=(3, 5))
    return tmp_path / "checkpoints"


def test_a_step_is_chosen_and_a_missing_one_is_named(run):
    assert load_model(run).step == 5
    assert load_model(run, step=3).step == 3
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint of step 4\. It has 3, 5\."):
        load_model(run, step=4)


def test_the_tokenizers_file_disturbs_neither_saving_nor_resuming(run, tmp_path, recwarn):
    before = (run / "tokenizer.model").stat()
    _, params = save(run, tmp_path, SentencePiece, steps=(7,))
    assert sorted(path.name for path in run.iterdir()) == ["5", "7", "tokenizer.model"]
    # The same content is not written again.
    assert (run / "tokenizer.model").stat().st_mtime_ns == before.st_mtime_ns
    with Checkpoints(run, keep=2) as kept:
        assert kept.latest() == 7
        assert kept.note()["batches"] == {"position": 1}
    assert checkpoint.newest(run) == 7
    assert_equal(load_model(run).params, params)
    assert not [w for w in recwarn if "checkpoint" in str(w.message)]


def test_the_file_of_another_tokenizer_is_refused(run):
    train_sentencepiece(["quite other words 0123456789\n"] * 50, run / "tokenizer.model", 310)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not the tokenizer of the checkpoi"):
        load_model(run)


def test_a_config_with_another_tokenizer_is_refused(run):
    config = dataclasses.replace(load_model(run).config, tokenizer=Bytes())
    with pytest.raises(ValueError, match=r"Bytes\(\) is not the tokenizer of the checkpoints in"):
        load_model(run, config=config)


def test_a_missing_tokenizer_file_is_named(run):
    (run / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoints/tokenizer\.model: the tokenizer fi"):
        load_model(run)


def test_a_link_out_of_the_folder_is_not_read(run, tmp_path):
    shutil.move(run / "tokenizer.model", tmp_path / "secret")
    (run / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"is a link to .*secret, outside of its folder"):
        load_model(run)


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    with Checkpoints(tmp_path, keep=1) as kept:
        kept.save(2, {"params": {"w": jax.numpy.ones(3)}}, {"config": "Sft.steps = 2\n"})
    sentence = r"/2 does not say which model, .* an earlier version of tw_jax .* Run tw sft"
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        describe(tmp_path)


def test_what_a_later_version_wrote_is_told_in_a_sentence(run, tmp_path):
    note = checkpoint.read_note(run)
    note["language_model"]["config"] += "Model.number_of_experts = 8\n"
    with Checkpoints(tmp_path / "later", keep=1) as kept:
        kept.save(2, {"params": {"w": jax.numpy.ones(3)}}, note)
    with pytest.raises(ValueError, match=r"this version of tw_jax cannot read .*number_of_experts"):
        describe(tmp_path / "later")


def test_a_record_that_was_edited_is_damage(run):
    file = next((run / "5" / "extra").iterdir())
    record = json.loads(file.read_text())
    record["processes"][0]["language_model"]["tokenizer"] = "00"
    file.write_text(json.dumps(record))
    with pytest.raises(DamagedError, match="its JSON record is not what was written"):
        load_model(run)


def test_control_tokens_of_the_record_must_be_those_of_the_vocabulary(run, tmp_path):
    note = checkpoint.read_note(run)
    assert note["language_model"]["control_tokens"]["</Thread>"] > 0
    note["language_model"]["control_tokens"]["<spawn>"] = 11
    other = tmp_path / "other"
    with Checkpoints(other, keep=1) as kept:
        kept.save(2, {"params": {"w": jax.numpy.ones(3)}}, note)
    shutil.copy(run / "tokenizer.model", other / "tokenizer.model")
    with pytest.raises(ValueError, match=r"'<spawn>' is \[.*must be one id of its own"):
        load_model(other)


def test_files_of_an_import_go_along_to_the_checkpoints_that_begin_with_it(run, tmp_path):
    checkpoint.write_beside(run, {"hf/config.json": b"{}", "hf/LICENSE": b"free"})
    config = load_model(run).config
    tokenizer = load_tokenizer(config.tokenizer)
    record_model(tmp_path / "next", config, tokenizer, origin=run)
    assert checkpoint.read_beside(tmp_path / "next", "hf/LICENSE") == b"free"
    record_model(tmp_path / "bytes", config, load_tokenizer(Bytes()), origin=run)
    assert checkpoint.read_beside(tmp_path / "bytes", "hf/LICENSE") is None
    # A resumed run does not need the checkpoints that it began with.
    record_model(tmp_path / "next", config, tokenizer, origin=tmp_path / "gone")
