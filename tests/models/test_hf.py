"""Folders that transformers writes are read, and what is written it loads: names, bytes, logits."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tw_jax.contracts import Span
from tw_jax.models import hf, hf_config
from tw_jax.models.rope import Llama3Rope, Rope, YarnRope
from tw_jax.models.transformer import Model, network
from tw_jax.sharding import Mesh, Rules, make_mesh

SIZES = {
    "vocab_size": 64,
    "num_layers": 3,
    "width": 48,  # not num_heads * head_width: the two are apart in Qwen3
    "mlp_width": 80,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 16,
}
CASES = {
    "qwen3": Model(**SIZES, qk_norm=True, tie_embeddings=True, rope=Rope()),
    "qwen3_untied_yarn": Model(
        **SIZES,
        qk_norm=True,
        tie_embeddings=False,
        rope=YarnRope(theta=10_000.0, factor=4.0, original_tokens=8),
    ),
    "llama": Model(
        **SIZES, qk_norm=False, tie_embeddings=False, rope=Rope(theta=5e4), norm_epsilon=1e-5
    ),
    "llama3_tied": Model(
        **SIZES,
        qk_norm=False,
        tie_embeddings=True,
        rope=Llama3Rope(theta=10_000.0, factor=8.0, original_tokens=16),
        norm_epsilon=1e-5,
    ),
}


def random_tensors(model: Model, dtype=np.float32) -> dict[str, np.ndarray]:
    """Their tensors with random values; norms are random too, lest a scale be missed."""
    rng = np.random.default_rng(0)
    return {
        name: ((len(shape) == 1) + 0.2 * rng.standard_normal(shape)).astype(dtype)
        for name, shape in hf.tensor_shapes(model).items()
    }


def save(folder, model: Model, tensors: dict[str, np.ndarray], **fields) -> None:
    """A folder as the Hub has it, made without `hf.write`."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = hf_config.config_fields(model, dtype="float32", base={}) | fields
    (folder / "config.json").write_text(json.dumps(config))


def flat(params) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


