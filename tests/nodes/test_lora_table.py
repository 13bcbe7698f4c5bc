"""The table of docs/lora-formats.md is what loading finds."""

import pytest

from tests.nodes import make_lora_table as maker


@pytest.fixture(scope="module")
def found(comfyui, tmp_path_factory):
    pytest.importorskip("peft", reason="diffusers loads LoRAs through peft")
    return maker.find(tmp_path_factory.mktemp("lora-table"))


def test_the_docs_say_what_is_found(found):
    text = maker.DOCS.read_text(encoding="utf-8")
    assert maker.page(text, found) == text, "run: python -m tests.nodes.make_lora_table"


def test_our_loaders_read_every_lora_and_refuse_what_is_none(found):
    ours = ("core", "node-ours", "node-theirs")
    wrong = {form: row for form, row in found.items() if form != "dora" and {row[column] for column in ours} != {"yes"}}
    assert not wrong
    assert {found["dora"][column] for column in ours} == {"refused"}


def test_one_layout_that_we_write_loads_everywhere(found):
    assert set(found["convert-diffusers"].values()) == {"yes"}
    assert found["convert-comfyui"]["stock-ours"] == found["convert-kohya"]["stock-theirs"] == "yes"
