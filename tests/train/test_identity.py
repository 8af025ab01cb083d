"""A run is resumed as the run it is: with its settings, its files and its beginning."""

from __future__ import annotations

import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from repo.sources import ROOT

from tw_jax import hosts
from tw_jax.checkpoint import Checkpoints
from tw_jax.config import describe, load_config, operative
from tw_jax.models.load import LanguageModel
from tw_jax.programs.pgrpo import Pgrpo
from tw_jax.programs.sft import Sft
from tw_jax.train.identity import MAY_CHANGE, Origin, establish, origin_params, standing
from tw_jax.train.state import schedule

FILES = {Sft: "configs/sft/demo.gin", Pgrpo: "configs/pgrpo/normalisation.gin"}


class Kept:
    """Checkpoints of which the newest has a note."""

    def __init__(self, note, step=5):
        self._note, self._step = note, step

    def note(self):
        return self._note

    def latest(self):
        return self._step


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def recorded(_folder):
    """The record of a checkpoint of the run that `FILES[Sft]` configures, as gin text."""
    cfg = load_config(Sft, [FILES[Sft]])
    return operative(
        LanguageModel(
            model=cfg.model, tokenizer=cfg.tokenizer, chat=cfg.data.chat, forkjoin=cfg.forkjoin
        )
    )


def build(*words, root=Sft, **changes):
    mesh = [f"{root.__name__}.mesh=@Mesh()", "Mesh.data=1"]
    bindings = [*mesh, *words, *(f"{k}={v!r}" for k, v in changes.items())]
    return load_config(root, [FILES[root]], bindings, inherit=recorded)


def note(cfg, origin=None, **contents):
    return {"config": operative(cfg), "contents": contents, "origin": origin and origin._asdict()}


def refusal(before, cfg, *, step=5, **contents):
    with pytest.raises(ValueError, match="holds a run with other settings") as caught:
        establish(cfg, Kept(before, step), **contents)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("Packing.row_tokens=1024", "Packing.row_tokens = 1024 (was 2048)"),
        ("Packing.window=8", "Packing.window = 8 (was 256)"),
        ("Sft.batch_rows=2", "Sft.batch_rows = 2 (was 1)"),
        ("Data.seed=3", "Data.seed = 3 (was 0)"),
        ("Data.labels='flat'", "Data.labels = 'flat' (was 'calls')"),
        ("Optim.peak_lr=1e-3", "Optim.peak_lr = 0.001 (was 0.0025)"),
        ("Optim.algorithm='adamw'", "Optim.algorithm = 'adamw' (was 'muon')"),
        ("Chat.instruction='Think.'", "Chat.instruction = 'Think.' (was '')"),
        ("ForkJoin.max_threads=2", "ForkJoin.max_threads = 2 (was 3)"),
        ("Model.compute_dtype='bfloat16'", "Model.compute_dtype = 'bfloat16' (was 'float32')"),
        ("Sft.seed=1", "Sft.seed = 1 (was 0)"),
        ("Sft.init='elsewhere'", "Sft.init = 'elsewhere' (was None)"),
    ],
)
def test_a_run_is_not_resumed_with_another_setting(word, change):
    sentence = refusal(note(build()), build(word))
    assert sentence == (
        "runs/demo/sft holds a run with other settings: "
        f"{change}. Set them back to resume that run, "
        "or set another Sft.workdir; Sft.init = 'runs/demo/sft/checkpoints' there begins with the "
        "parameters of this one."
    )


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("Pgrpo.rollouts=4", "Pgrpo.rollouts = 4 (was 8)"),
        ("Sampler.temperature=0.5", "Sampler.temperature = 0.5 (was 1.0)"),
        ("PolicyLoss.kl_coef=0.1", "PolicyLoss.kl_coef = 0.1 (was 0.0)"),
        ("Reward.acceleration_clip=0.2", "Reward.acceleration_clip = 0.2 (was 0.5)"),
        ("Evaluation.count=7", "Evaluation.count = 7 (was 200)"),
    ],
)
def test_a_reinforcement_run_is_not_resumed_with_another_setting(word, change):
    assert f": {change}. Set" in refusal(note(build(root=Pgrpo)), build(word, root=Pgrpo))


