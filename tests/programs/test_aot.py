"""`tw aot` on tiny models: its output if a program fits, if it does not, and without libtpu."""

from __future__ import annotations

import importlib.util
import json
import sys

import jax
import pytest
from compiled import too_large
from repo.sources import ROOT

from tw_jax.aot import flops, topology
from tw_jax.cli import main
from tw_jax.config import load_config
from tw_jax.programs import aot

CONFIGS = ROOT / "configs" / "aot"
needs_libtpu = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu here"),
]

MODEL = """
include 'configs/models/tiny.gin'
Model.vocab_size = 384
Model.compute_dtype = 'bfloat16'
Aot.topology = 'v5e:2x2'
Aot.model = @Model()
"""
SFT = """
Aot.program = @SftStep()
SftStep.optim = @Optim()
SftStep.batch_rows = 4
SftStep.row_tokens = 1024
SftStep.chunk_tokens = 512
Optim.peak_lr = 1e-5
"""
PGRPO = """
Aot.program = @PgrpoStep()
PgrpoStep.optim = @Optim()
PgrpoStep.loss = @PolicyLoss()
PgrpoStep.batch_rows = 8
PgrpoStep.microbatch_rows = 4
PgrpoStep.row_tokens = 1024
PgrpoStep.chunk_tokens = 512
Optim.peak_lr = 1e-5
"""
SAMPLING = """
Aot.program = @Sampling()
Sampling.sampler = @Sampler()
Sampling.forkjoin = @ForkJoin()
Sampling.slots = 1024
Sampler.rows = 4
Sampler.max_prompt = 64
Sampler.prefill_chunk = 16
ForkJoin.max_new = 256
ForkJoin.max_thread = 64
ForkJoin.max_threads = 2
"""


def printed(tmp_path, capsys, text, *words):
    (tmp_path / "aot.gin").write_text(MODEL + text)
    sets = [part for word in words for part in ("--set", word)]
    assert main(["aot", str(tmp_path / "aot.gin"), *sets]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


class TestWithLibtpu:
    pytestmark = needs_libtpu

    @pytest.mark.parametrize("text", [SFT, PGRPO], ids=["sft", "pgrpo"])
    def test_a_step_that_fits_reports_its_memory_and_its_work(self, tmp_path, capsys, text):
        found = printed(tmp_path, capsys, text)
        assert found["ok"] is True
        assert found["error"] is None
        assert found["topology"] == "v5e:2x2"
        assert found["chips"] == 4
        assert found["compile_seconds"] > 0
        least = found["argument_bytes"]
        assert 0 < least < found["peak_bytes_per_chip"] < found["hbm_bytes_per_chip"] == 16 * 2**30
        assert found["flops"] > 6 * 1e6 * 4 * 1024 / 2
        assert 0 < found["block_occupancy"] <= 1

    def test_a_step_that_does_not_fit_ends_with_the_bytes_it_lacks(self, tmp_path, capsys):
        rows = ["SftStep.batch_rows=4096", "SftStep.row_tokens=8192"]
        found = printed(tmp_path, capsys, SFT, *rows)
        assert found["ok"] is False
        assert "G" in found["error"]
        assert "peak_bytes_per_chip" not in found

    @pytest.mark.parametrize("part", ["decode", "prefill"])
    def test_the_sampler_compiles_and_reports_its_memory_beside_the_cache(
        self, tmp_path, capsys, part
    ):
        found = printed(tmp_path, capsys, SAMPLING, f"Sampling.part='{part}'")
        assert found["ok"] is True
        weights = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 512) + 128 * 384
        # Keys and values of 4 layers, 2 heads of 32 in bfloat16, for one of the four rows.
        assert found["kv_bytes_per_chip"] == 2 * 4 * 2 * 1024 * 32 * 2
        assert found["temp_over_kv"] >= 0
        assert found["param_bytes_per_chip"] > 4 * weights / 4
        # Two lanes decode, prompts come by 16; a key is met by 4 heads of 32 in 4 layers, twice.
        tokens = 4 * (2 if part == "decode" else 16)
        assert found["flops"] == tokens * (2 * weights + 1024 * 4 * 128 * 4)

    def test_an_unknown_topology_is_refused(self, tmp_path, capsys):
        (tmp_path / "aot.gin").write_text(MODEL + SFT)
        words = ["--set", "Aot.topology='v5e:3x7'"]
        assert main(["aot", str(tmp_path / "aot.gin"), *words]) == 2
        assert "Aot.topology = 'v5e:3x7'" in capsys.readouterr().err


# Properties of a program that neither its layers nor its width change, at a row's real length.
SMALLER = ("num_layers=2", "width=512", "mlp_width=1024")
LONG = 40_960


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONFIGS.glob("*.gin")) if "= 40_960" in path.read_text("utf-8")],
    ids=lambda path: path.stem,
)
class TestPrograms:
    pytestmark = needs_libtpu

    def test_no_program_holds_all_pairs_or_all_logits_of_a_row(self, path, capsys, monkeypatch):
        cfg, texts, compile = load_config(aot.Aot, [path]), [], jax.stages.Lowered.compile

        def kept(lowered, *args, **kwargs):
            compiled = compile(lowered, *args, **kwargs)
            texts.append(compiled.as_text())
            return compiled

        monkeypatch.setattr(jax.stages.Lowered, "compile", kept)
        sets = [part for size in SMALLER for part in ("--set", f"Model.{size}")]
        assert main(["aot", str(path), *sets]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["ok"], found["error"]
        (text,) = texts
        sizes = {"tokens": LONG, "vocab": cfg.model.vocab_size, "devices": found["chips"]}
        assert too_large(text, **sizes) == []
        assert f",{LONG}," in text or f"[{LONG}," in text, "the row is in the program"


def test_an_unknown_generation_is_refused(tmp_path):
    (tmp_path / "aot.gin").write_text(MODEL + SFT)
    with pytest.raises(ValueError, match="must be one of v4, v5e, v5p, v6e, a colon"):
        load_config(aot.Aot, [tmp_path / "aot.gin"], ["Aot.topology='v9:2x2'"])


def test_without_libtpu_a_sentence_names_it(tmp_path, capsys, monkeypatch):
    def no_topology(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", no_topology)
    monkeypatch.setitem(sys.modules, "libtpu", None)
    (tmp_path / "aot.gin").write_text(MODEL + SFT)
    assert main(["aot", str(tmp_path / "aot.gin")]) == 2
    assert "tw aot needs libtpu" in capsys.readouterr().err


def test_the_work_of_a_row_is_that_of_its_weights_and_its_pairs(tmp_path):
    (tmp_path / "aot.gin").write_text(MODEL + SFT)
    cfg = load_config(aot.Aot, [tmp_path / "aot.gin"])
    one, two = (flops.train_step(cfg.model, rows, 512)["flops"] for rows in (1, 2))
    assert two == 2 * one
    # 128 wide, 4 layers: q, k, v, out; three matrices of the MLP; the unembedding of 384.
    weights = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 512) + 128 * 384
    linear = 6 * weights * 512
    most = linear + 12 * 128 * 4 * 512 * 513 / 2
    assert linear < one <= most
