"""Names, tooltips and help pages: complete in every language, and in step with the nodes and the variants."""

import ast
import json
import unicodedata
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from tests.nodes.make_locales import (
    DOCS,
    LANGUAGES,
    LOCALES,
    PACK,
    key_paths,
    node_defs,
    pages,
    read_locale,
    renewed_page,
)


def node_ids():
    """The ids of `nodes/__init__.py`, read without importing it: it needs ComfyUI."""
    for statement in ast.parse((PACK / "nodes" / "__init__.py").read_text()).body:
        if isinstance(statement, ast.AnnAssign) and statement.target.id == "GROUPS":
            return sorted(name for names in ast.literal_eval(statement.value).values() for name in names)
    raise AssertionError("nodes/__init__.py has no GROUPS")


def test_english_has_every_node():
    assert sorted(read_locale("en", "nodeDefs")) == node_ids()


@pytest.mark.parametrize("name", ["main", "nodeDefs"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_languages_have_the_same_texts_and_none_is_empty(language, name):
    texts = key_paths(read_locale(language, name))
    assert set(texts) == set(key_paths(read_locale("en", name)))
    assert [path for path, text in texts.items() if not text.strip()] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_hold_no_signs_of_the_frontends_message_language(language):
    # The frontend compiles all but tooltips, and braces, @ and | mean something there.
    compiled = {
        path: text
        for name in ("main", "nodeDefs")
        for path, text in key_paths(read_locale(language, name)).items()
        if not path.endswith(".tooltip")
    }
    assert [path for path, text in compiled.items() if set(text) & set("{}@|")] == []


@pytest.mark.parametrize(("language", "alphabet"), [("ru", "CYRILLIC"), ("zh", "CJK")])
def test_descriptions_and_tooltips_are_translated(language, alphabet):
    texts = key_paths(read_locale(language, "nodeDefs")).items()
    told = {path: text for path, text in texts if path.endswith((".description", ".tooltip"))}
    strays = [
        text for text in told.values() if not any(unicodedata.name(letter, "").startswith(alphabet) for letter in text)
    ]
    assert strays == []


def test_every_node_has_a_help_page_in_every_language():
    found = {(node, language) for node, language, _ in pages()}
    assert found == {(node, language) for node in node_ids() for language in LANGUAGES}


@pytest.mark.parametrize(("node", "language", "path"), pages(), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_tables_of_the_help_pages_are_in_step(node, language, path):
    page = path.read_text(encoding="utf-8")
    assert page == renewed_page(node, language, path), "run: python -m tests.nodes.make_locales"
    assert page.startswith(f"# {read_locale(language, 'nodeDefs')[node]['display_name']}\n")


def test_english_says_what_the_nodes_say(info):
    assert node_defs(info) == read_locale("en", "nodeDefs"), "run: python -m tests.nodes.make_locales"
    levels = {
        level for name, schema in info.items() if name.startswith("K5") for level in schema["category"].split("/")
    }
    assert set(read_locale("en", "main")["nodeCategories"]) == levels


def test_comfyui_serves_texts_and_pages(comfy):
    served = comfy.get("/i18n")
    for language in LANGUAGES:
        assert read_locale(language, "nodeDefs").items() <= served[language]["nodeDefs"].items()
    for _, _, path in pages():
        with urlopen(f"{comfy.url}/extensions/{quote(comfy.folder_name)}/docs/{path.relative_to(DOCS)}") as answer:
            assert answer.read() == path.read_bytes()


def test_files_are_plain_json():
    for path in LOCALES.glob("*/*.json"):
        assert (
            path.read_text(encoding="utf-8")
            == json.dumps(json.loads(path.read_text()), ensure_ascii=False, indent=2) + "\n"
        )