def test_a_run_of_another_verb_is_refused_even_if_all_shared_configs_are_equal():
    cfg = build()
    shared = [line for line in operative(cfg).splitlines() if not line.startswith("Sft.")]
    config = "\n".join(["Pgrpo.workdir = 'runs/demo/sft'", *shared])
    before = {"config": config, "contents": {"tokenizer": "577d"}, "origin": None}
    assert ": root config: Sft (was Pgrpo). Set" in refusal(before, cfg, tokenizer="577d")


def test_all_changed_fields_are_named_in_one_sentence():
    sentence = refusal(note(build()), build("Data.seed=3", "Mesh.data=2", "Packing.window=8"))
    assert ": Data.seed = 3 (was 0); Packing.window = 8 (was 256). Set" in sentence


@pytest.mark.parametrize("root", [Sft, Pgrpo])
def test_only_the_fields_of_the_table_may_change(root):
    cfg = build(root=root)
    lines = [line for line in operative(cfg).splitlines() if line]
    for number, line in enumerate(lines):
        name, _, value = line.partition(" = ")
        other = [*lines[:number], f"{name} = 'another'", *lines[number + 1 :]]
        before = {"config": "\n".join(other), "contents": {}, "origin": None}
        if name in MAY_CHANGE or f"{name.split('.')[0]}.*" in MAY_CHANGE:
            if name == "Sft.init":
                continue
            change = f"{name} = {value} (was 'another')"
            assert establish(cfg, Kept(before, step=1)).changed == (change,)
        else:
            assert f"{name} = {value} (was 'another')" in refusal(before, cfg, step=1)


def test_every_field_of_the_table_is_one():
    known = {
        f"{cls}.{field}"
        for root in (Sft, Pgrpo)
        for cls, rows in re.findall(r"^(\w+): .*\n((?:  .*\n)*)", describe(root), re.MULTILINE)
        for field in [*re.findall(r"^  (\w+): ", rows, re.MULTILINE), "*"]
    }
    assert set(MAY_CHANGE) <= known


def test_a_change_of_mesh_or_saving_is_told_and_allowed():
    words = ["Mesh.data=2", "Sft.save_every=9", "Sft.workdir='moved/sft'"]
    who = establish(build(*words), Kept(note(build())))
    assert who.changed == (
        "Sft.workdir = 'moved/sft' (was 'runs/demo/sft')",
        "Sft.save_every = 9 (was 450)",
        "Mesh.data = 2 (was 1)",
    )
    assert standing(who, first=450, steps=900).startswith(
        "Resumed with Sft.workdir = 'moved/sft' (was 'runs/demo/sft'); Sft.save_every = 9"
    )


def test_a_run_with_all_steps_taken_says_that_it_is_finished():
    who = establish(build(), Kept(note(build()), step=900))
    assert standing(who, first=900, steps=900) == "The run is finished: all 900 steps are taken.\n"
    assert standing(who, first=0, steps=900) == ""


def test_another_tokenizer_or_file_behind_the_same_path_is_refused():
    before = note(build(), tokenizer="577d", problems="12 bytes, 1f")
    sentence = refusal(before, build(), tokenizer="abcd", problems="12 bytes, 1e")
    assert ": tokenizer: abcd (was 577d); problems: 12 bytes, 1e (was 12 bytes, 1f). " in sentence


def test_the_same_content_at_another_path_is_the_same_run():
    moved = build(**{"Data.path": "elsewhere.jsonl", "SentencePiece.path": "x.model"})
    who = establish(moved, Kept(note(build(), tokenizer="577d")), tokenizer="577d")
    assert len(who.changed) == 2


# The schedule.


def with_schedule(cfg):
    return {"schedule": schedule(cfg.optim, steps=cfg.steps)}


def test_more_steps_that_would_make_the_rate_jump_are_refused():
    before, more = build(), build("Sft.steps=1800")
    sentence = refusal(note(before, **with_schedule(before)), more, **with_schedule(more))
    assert (
        "schedule: cosine until step 1800 after 90 warm-up steps "
        "(was cosine until step 900 after 45 warm-up steps). "
        "Set Optim.decay_steps = 900 to keep the schedule. "
    ) in sentence


