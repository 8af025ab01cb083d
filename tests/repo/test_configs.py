"""Every .gin file builds, and stands in the folder of the verb that reads it or among fragments."""

import pytest
from repo.documents import CONFIGS, root_of
from repo.sources import ROOT, VERBS, has_config

from tw_jax import config
from tw_jax.cli import FRAGMENTS
from tw_jax.models.transformer import Model
from tw_jax.sharding import Mesh

RUN_FOLDERS = sorted(filter(has_config, VERBS))
RUNS = sorted(p for verb in RUN_FOLDERS for p in (CONFIGS / verb).glob("*.gin"))
PARTS = sorted(p for folder in FRAGMENTS for p in (CONFIGS / folder).glob("*.gin"))


def test_every_config_folder_is_a_verb_or_holds_fragments() -> None:
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert folders <= {*FRAGMENTS, *RUN_FOLDERS}


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_run_builds_and_its_record_builds_the_same(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    root = root_of(path.relative_to(CONFIGS).parts[0])
    built = config.load_config(root, [path])
    record = tmp_path / "config.gin"
    record.write_text(config.operative(built), encoding="utf-8")
    assert config.load_config(root, [record]) == built


@pytest.mark.parametrize("path", PARTS, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_fragment_builds_the_config_that_it_is_for(path) -> None:
    root = {"models": Model, "mesh": Mesh}[path.parent.name]
    assert isinstance(config.load_config(root, [path]), root)