# Against transformers.


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_written_and_gives_the_same_logits(
    case, tmp_path, close
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = CASES[case]
    save(tmp_path / "source", model, random_tensors(model))
    params = hf.read_params(tmp_path / "source", model)
    hf.write(tmp_path / "out", params, model, dtype="float32")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(theirs.parameters()).dtype == torch.float32
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 30))
    with torch.no_grad():
        want = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    net = network(model)
    depth = jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32), tokens.shape)
    span = Span(enter=depth, exit=jnp.full_like(depth, 30))

    @jax.jit
    def logits(params, tokens):
        return net.unembed(params, net.apply(params, tokens, depth, span)[0])

    got = logits(params, jnp.asarray(tokens, jnp.int32))
    close("model", got, want)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_transformers_saves_is_read_as_the_same_model(case, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    model = CASES[case]
    save(tmp_path / "source", model, random_tensors(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert hf_config.read_model(tmp_path / "saved") == model
    got = flat(hf.read_params(tmp_path / "saved", model))
    for path, leaf in flat(hf.read_params(tmp_path / "source", model)).items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


# Round trips.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_there_and_back_every_byte_is_the_same(case, param_dtype, tmp_path) -> None:
    model = dataclasses.replace(CASES[case], param_dtype=param_dtype)
    tensors = random_tensors(model, jnp.bfloat16)
    save(tmp_path / "source", model, tensors)
    params = hf.read_params(tmp_path / "source", model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    hf.write(tmp_path / "out", params, model, dtype="bfloat16", shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    back = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].tobytes() == tensor.tobytes(), name
        assert back[name].shape == tensor.shape
    again = hf.read_params(tmp_path / "out", model)
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(flat(again)[path], leaf)


def test_shards_are_indexed_and_none_is_larger_than_asked(tmp_path) -> None:
    model = CASES["qwen3"]
    save(tmp_path / "source", model, random_tensors(model))
    params = hf.read_params(tmp_path / "source", model)
    hf.write(tmp_path / "out", params, model, dtype="float32", shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    largest = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        largest = max(largest, sum(t.nbytes for t in tensors.values()))
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(
            tensors
        )
    assert 20_000 < largest <= 40_000
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("case", CASES)
def test_config_json_says_the_model_and_keeps_what_it_does_not_know(case, tmp_path) -> None:
    model = CASES[case]
    base = {"max_position_embeddings": 77, "eos_token_id": [3, 4], "hidden_size": 1}
    fields = hf_config.config_fields(model, dtype="bfloat16", base=base)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert hf_config.read_model(tmp_path) == model
    assert fields["max_position_embeddings"] == 77
    assert fields["eos_token_id"] == [3, 4]
    assert fields["torch_dtype"] == "bfloat16"


# Onto a mesh, piece by piece.


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (Mesh(fsdp=8), Rules()),
        (Mesh(data=2, fsdp=2, tensor=2), Rules()),
        (Mesh(fsdp=2, tensor=2, data=2), Rules(embed=("fsdp", "data"))),
    ],
)
def test_on_a_mesh_each_device_gets_its_piece_and_the_whole_is_the_same(
    mesh, rules, tmp_path
) -> None:
    model = CASES["qwen3_untied_yarn"]
    save(tmp_path, model, random_tensors(model))
    want = flat(hf.read_params(tmp_path, model))
    params = hf.read_params(tmp_path, model, mesh=make_mesh(mesh), rules=rules)
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)
    q = params["blocks"]["attention"]["q"]
    assert q.addressable_shards[0].data.size < q.size


def test_no_more_than_a_devices_piece_of_a_tensor_is_read_at_a_time(tmp_path, monkeypatch) -> None:
    model = CASES["qwen3"]
    save(tmp_path, model, random_tensors(model))
    sizes, read = [], hf._read

    def recorded(*args):
        piece = read(*args)
        sizes.append(piece.size)
        return piece

    monkeypatch.setattr(hf, "_read", recorded)
    params = hf.read_params(tmp_path, model, mesh=make_mesh(Mesh(fsdp=8)), rules=Rules())
    tensors = hf.tensor_shapes(model).values()
    assert max(sizes) == max(map(np.prod, tensors)) // 8
    # A norm's scale is on every device and is read once.
    assert len(sizes) == sum(1 if len(shape) == 1 else 8 for shape in tensors)
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_host_holds_little_more_than_the_model_while_reading_it(tmp_path) -> None:
    """On a CPU the devices' memory is the host's, so what is above the model is the reader's."""
    model = dataclasses.replace(
        CASES["llama"], width=512, mlp_width=2048, num_layers=24, param_dtype="bfloat16"
    )
    save(tmp_path, model, random_tensors(model, jnp.bfloat16))
    code = f"""
import pathlib, threading, jax
from tw_jax.models import hf, hf_config
import dataclasses
model = dataclasses.replace(hf_config.read_model({str(tmp_path)!r}), param_dtype="bfloat16")
def status(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024
jax.block_until_ready(jax.numpy.zeros(3) + 1)
before, most, is_done = status("RssAnon"), 0, threading.Event()
def watch():
    global most
    while not is_done.wait(0.001):
        most = max(most, status("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(hf.read_params({str(tmp_path)!r}, model))
is_done.set()
watcher.join()
print(most - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    held, size = map(int, done.stdout.split())
    assert held < 1.35 * size


# What is refused.


@pytest.fixture
def source(tmp_path):
    model = CASES["llama3_tied"]
    tensors = random_tensors(model)
    save(tmp_path, model, tensors)
    return tmp_path, model, tensors


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (lambda t: t.update(spare=np.zeros(2)), "1 tensors are unknown: spare"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(5, np.float32)}),
            r"another shape: model.norm.weight is \[5\] and must be \[48\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(48, np.int8)}),
            "dtype other than F32, F16, BF16: model.norm.weight is I8",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((64, 48), np.float32)}),
            "lm_head.weight differs from model.embed_tokens.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(source, change, sentence) -> None:
    folder, model, tensors = source
    change(tensors)
    save(folder, model, tensors)
    with pytest.raises(ValueError, match=sentence) as error:
        hf.read_params(folder, model)
    assert str(folder) in str(error.value)


def test_a_copied_head_and_old_rope_buffers_are_passed_over(source) -> None:
    folder, model, tensors = source
    want = flat(hf.read_params(folder, model))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    save(folder, model, tensors)
    for path, leaf in flat(hf.read_params(folder, model)).items():
        np.testing.assert_array_equal(leaf, want[path])


def test_a_cut_shard_is_named_with_its_size_and_a_remedy(source) -> None:
    folder, model, _ = source
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    size = f"{file.stat().st_size:,}"
    with pytest.raises(ValueError, match=f"{file}: not a whole .* {size} bytes; copy or download"):
        hf.read_params(folder, model)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ([], "holds a list and must hold a JSON object"),
        ({}, "has no weight_map. It must be an object that maps each tensor to its file"),
        ({"weight_map": ["a"]}, "has a weight_map of type list"),
        ({"weight_map": 3}, "has a weight_map of type int"),
        ({"weight_map": {"a": 3}}, "weight_map['a'] is 3. It must be the name of a"),
        ({"weight_map": {"a": ["b"]}}, "weight_map['a'] is ['b']"),
        ({"weight_map": {"a": "../model.safetensors"}}, "is '../model.safetensors'. It must be"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "is '/etc/x.safetensors'"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "is 'pytorch_model.bin'"),
    ],
)
def test_an_index_of_the_wrong_shape_is_refused(source, index, sentence) -> None:
    folder, model, _ = source
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        hf.read_params(folder, model)
    assert "model.safetensors.index.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"vocab_size": 9, "vocab_size": 8}', "the key 'vocab_size' occurs twice in one object"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "Write that number as a string"),
        ('{"a": NaN}', "NaN is not a JSON number"),
    ],
)
def test_json_with_a_key_twice_or_deep_nesting_is_refused_with_its_file(
    tmp_path, text, sentence
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        hf_config.read_model(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: ")


def test_a_write_that_fails_leaves_the_old_folder_as_it_was(source, monkeypatch) -> None:
    folder, model, _ = source
    params = hf.read_params(folder, model)
    (folder / "tokenizer.json").write_text("kept")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = []

    def full(*args, **kwargs):
        written.append(args[1])
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    with monkeypatch.context() as disk:
        disk.setattr(hf, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            hf.write(folder, params, model, dtype="float32", shard_bytes=40_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    hf.write(folder, params, model, dtype="float32", shard_bytes=40_000)
    assert (folder / "tokenizer.json").read_text() == "kept"
    assert not (folder / "model.safetensors").exists()
    assert not list(folder.parent.glob(f".{folder.name}.*"))


def test_a_missing_shard_and_an_empty_folder_are_named(source, tmp_path) -> None:
    folder, model, _ = source
    params = hf.read_params(folder, model)
    hf.write(folder, params, model, dtype="float32", shard_bytes=40_000)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        hf.read_params(folder, model)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        hf.read_params(empty, model)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral' and must be qwen3 or llama"),
        ({"model_type": ["llama"]}, "model_type is ['llama'] and must be qwen3 or llama"),
        ({"rms_norm_eps": 10**400}, "must be a number above 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' and must be 'silu'"),
        ({"attention_bias": True}, "attention_bias is True and must be False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type must be default, llama3 or yarn"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn rope has no 'factor'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None, and must be a whole number"),
        (
            {"num_attention_heads": 0},
            "num_attention_heads is 0, and must be a whole number above 0",
        ),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2', and must be a whole number"),
        ({"head_dim": [16]}, "head_dim is [16], and must be a whole number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', and must be true or false"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', and must be a number above 0"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], and must be an object"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": "4"}},
            "factor is '4', and must be a number",
        ),
    ],
)
def test_what_our_decoder_does_not_have_is_refused_by_name(source, fields, sentence) -> None:
    folder, model, tensors = source
    save(folder, model, tensors, **fields)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        hf_config.read_model(folder)
    assert str(folder / "config.json") in str(error.value)


def test_half_a_config_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        hf_config.read_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json: not there"):
        hf_config.read_model(tmp_path / "nowhere")


# Rows for control tokens.


@pytest.mark.parametrize("case", ["qwen3", "llama"])
def test_a_new_row_is_the_mean_of_its_words_rows(case, close) -> None:
    model = CASES[case]
    net = network(model)
    params = net.init(jax.random.key(0))
    words = {60: [3, 4, 5], 64: [7], 65: [1, 1, 2]}  # 60 is a spare row within the table
    grown, larger = hf.add_rows(params, model, words, multiple=16)
    assert larger.vocab_size == 80
    for name in ("embed",) if model.tie_embeddings else ("embed", "unembed"):
        old, new = np.asarray(params[name]), np.asarray(grown[name])
        assert new.shape == (80, model.width)
        for row, pieces in words.items():
            close("rounding", new[row], old[pieces].mean(0))
        np.testing.assert_array_equal(new[:60], old[:60])
        close("rounding", new[70], old.mean(0), of=np.abs(old).mean(0))
    shapes = jax.eval_shape(network(larger).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, shapes)


def test_a_table_never_shrinks_and_old_rows_stay() -> None:
    model = CASES["qwen3"]
    params = network(model).init(jax.random.key(0))
    grown, same = hf.add_rows(params, model, {}, multiple=64)
    assert same == model
    np.testing.assert_array_equal(grown["embed"], params["embed"])


def test_names_walk_the_tree_whatever_it_holds() -> None:
    model = CASES["llama"]
    shapes = jax.eval_shape(network(model).init, jax.random.key(0))
    names = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int16), shapes)
    got = {name: (tensor.shape, tensor.dtype) for name, tensor in hf.named(names, model)}
    assert got == {n: (s, np.dtype(np.int16)) for n, s in hf.tensor_shapes(model).items()}


def test_files_say_that_their_tensors_are_row_major_torch_tensors(source) -> None:
    folder, model, _ = source
    hf.write(folder / "out", hf.read_params(folder, model), model, dtype="float32")
    with safe_open(folder / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
