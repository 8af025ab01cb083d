"""The documentation site builds without a warning, shows every public name and needs no network."""

import ast
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
from repo.sources import PACKAGE, ROOT, tree

import tw_jax

pytest.importorskip("sphinx", reason="Sphinx comes with the docs extra")

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    """The built site; what `make docs-site` runs, into another folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS)]
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(folder / "html")],
        cwd=ROOT,
        env={**os.environ, **nowhere, "no_proxy": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder / "html"


def pages(site: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Name and text of every HTML page."""
    for path in sorted(site.rglob("*.html")):
        yield path.relative_to(site).as_posix(), path.read_text(encoding="utf-8")


def extension(name: str) -> types.ModuleType:
    """A module of docs/extensions/, which is on no import path of the tests."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_documents_the_public_names_and_no_others(site) -> None:
    found = [
        name
        for _, text in pages(site)
        for name in re.findall(r'id="(?:module-)?tw_jax\.(\w+)"', text)
    ]
    assert sorted(found) == sorted(tw_jax.__all__)


def test_every_page_of_the_docs_is_on_the_site(site) -> None:
    written = [p.relative_to(DOCS).with_suffix(".html") for p in DOCS.rglob("*.md")]
    wanted = {path.as_posix() for path in written if path.parts[0] != "_build"}
    assert wanted <= {name for name, _ in pages(site)}


def test_the_first_page_shows_its_picture(site) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img [^>]*src="([^"]+)"', text)
    assert shown
    for name in shown:
        assert (site / name).stat().st_size


def test_links_within_the_site_lead_somewhere(site) -> None:
    broken = []
    for page, text in pages(site):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', text):
            if not re.match(r"\w+:", link) and not (site / page).parent.joinpath(link).exists():
                broken.append(f"{page}: {link}")
    assert broken == []


def test_a_page_loads_nothing_from_another_server(site) -> None:
    loads = r'<(?:script|img|iframe)[^>]*\bsrc="(\w*:?//[^"]+)"|<link[^>]*\bhref="(\w*:?//[^"]+)"'
    assert [(name, found) for name, text in pages(site) for found in re.findall(loads, text)] == []


def test_a_public_name_without_a_page_is_a_complaint() -> None:
    table = extension("public_names")
    assert list(table.complaints(tw_jax.__all__)) == []
    (more,) = table.complaints([*tw_jax.__all__, "brand_new"])
    assert more.startswith("tw_jax.brand_new is public and has no page.")
    (fewer,) = table.complaints(sorted({*tw_jax.__all__} - {"Trie"}))
    assert fewer.startswith("tw_jax.Trie is not public.")


def test_links_out_of_the_docs_become_downloads_and_links_into_them_stay_pages() -> None:
    rewrite = extension("links").rewrite
    readme = "[a](docs/trie.md#packing) [b](experiments/log.md) [c](https://x.org) [d](gone.md)"
    assert rewrite(readme, source=ROOT, page=DOCS) == (
        "[a](trie.md#packing) [b](path:../experiments/log.md) [c](https://x.org) [d](gone.md)"
    )
    page = "[e](../README.md#one-mask) [f](#here) ![g](images/trie.svg)"
    assert rewrite(page, source=DOCS, page=DOCS) == (
        "[e](index.md#one-mask) [f](#here) ![g](images/trie.svg)"
    )


def test_files_that_the_glossary_names_exist_and_define_what_it_says() -> None:
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    files = re.findall(r"`([\w/]+\.py)`", text)
    assert files
    assert [name for name in files if not (PACKAGE / name).is_file()] == []
    for names, name in re.findall(r"((?:`\w+`(?: and )?)+) in\s`([\w/]+\.py)`", text):
        defined = {
            getattr(target, "name", None) or getattr(target, "id", None)
            for node in tree(PACKAGE / name).body
            for target in (node.targets if isinstance(node, ast.Assign) else [node])
        }
        assert set(re.findall(r"\w+", names)) - {"and"} <= defined, name
