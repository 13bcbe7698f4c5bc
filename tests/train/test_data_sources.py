# ruff: noqa: RUF001 - Russian captions
"""What folders and tables hold, and how captions are cleaned."""

import json
import sys
from pathlib import Path

import pytest

from tests.train.material import clip, pair, picture
from train.config import DataConfig, SourceConfig
from train.data.captions import clean_caption
from train.data.sources import Example, read_sources


def config(*paths: Path, **values: object) -> DataConfig:
    return DataConfig(sources=tuple(SourceConfig(path=str(path)) for path in paths), **values)


def read(*paths: Path) -> dict[str, Example]:
    """Examples by name; no problems."""
    examples, problems = read_sources(config(*paths))
    assert problems == []
    assert len({example.path.name for example in examples}) == len(examples)
    return {example.path.name: example for example in examples}


def test_a_folder_of_every_kind_with_captions_and_domains(tmp_path: Path) -> None:
    for number, name in enumerate(["a.png", "sea/b.JPG", "sea/deep/c.webp", "sky/d.mp4", "sky/e.gif", "sky/f.webm"]):
        make = clip if Path(name).suffix in (".mp4", ".gif", ".webm") else picture
        make(tmp_path / name, seed=number, words=f"words {number}")
    picture(tmp_path / "bare.png", seed=9, words=None)
    for hidden in (tmp_path / ".cache" / "x.png", tmp_path / "._a.png"):
        picture(hidden, words=None)
    (tmp_path / "notes.md").write_text("no material")
    found = read(tmp_path)
    assert list(found) == ["a.png", "bare.png", "b.JPG", "c.webp", "d.mp4", "e.gif", "f.webm"]
    assert [example.domain for example in found.values()] == ["", "", "sea", "sea", "sky", "sky", "sky"]
    assert [example.kind for example in found.values()] == ["image"] * 4 + ["clip"] * 3
    assert found["c.webp"].caption == "words 2" and found["bare.png"].caption == ""


def test_a_source_says_repeats_and_domain(tmp_path: Path) -> None:
    picture(tmp_path / "sub" / "a.png")
    source = SourceConfig(path=str(tmp_path), repeats=3, domain="own")
    (example,), _ = read_sources(DataConfig(sources=(source,)))
    assert (example.repeats, example.domain) == (3, "own")


def test_captions_with_a_byte_order_mark_or_wrong_bytes_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", words=None)
    (tmp_path / "a.txt").write_bytes("\ufeffкрасный круг".encode())
    picture(tmp_path / "b.png", words=None)
    (tmp_path / "b.txt").write_bytes(b"a caf\xe9")
    found = read(tmp_path)
    assert found["a.png"].caption == "красный круг"
    assert found["b.png"].caption.startswith("a caf")


def test_edit_pairs_by_folder(tmp_path: Path) -> None:
    words = pair(tmp_path / "weather", "one", 1)
    pair(tmp_path / "weather", "two_1", 2)
    (tmp_path / "weather" / "target" / "two_1.txt").unlink()
    (tmp_path / "weather" / "target" / "two.txt").write_text("of another picture")
    (tmp_path / "weather" / "two_1.txt").write_text("above the folders")
    found = read(tmp_path)
    assert list(found) == ["one.png", "two_1.png"]
    one = found["one.png"]
    assert (one.kind, one.caption, one.domain) == ("edit", words, "weather")
    assert one.source == tmp_path / "weather" / "source" / "one.png"
    assert found["two_1.png"].caption == "above the folders"


@pytest.mark.parametrize(("before", "after"), [("source", "target"), ("before", "after"), ("Source", "Target")])
def test_edit_pairs_by_name(tmp_path: Path, before: str, after: str) -> None:
    picture(tmp_path / f"tree_{before.lower()}.JPG", 1, words=None)
    picture(tmp_path / f"tree_{after}.png", 2, words=None)
    (tmp_path / "tree.txt").write_text("add a tree")
    (example,), problems = read_sources(config(tmp_path))
    assert (example.kind, example.caption) == ("edit", "add a tree") and problems == []
    assert example.source == tmp_path / f"tree_{before.lower()}.JPG"


def test_a_lone_half_of_a_pair_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "a_source.png")
    picture(tmp_path / "target" / "b.png")
    examples, problems = read_sources(config(tmp_path))
    assert examples == []
    assert [(problem.path.name, problem.reason) for problem in problems] == [
        ("a_source.png", "the picture before an edit, without one after it"),
        ("b.png", "the picture after an edit, without one before it"),
    ]


def test_a_source_folder_may_itself_be_called_target(tmp_path: Path) -> None:
    picture(tmp_path / "target" / "a.png", 1)
    picture(tmp_path / "source" / "a.png", 2)
    for name in ("source", "target"):
        assert read(tmp_path / name)["a.png"].kind == "image"


