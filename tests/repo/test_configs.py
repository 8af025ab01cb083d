"""Every .gin file builds, and its folder is the verb that reads it or holds fragments alone."""

import pytest
from repo.documents import CONFIGS, inherited, root_of
from repo.sources import ROOT, VERBS, has_config

from tw_jax import config
from tw_jax.cli import verb_of
from tw_jax.models.transformer import Model

RUN_FOLDERS = sorted(filter(has_config, VERBS))
RUNS = sorted(p for verb in RUN_FOLDERS for p in (CONFIGS / verb).glob("*.gin"))
MODELS = sorted((CONFIGS / "models").glob("*.gin"))


def test_every_config_is_found_to_be_of_the_verb_of_its_folder_or_a_fragment() -> None:
    for path in sorted(CONFIGS.rglob("*.gin")):
        folder = path.parent.name
        assert verb_of(path) == (folder if folder in RUN_FOLDERS else None), path


def test_the_verb_of_a_run_does_not_depend_on_its_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in RUNS:
        copy = tmp_path / "copy.gin"
        copy.write_text(f"include '{path}'", encoding="utf-8")
        assert verb_of(copy) == path.parent.name


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_run_builds_and_its_record_builds_the_same(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    root = root_of(path.relative_to(CONFIGS).parts[0])
    built = config.load_config(root, path, inherit=inherited)
    record = tmp_path / "config.gin"
    record.write_text(config.operative(built), encoding="utf-8")
    assert config.load_config(root, record) == built


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_run_has_no_line_that_default_wiring_makes_unnecessary(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    root = root_of(path.parent.name)
    lines = path.read_text(encoding="utf-8").splitlines()
    wiring = [n for n, line in enumerate(lines) if " = @" in line and line.endswith("()")]
    for n in wiring:
        shorter = tmp_path / "shorter.gin"
        text = "\n".join(lines[:n] + lines[n + 1 :])
        shorter.write_text(text.replace("include '", f"include '{path.parent}/"), encoding="utf-8")
        with pytest.raises(ValueError, match=r"lacks|never used"):
            config.load_config(root, shorter, inherit=inherited)


def test_the_example_of_the_page_builds(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    example = page.partition("```text\n")[2].partition("```")[0]
    file = tmp_path / "example.gin"
    file.write_text(example.replace("../models", str(CONFIGS / "models")), encoding="utf-8")
    more = ["Data.path=a", "Chat.template=plain", "Packing.row_tokens=64", "Model.lora=None"]
    with pytest.raises(ValueError, match=r"Sft.batch_rows is %gin.REQUIRED and must be bound"):
        config.load_config(root_of("sft"), file, more)
    built = config.load_config(root_of("sft"), file, [*more, "Sft.batch_rows=2", "steps=10"])
    assert (built.steps, built.optim.algorithm, built.model.lora) == (10, "muon", None)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_a_fragment_of_a_model_builds_it(path) -> None:
    assert isinstance(config.load_config(Model, path), Model)