def test_a_checkpoint_that_is_not_one_of_a_run_is_refused():
    sentence = refusal({"source": "hub"}, build(), **with_schedule(build()))
    assert "root config: Sft (was none recorded); schedule: cosine" in sentence


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ([], ["Sft.steps=1800", "Optim.decay_steps=900"]),
        (["Optim.decay_steps=1200"], ["Sft.steps=1800", "Optim.decay_steps=1200"]),
        (["Optim.schedule='constant'", "Optim.warmup_steps=9"], ["Sft.steps=1800"]),
        (["Optim.warmup_ratio=0.1"], ["Optim.warmup_ratio=0.05", "Optim.warmup_steps=90"]),
    ],
)
def test_more_steps_of_the_same_schedule_are_allowed(words, more):
    before, after = build(*words), build(*dict.fromkeys([*words, *more]))
    found = establish(after, Kept(note(before, **with_schedule(before))), **with_schedule(after))
    assert any(text.startswith(("Sft.steps = ", "Optim.warmup_")) for text in found.changed)
    assert found.contents["schedule"] == with_schedule(before)["schedule"]


def test_fewer_steps_than_are_taken_are_refused():
    cfg = build("Sft.steps=300", "Optim.decay_steps=900")
    assert "Sft.steps = 300 (450 steps are taken)" in refusal(note(build()), cfg, step=450)


def test_every_process_of_a_job_is_refused_by_what_process_0_has_read(monkeypatch):
    read = [[note(build()), 5], [None, 0]]
    monkeypatch.setattr(hosts, "gather", lambda value: read)
    assert "Data.seed = 3 (was 0)" in refusal(None, build("Data.seed=3"))


# The parameters that a run began with.


def save(folder, step, value):
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(step, {"params": {"x": jnp.full(3, value)}}, {})


@pytest.fixture
def init(tmp_path):
    save(tmp_path / "init", 4, 1.0)
    return tmp_path / "init"


def begun(init):
    cfg = build(root=Pgrpo, **{"Pgrpo.init": str(init)})
    return cfg, establish(cfg, Kept(None, None)).note


def test_a_run_keeps_the_parameters_that_it_began_with_by_step_and_content(init):
    cfg, before = begun(init)
    assert before["origin"]["step"] == 4
    save(init, 5, 2.0)  # the run that made them goes on
    who = establish(cfg, Kept(before), needs_init=True)
    assert who.note == before
    abstract = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert origin_params(str(init), who.origin, abstract)["x"].tolist() == [1, 1, 1]


def test_a_kl_reference_that_changed_or_is_gone_is_refused(init):
    cfg, before = begun(init)
    shutil.rmtree(init / "4")
    save(init, 5, 1.0)
    with pytest.raises(ValueError, match=r"lacks the parameters of this run. .* its step 4"):
        establish(cfg, Kept(before), needs_init=True)
    shutil.rmtree(init)
    save(init, 4, 2.0)
    with pytest.raises(ValueError, match=r"has other parameters than before\. .* its step 4"):
        establish(cfg, Kept(before), needs_init=True)
    establish(cfg, Kept(before))  # without a KL term nobody reads them again


def test_a_moved_init_must_have_the_same_parameters(init, tmp_path):
    _, before = begun(init)
    save(tmp_path / "other", 4, 1.5)
    for place in ("other", "nowhere"):
        moved = build(root=Pgrpo, **{"Pgrpo.init": str(tmp_path / place)})
        with pytest.raises(ValueError, match="its step 4"):
            establish(moved, Kept(before))
    init.rename(tmp_path / "moved")
    moved = build(root=Pgrpo, **{"Pgrpo.init": str(tmp_path / "moved")})
    assert establish(moved, Kept(before)).origin == Origin(**before["origin"])


def test_the_digest_is_that_of_what_may_not_change(init):
    cfg, _ = begun(init)
    digest = establish(cfg, Kept(None, None)).digest
    for word, is_same in (("Mesh.data=2", True), ("Sampler.seed=1", False)):
        other = build(word, root=Pgrpo, **{"Pgrpo.init": str(init)})
        assert (establish(other, Kept(None, None)).digest == digest) == is_same


def test_a_note_is_read_without_the_state(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.note() is None
        for step in (1, 2):
            checkpoints.save(step, {"params": {"x": jnp.zeros(3)}}, {"config": str(step)})
        assert checkpoints.note() == {"config": "2"}
