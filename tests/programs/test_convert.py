"""`tw convert`: what is imported trains, what is exported is served, nothing is lost between."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from safetensors.numpy import load_file

from tw_jax.checkpoint import restore_params
from tw_jax.cli import main
from tw_jax.models import hf, hf_config
from tw_jax.programs import convert as convert_module
from tw_jax.tokenizer import CONTROL, HuggingFace, load_tokenizer

pytestmark = pytest.mark.usefixtures("quick_programs")
MODEL = tiny.model(
    vocab_size=300,
    width=32,
    mlp_width=48,
    num_heads=2,
    num_kv_heads=1,
    head_width=16,
    attention="auto",
)
IMPORT = """
Convert.workdir = '{folder}'
Convert.job = @Import()
Import.source = '{source}'
"""
EXPORT = """
include '{model}'
Convert.workdir = '{folder}'
Convert.job = @Export()
Export.checkpoint = '{checkpoint}'
Export.model = @Model()
"""


def convert(tmp_path, text, *words, **places):
    file = tmp_path / "convert.gin"
    file.write_text(text.format(**places))
    return main(["convert", str(file), *[w for s in words for w in ("--set", s)]])


@pytest.fixture
def source(tmp_path):
    """A small Qwen3 as the Hub has it: weights in bfloat16, a byte-level tokenizer."""
    folder = tmp_path / "hub"
    folder.mkdir()
    characters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    built = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(sorted(characters))}, merges=[])
    )
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<|im_end|>"])
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"256": {"content": "<|im_end|>", "special": True}}})
    )
    shapes = hf.tensor_shapes(MODEL)
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype(jax.numpy.bfloat16) for n, s in shapes.items()}
    hf.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = hf_config.config_fields(MODEL, dtype="bfloat16", base={"eos_token_id": 256})
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def tensors_of(folder):
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def test_there_and_back_by_the_command_line_every_byte_is_the_same(source, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    places = {"folder": ours, "source": source}
    assert convert(tmp_path, IMPORT, "Import.control_tokens=False", **places) == 0
    assert "parameters" in capsys.readouterr().out
    places = {"folder": back, "checkpoint": ours / "checkpoints", "model": ours / "model.gin"}
    assert convert(tmp_path, EXPORT, f"Export.files='{ours}/hf'", **places) == 0
    want, got = tensors_of(source), tensors_of(back / "hf")
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert got[name].tobytes() == tensor.tobytes()
    assert hf_config.read_config(back / "hf") == hf_config.read_config(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / "hf" / name).read_text() == (source / name).read_text()


def test_an_import_adds_control_tokens_and_their_rows(source, tmp_path, close):
    ours = tmp_path / "ours"
    assert convert(tmp_path, IMPORT, folder=ours, source=source) == 0
    path = str(ours / "hf" / "tokenizer.json")
    tokenizer = load_tokenizer(HuggingFace(path=path, eos=("<|im_end|>",)))
    ids = [tokenizer.id_of(text) for text in CONTROL]
    assert ids == list(range(257, 269))
    listed = json.loads((ours / "hf" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [listed[str(id)]["content"] for id in ids] == list(CONTROL)
    params = restore_params(ours / "checkpoints")
    head = np.asarray(tensors_of(source)["lm_head.weight"], np.float32)
    assert params["unembed"].shape == (384, 32)  # 300 rows, to the next multiple of 128
    word = [tokenizer.id_of(c) for c in "/Thread"]
    row = tokenizer.id_of("</Thread>")
    close("rounding", params["unembed"][row], head[word].mean(0))
    assert hf_config.read_model(ours / "hf").vocab_size == 384
    # A folder that has them already is left as it is.
    back = tmp_path / "back"
    places = {"folder": back, "checkpoint": ours / "checkpoints", "model": ours / "model.gin"}
    assert convert(tmp_path, EXPORT, f"Export.files='{ours}/hf'", **places) == 0
    assert convert(tmp_path, IMPORT, folder=tmp_path / "again", source=back / "hf") == 0
    again = restore_params(tmp_path / "again" / "checkpoints")
    rounded = np.asarray(params["embed"]).astype(jax.numpy.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(again["embed"], rounded)


@pytest.mark.torch
def test_transformers_serves_an_export_with_its_control_tokens(source, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert(tmp_path, IMPORT, folder=ours, source=source) == 0
    places = {"folder": back, "checkpoint": ours / "checkpoints", "model": ours / "model.gin"}
    assert convert(tmp_path, EXPORT, f"Export.files='{ours}/hf'", **places) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(back / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(back / "hf")
    prompt = "<Thread>\n1: a</Thread>"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    mine = load_tokenizer(
        HuggingFace(path=str(back / "hf" / "tokenizer.json"), eos=("<|im_end|>",))
    )
    assert ids[0].tolist() == mine.encode(prompt).tolist()
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_training_begins_with_imported_parameters(runs, source, tmp_path):
    """A run of the tiny model goes on as a new one from its own checkpoint, not from fresh ones."""
    words = [
        f"Sft.workdir='{tmp_path / 'next'}'",
        f"Sft.init='{runs / 'sft' / 'checkpoints'}'",
        "Sft.steps=1",
    ]
    sets = [w for s in words for w in ("--set", s)]
    assert main(["sft", str(runs / "sft.gin"), *sets]) == 0
    lines = (tmp_path / "next" / "metrics.jsonl").read_text().splitlines()
    before = (runs / "sft" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] < json.loads(before[0])["loss"]


def test_an_import_does_not_overwrite_a_checkpoint(source, tmp_path, capsys):
    places = {"folder": tmp_path / "ours", "source": source}
    assert convert(tmp_path, IMPORT, **places) == 0
    assert convert(tmp_path, IMPORT, **places) == 2
    assert "checkpoints is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: not there"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: the tokenizer file is"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "not a whole safetensors file"),
        (lambda f: shutil.rmtree(f), "hub"),
    ],
)
def test_a_broken_folder_ends_in_a_sentence(source, tmp_path, capsys, spoil, sentence):
    spoil(source)
    assert convert(tmp_path, IMPORT, folder=tmp_path / "ours", source=source) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert str(source) in error


def test_exporting_with_another_model_names_what_differs(runs, tmp_path, capsys, source):
    places = {"folder": tmp_path / "out", "checkpoint": runs / "sft" / "checkpoints"}
    assert convert(tmp_path, IMPORT, folder=tmp_path / "ours", source=source) == 0
    assert convert(tmp_path, EXPORT, model=tmp_path / "ours" / "model.gin", **places) == 2
    assert "does not fit" in capsys.readouterr().err


# Nothing by halves.


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_import_that_fails_leaves_the_workdir_as_it_was(source, tmp_path, capsys):
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "notes.txt").write_text("mine")
    tensors = tensors_of(source)
    del tensors["lm_head.weight"]
    hf.save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match="tensors are missing: lm_head"):
        convert_module.import_folder(convert_module.Import(source=str(source)), ours)
    assert content(ours) == {"notes.txt": b"mine"}
    assert not [path for path in ours.iterdir() if path.is_dir()]


def test_an_import_does_not_touch_what_another_left(source, tmp_path):
    ours = tmp_path / "ours"
    (ours / "hf").mkdir(parents=True)
    (ours / "hf" / "tokenizer.json").write_text("precious")
    with pytest.raises(ValueError, match="hf is there already, and an import needs an empty place"):
        convert_module.import_folder(convert_module.Import(source=str(source)), ours)
    assert content(ours) == {"hf/tokenizer.json": b"precious"}


def test_an_export_that_fails_leaves_the_old_one_as_it_was(source, tmp_path, monkeypatch):
    ours, out = tmp_path / "ours", tmp_path / "out"
    convert_module.import_folder(convert_module.Import(source=str(source)), ours)
    checkpoint = str(ours / "checkpoints")
    model = hf_config.read_model(ours / "hf")
    job = convert_module.Export(checkpoint=checkpoint, model=model, files=str(ours / "hf"))
    convert_module.export_folder(job, out)
    (out / "tokenizer.json").write_text("another")
    (out / "mine.txt").write_text("kept")
    before = content(out)

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(hf, "save_file", fails)
        with pytest.raises(OSError, match="No space"):
            convert_module.export_folder(job, out)
    assert content(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "ours", "out"]
    convert_module.export_folder(job, out)
    assert (out / "tokenizer.json").read_text() == (ours / "hf" / "tokenizer.json").read_text()
    assert (out / "mine.txt").read_text() == "kept"


# What is copied.


def test_neither_code_nor_weights_of_other_formats_are_copied(source, tmp_path):
    for name in ("modeling.py", "pytorch_model.bin", "model.gguf", "model.pt", "extra.txt", ".env"):
        (source / name).write_text("x")
    (source / "LICENSE").write_text("free")
    convert_module._copy_files(source, tmp_path)
    copied = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert copied == ["LICENSE", "config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("kind", ["file", "missing", "folder"])
def test_a_link_out_of_the_folder_is_refused(source, tmp_path, kind):
    secret = tmp_path / "secret"
    if kind == "file":
        secret.write_text("key")
    elif kind == "folder":
        secret.mkdir()
    (source / "generation_config.json").symlink_to(secret)
    ours = tmp_path / "ours"
    with pytest.raises(ValueError, match=r"generation_config.json is a link to .*secret, outside"):
        convert_module.import_folder(convert_module.Import(source=str(source)), ours)
    assert content(ours) == {}


def test_weights_behind_a_link_out_of_the_folder_are_refused(source, tmp_path):
    shutil.move(source / "model.safetensors", tmp_path / "other.safetensors")
    (source / "model.safetensors").symlink_to("../other.safetensors")
    ours = tmp_path / "ours"
    with pytest.raises(ValueError, match=r"model.safetensors is a link to .*, outside of its"):
        convert_module.import_folder(convert_module.Import(source=str(source)), ours)
    assert content(ours) == {}


def test_links_of_the_hubs_cache_are_followed_into_its_blobs_only(source, tmp_path):
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.move(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    ours = tmp_path / "ours"
    convert_module.import_folder(convert_module.Import(source=str(snapshot)), ours)
    copied = ours / "hf" / "tokenizer_config.json"
    assert not copied.is_symlink()
    assert "<Thread>" in copied.read_text()
    assert "<Thread>" not in (snapshot / "tokenizer_config.json").read_text()
    (repo / "refs").write_text("x")
    (snapshot / "merges.txt").symlink_to("../../refs")
    with pytest.raises(ValueError, match=r"merges.txt is a link to .*refs, outside of its folder"):
        convert_module._copy_files(snapshot, tmp_path)
