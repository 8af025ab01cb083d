"""`tw convert`: an import can be trained, an export can be served, and both are lossless."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from programs.jobs import Job
from safetensors.numpy import load_file

from tw_jax.checkpoint import restore_params
from tw_jax.cli import main
from tw_jax.models import hf, hf_config, hf_files
from tw_jax.models.hf_export import Export, export_folder
from tw_jax.models.hf_import import Import, import_folder
from tw_jax.models.load import describe, load_model
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.control import THREADWEAVER
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.load import load_tokenizer

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
Convert.workdir = '{folder}'
Convert.job = @Export()
Export.checkpoint = '{checkpoint}'
"""


def convert(tmp_path, text, *words, **places):
    file = tmp_path / "convert.gin"
    file.write_text(text.format(**places))
    return main(["convert", str(file), *[w for s in words for w in ("--set", s)]])


@pytest.fixture
def source(tmp_path):
    """A small Qwen3 as on the Hub, with weights in bfloat16 and a byte-level tokenizer."""
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
    places = {"folder": back, "checkpoint": ours / "checkpoints"}
    assert convert(tmp_path, EXPORT, **places) == 0
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
    path = str(ours / "checkpoints" / "tokenizer.json")
    tokenizer = load_tokenizer(HuggingFace(path=path, eos=("<|im_end|>",)))
    ids = [tokenizer.id_of(text) for text in THREADWEAVER]
    assert ids == list(range(257, 269))
    listed = json.loads((ours / "checkpoints" / "hf" / "tokenizer_config.json").read_text())[
        "added_tokens_decoder"
    ]
    assert [listed[str(id)]["content"] for id in ids] == list(THREADWEAVER)
    params = restore_params(ours / "checkpoints")
    head = np.asarray(tensors_of(source)["lm_head.weight"], np.float32)
    assert params["unembed"].shape == (384, 32)  # 300 rows, to the next multiple of 128
    word = [tokenizer.id_of(c) for c in "/Thread"]
    row = tokenizer.id_of("</Thread>")
    close("rounding", params["unembed"][row], head[word].mean(0))
    assert hf_config.read_model(ours / "checkpoints" / "hf").vocab_size == 384
    # A folder that already has them is unchanged.
    back = tmp_path / "back"
    places = {"folder": back, "checkpoint": ours / "checkpoints"}
    assert convert(tmp_path, EXPORT, **places) == 0
    assert convert(tmp_path, IMPORT, folder=tmp_path / "again", source=back / "hf") == 0
    again = restore_params(tmp_path / "again" / "checkpoints")
    rounded = np.asarray(params["embed"]).astype(jax.numpy.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(again["embed"], rounded)


@pytest.mark.torch
def test_transformers_serves_an_export_with_its_control_tokens(source, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert(tmp_path, IMPORT, folder=ours, source=source) == 0
    places = {"folder": back, "checkpoint": ours / "checkpoints"}
    assert convert(tmp_path, EXPORT, **places) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(back / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(back / "hf")
    prompt = "<Thread>\n1: a</Thread>"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    mine = load_tokenizer(
        HuggingFace(path=str(back / "hf" / "tokenizer.json"), eos=("<|im_end|>",))
    )
    assert ids[0].tolist() == mine.encode(prompt).tolist()
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_an_import_is_enough_to_load_its_model(source, tmp_path):
    import_folder(Import(source=str(source)), tmp_path / "ours")
    shutil.rmtree(source)
    checkpoints = tmp_path / "ours" / "checkpoints"
    loaded = load_model(checkpoints)
    assert loaded.config.model.vocab_size == 384
    assert loaded.config.model.compute_dtype == "bfloat16"
    assert loaded.chat == Chat(template="plain")
    assert loaded.tokenizer.decode(loaded.tokenizer.eos_ids) == "<|im_end|>"
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["checkpoints"]
    assert {path.name for path in checkpoints.iterdir()} == {"0", "hf", "tokenizer.json"}


def test_an_import_without_control_tokens_can_be_exported_but_not_sampled(source, tmp_path):
    import_folder(Import(source=str(source), control_tokens=False), tmp_path)
    with pytest.raises(ValueError, match=r"'<Outlines>' is \[.*must be one id of its own"):
        load_model(tmp_path / "checkpoints")


def test_an_end_of_sequence_that_no_file_names_must_be_given(source, tmp_path):
    fields = json.loads((source / "config.json").read_text()) | {"eos_token_id": None}
    (source / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=r"no end of sequence was found.* Set Import\.eos, such as"
    ):
        import_folder(Import(source=str(source)), tmp_path / "ours")
    job = Import(source=str(source), eos=("<|im_end|>",), chat=Chat(template="plain"))
    made = import_folder(job, tmp_path / "ours")
    assert isinstance(made.tokenizer, HuggingFace)
    assert made.tokenizer.eos == ("<|im_end|>",)


def test_an_import_that_was_trained_is_exported_with_the_files_of_its_source(
    runs, source, tmp_path
):
    template = "{{ messages[0].content }}\n"
    (source / "chat_template.jinja").write_text(template)
    (source / "generation_config.json").write_text('{"eos_token_id": [256], "top_k": 20}')
    import_folder(Import(source=str(source), compute_dtype="float32"), tmp_path / "ours")
    checkpoints = tmp_path / "ours" / "checkpoints"
    own = ("LanguageModel.", "ForkJoin.", "Chat.")
    lines = [line for line in describe(checkpoints).splitlines() if not line.startswith(own)]
    other = ("Model.", "SentencePiece.")
    lines += [x for x in (runs / "sft.gin").read_text().splitlines() if not x.startswith(other)]
    (tmp_path / "sft.gin").write_text("\n".join(lines))
    sets = (
        *("Sft.steps=1", "Sft.tokenizer=@HuggingFace()", f"Sft.init='{checkpoints}'"),
        *(f"Sft.workdir='{tmp_path}/sft'", "Packing.row_tokens=1024"),
    )
    words = [w for s in sets for w in ("--set", s)]
    assert main(["sft", str(tmp_path / "sft.gin"), *words]) == 0
    shutil.rmtree(tmp_path / "ours")
    job = Export(checkpoint=str(tmp_path / "sft" / "checkpoints"))
    step, model = export_folder(job, tmp_path / "hf")
    assert (step, model.vocab_size) == (1, 384)
    written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert written == {path.name for path in source.iterdir()}
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == template
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["top_k"] == 20
    assert hf_config.read_config(tmp_path / "hf")["eos_token_id"] == 256
    assert "<Thread>" in (tmp_path / "hf" / "tokenizer.json").read_text()


@pytest.mark.slow
def test_two_processes_convert_to_what_one_does(source, tmp_path):
    for name, text, places in (
        ("import", IMPORT, {"source": source}),
        ("export", EXPORT, {"checkpoint": tmp_path / "import" / "checkpoints"}),
    ):
        assert convert(tmp_path, text, folder=tmp_path / f"{name}_alone", **places) == 0
        with Job(tmp_path / "convert.gin", tmp_path / name) as job:
            job.finish()
        if name == "import":
            alone, both = (
                load_model(tmp_path / n / "checkpoints") for n in ("import_alone", "import")
            )
            jax.tree.map(np.testing.assert_array_equal, both.params, alone.params)
            assert both.tokenizer.fingerprint == alone.tokenizer.fingerprint
    assert content(tmp_path / "export" / "hf") == content(tmp_path / "export_alone" / "hf")


def test_training_begins_with_imported_parameters(runs, source, tmp_path):
    """A new run begins with the checkpoint of another run, not with new parameters."""
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
    assert "checkpoints exists already" in capsys.readouterr().err


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


# Failures leave folders unchanged.


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
        import_folder(Import(source=str(source)), ours)
    assert content(ours) == {"notes.txt": b"mine"}
    assert not [path for path in ours.iterdir() if path.is_dir()]


def test_an_import_does_not_touch_what_another_left(source, tmp_path):
    ours = tmp_path / "ours"
    (ours / "checkpoints").mkdir(parents=True)
    (ours / "checkpoints" / "tokenizer.json").write_text("precious")
    with pytest.raises(
        ValueError, match="checkpoints exists already, and an import needs an empty folder"
    ):
        import_folder(Import(source=str(source)), ours)
    assert content(ours) == {"checkpoints/tokenizer.json": b"precious"}


def test_an_export_that_fails_leaves_the_old_one_as_it_was(source, tmp_path, monkeypatch):
    ours, out = tmp_path / "ours", tmp_path / "out"
    import_folder(Import(source=str(source)), ours)
    job = Export(checkpoint=str(ours / "checkpoints"))
    export_folder(job, out)
    (out / "tokenizer.json").write_text("another")
    (out / "mine.txt").write_text("kept")
    before = content(out)

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(hf, "save_file", fails)
        with pytest.raises(OSError, match="No space"):
            export_folder(job, out)
    assert content(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "ours", "out"]
    export_folder(job, out)
    assert (out / "tokenizer.json").read_text() == (
        ours / "checkpoints" / "tokenizer.json"
    ).read_text()
    assert (out / "mine.txt").read_text() == "kept"


# Which files are copied.


def test_neither_code_nor_weights_of_other_formats_are_copied(source, tmp_path):
    for name in ("modeling.py", "pytorch_model.bin", "model.gguf", "model.pt", "extra.txt", ".env"):
        (source / name).write_text("x")
    (source / "LICENSE").write_text("free")
    assert sorted(hf_files.read(source)) == [
        "LICENSE",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


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
        import_folder(Import(source=str(source)), ours)
    assert content(ours) == {}


def test_weights_that_are_a_link_out_of_the_folder_are_refused(source, tmp_path):
    shutil.move(source / "model.safetensors", tmp_path / "other.safetensors")
    (source / "model.safetensors").symlink_to("../other.safetensors")
    ours = tmp_path / "ours"
    with pytest.raises(ValueError, match=r"model.safetensors is a link to .*, outside of its"):
        import_folder(Import(source=str(source)), ours)
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
    import_folder(Import(source=str(snapshot)), ours)
    copied = ours / "checkpoints" / "hf" / "tokenizer_config.json"
    assert not copied.is_symlink()
    assert "<Thread>" in copied.read_text()
    assert "<Thread>" not in (snapshot / "tokenizer_config.json").read_text()
    (repo / "refs").write_text("x")
    (snapshot / "merges.txt").symlink_to("../../refs")
    with pytest.raises(ValueError, match=r"merges.txt is a link to .*refs, outside of its folder"):
        hf_files.read(snapshot)