def rows(tmp_path: Path) -> list[dict]:
    for number in range(3):
        picture(tmp_path / "files" / f"{number}.png", number, words="in a file, which a table overrules")
    clip(tmp_path / "files" / "c.mp4", 4)
    return [
        {"path": "files/0.png", "caption": "zero", "domain": "x"},
        {"path": str(tmp_path / "files" / "c.mp4"), "caption": "moves"},
        {"path": "files/1.png", "caption": "make it blue", "source": "files/2.png"},
    ]


def check_rows(tmp_path: Path, table: Path) -> None:
    examples = list(read(table).values())
    assert [example.caption for example in examples] == ["zero", "moves", "make it blue"]
    assert [example.kind for example in examples] == ["image", "clip", "edit"]
    assert [example.domain for example in examples] == ["x", "", ""]
    assert examples[0].path == tmp_path / "files" / "0.png"
    assert examples[2].source == tmp_path / "files" / "2.png"


def test_tables_of_every_kind_say_the_same(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    values = rows(tmp_path)
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in values) + "\n\n")
    check_rows(tmp_path, tmp_path / "t.jsonl")
    lines = ["path,caption,source,domain"]
    lines += [",".join(row.get(key, "") for key in ("path", "caption", "source", "domain")) for row in values]
    (tmp_path / "t.CSV").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    check_rows(tmp_path, tmp_path / "t.CSV")
    columns = {key: [row.get(key) for row in values] for key in ("path", "caption", "source", "domain")}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    check_rows(tmp_path, tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "text": "words"}, {"file_name": "a.png", "prompt": "words"},
        {"video": None, "file": "a.png", "instruction": "words"},
    ],
)  # fmt: skip
def test_columns_have_many_names(tmp_path: Path, row: dict) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "t.jsonl")["a.png"].caption == "words"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.jsonl", '{"path": "a.png"}\n{"path": ', r"t\.jsonl, line 2: not JSON"),
        ("t.jsonl", '["a.png"]', "line 1: expected an object with keys"),
        ("t.jsonl", '{"picture": "a.png", "note": ""}', r"row 1: nothing in a column of path.*columns are picture, note"),
        ("t.csv", "pic,caption\na.png,b,c,d\n", "row 1: nothing in a column of path"),
        ("t.csv", b"path,caption\na.png,\xff\xfe\n", r"t\.csv cannot be read.*UTF-8"),
        ("t.parquet", b"no parquet", r"t\.parquet is no parquet table"),
        ("t.ods", "", "is neither a folder nor one of .jsonl, .csv, .parquet"),
        (None, "", "does not exist"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, name: str | None, text: str | bytes, said: str) -> None:
    path = tmp_path / (name or "nothing")
    if name == "t.parquet":
        pytest.importorskip("pyarrow")
    if name:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        read_sources(config(path))


def test_files_of_a_table_that_are_not_there_are_problems(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"path": "gone.png"}\n{"path": "t.jsonl"}')
    examples, problems = read_sources(config(tmp_path / "t.jsonl"))
    assert examples == []
    assert [problem.reason for problem in problems] == ["named in t.jsonl and not there", "unknown kind of file"]


def test_without_pyarrow_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_sources(config(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("The image shows a cat", "A cat"),
        ("the  video\ndepicts a dog,\trunning", "A dog, running"),
        ("In this video, we see a cat running", "A cat running"),
        ("This short video clip features a dog", "A dog"),
        ("a photo of me", "Me"),
        ("На изображении показана кошка на окне", "Кошка на окне"),
        ("На этом видео мы видим, как кот прыгает", "Кот прыгает"),
        ("На фотографии изображён дом", "Дом"),
        ("В кадре видно море", "Море"),
        # Left alone: here the words say something.
        ("A beautiful aerial video shows the sea", "A beautiful aerial video shows the sea"),
        ("The frame of the bicycle is rusty", "The frame of the bicycle is rusty"),
        ("A scene of battle in fog", "A scene of battle in fog"),
        ("The image showstopper", "The image showstopper"),
        ("The image", "The image"),
        ("The image shows", "The image shows"),
        ("На видео кот играет", "На видео кот играет"),
        ("  ", ""),
    ],
)
def test_captions_lose_common_beginnings_and_nothing_else(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned
    assert clean_caption(cleaned) == cleaned


def test_the_trigger_comes_first_and_once() -> None:
    assert clean_caption("The image shows a cat", "zxc") == "zxc, A cat"
    assert clean_caption("ZXC cat", " zxc ") == "ZXC cat"
    assert clean_caption("category theory", "cat") == "cat, category theory"
    assert clean_caption("", "zxc") == "zxc"
