"""Material by domain: folders, columns, and answers of a language model."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kandinsky5_core.loading import find_files
from kandinsky5_core.text.classify import DOMAINS, class_prompt, read_class
from kandinsky5_core.text.encoder import load_text_encoder
from train.config import DataConfig, SourceConfig
from train.data.domains import asker, split_by_domain, write_tables
from train.data.sources import read_sources


@dataclass(frozen=True)
class Shown:
    """As much of an example as the split needs."""

    path: Path
    caption: str = ""
    domain: str = ""
    kind: str = "image"
    source: Path | None = None


EXAMPLES = [Shown(Path(f"/m/{folder}/{n}.png"), domain=domain)
            for n, (folder, domain) in enumerate([("cats", ""), ("dogs", "animals"), ("cats", "people")])]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "domains"),
    [("folder", {"animals": [1], "cats": [0], "people": [2]}), ("column", {"animals": [1], "other": [0], "people": [2]})],
)
def test_folders_and_columns(how, domains):
    split = split_by_domain(EXAMPLES, how)
    assert {name: [EXAMPLES.index(_plain(e)) for e in found] for name, found in split.domains.items()} == domains
    assert all(e.domain == name for name, found in split.domains.items() for e in found)


def _plain(example):
    return next(e for e in EXAMPLES if e.path == example.path)


def test_wrong_ways_say_what_to_do():
    with pytest.raises(ValueError, match="domains 'kmeans' is unknown; use folder, column, vlm"):
        split_by_domain(EXAMPLES, "kmeans")
    with pytest.raises(ValueError, match="nothing to split"):
        split_by_domain([], "folder")
    with pytest.raises(ValueError, match="needs a text encoder"):
        split_by_domain(EXAMPLES, "vlm")


ANSWERS = {
    "nature": "nature", "Nature.": "nature", "7) nature": "nature", "**People**": "people", "animal": "animals",
    "The class is: tech": "tech", "cartoon": "cartoons", "other": "other", "ART\n": "art",
    "": None, "7": None, "technology": None, "party": None, "nature or animals": None, "furniture": None,
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_one_class_is_read_from_an_answer(answer):
    assert read_class(answer) == ANSWERS[answer]


def test_own_classes_and_their_longer_names():
    classes = ("art", "pixel art", "C++ (code)")
    assert [read_class(a, classes) for a in ("pixel art", "art", "c++ (CODE)")] == ["pixel art", "art", "C++ (code)"]


def test_the_prompt_is_the_reports():
    text = class_prompt(DOMAINS, "video")
    assert "You are a professional video classificator. You are given a video.\n" in text
    assert "1) animals\n2) architecture\n" in text and "\n10) other\nReturn only the name of class." in text
    assert text.count("<|image_pad|>") == 1 and len(DOMAINS) == 10
    with pytest.raises(ValueError, match="use image or video"):
        class_prompt(DOMAINS, "clip")


def test_what_is_no_class_is_other_and_told():
    answers = {"0.png": "Nature", "1.png": "animals with people", "2.png": None, "3.png": "other"}

    def ask(example):
        answer = answers[example.path.name]
        if answer is None:
            raise OSError("broken file")
        return answer

    examples = [Shown(Path(f"/m/{n}.png")) for n in range(4)]
    seen = []
    split = split_by_domain(examples, "vlm", ask=ask, on_example=lambda done, total: seen.append((done, total)))
    assert {name: [e.path.name for e in found] for name, found in split.domains.items()} == {
        "nature": ["0.png"], "other": ["1.png", "3.png"],
    }  # fmt: skip
    assert split.unclear == ((Path("/m/1.png"), "animals with people"),) and split.unread[0][0].name == "2.png"
    assert seen == [(n, 4) for n in (1, 2, 3, 4)]
    told = split.report()
    assert "other: 2" in told and "1 answers name no class" in told and "broken file" in told


def test_the_embedded_text_encoder_is_asked_with_the_picture():
    """It answers nonsense, but it sees the picture and the prompt."""
    files = find_files("nano-image")
    encoder = load_text_encoder(files.text_encoder, files.clip, lm_head=True, local_files_only=True)
    pictures = {"a.png": torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(1)), "b.mp4": torch.zeros(64, 96, 3)}
    given = []
    generate = encoder.qwen.generate
    try:
        encoder.qwen.generate = lambda **inputs: given.append(inputs) or generate(**inputs)
        ask = asker(encoder, lambda example: pictures[example.path.name])
        examples = [Shown(Path("a.png")), Shown(Path("b.mp4"), kind="clip")]
        split = split_by_domain(examples, "vlm", ask=ask)
    finally:
        del encoder.qwen.generate
    assert sum(map(len, split.domains.values())) == 2
    assert [inputs["image_grid_thw"].tolist()[0][0] for inputs in given] == [1, 1]
    assert given[0]["pixel_values"].shape != given[1]["pixel_values"].shape
    read = [encoder.tokenizer.decode(inputs["input_ids"][0]) for inputs in given]
    assert "image classificator" in read[0] and "video classificator" in read[1]
    with pytest.raises(ValueError, match="loaded without its head"):
        asker(load_text_encoder(files.text_encoder, files.clip, local_files_only=True), ask)


def test_command_splits_pictures_and_clips(tmp_path, capfd):
    from kandinsky5_core.media import write_image, write_video
    from train.cli import main

    material = tmp_path / "m"
    for folder in ("a", "b"):
        (material / folder).mkdir(parents=True)
    write_image(material / "a" / "one.png", torch.rand(32, 48, 3), {})
    write_video(material / "b" / "two.mp4", torch.rand(9, 32, 48, 3), 8.0, {})
    (material / "b" / "broken.mp4").write_bytes(b"no video")
    assert main(["domains", str(material), "--out", str(tmp_path / "t"), "--how", "folder"]) == 0
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"a.jsonl", "b.jsonl"}
    assert main(["domains", str(material), "--out", str(tmp_path / "v"), "--how", "vlm", "--classes", "circle,square"]) == 0
    told = capfd.readouterr().out
    assert "1 cannot be read" in told and "broken.mp4" in told
    rows = [json.loads(line) for path in (tmp_path / "v").iterdir() for line in path.read_text().splitlines()]
    assert sorted(Path(row["path"]).name for row in rows) == ["one.png", "two.mp4"]
    assert {row["domain"] for row in rows} <= {"circle", "square", "other"}
    assert main(["domains", str(tmp_path / "none"), "--out", str(tmp_path / "n")]) == 1


def test_middle_frames(tmp_path):
    from kandinsky5_core.media import write_video
    from train.data.frame import middle_frame

    clip = torch.linspace(0, 1, 9).reshape(9, 1, 1, 1).expand(9, 32, 48, 3)
    write_video(tmp_path / "c.mp4", clip, 8.0, {})
    frame = middle_frame(Shown(tmp_path / "c.mp4", kind="clip"))
    assert frame.shape == (32, 48, 3) and abs(float(frame.mean()) - 0.5) < 0.03


def test_material_none_of_which_opens_is_an_error():
    def ask(example):
        raise ValueError("broken")

    with pytest.raises(ValueError, match=r"none of the 3 files can be read, such as .*0.png: broken"):
        split_by_domain(EXAMPLES, "vlm", ask=ask)


def test_tables_are_material_again(tmp_path):
    for name in ("animals/one", "animals/two", "nature/three"):
        path = tmp_path / "m" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.with_suffix(".txt").write_text(f"ein {name} ü")
    examples, _ = read_sources(DataConfig(sources=(SourceConfig(path=str(tmp_path / "m")),)))
    split = split_by_domain(examples, "folder")
    tables = write_tables(split, tmp_path / "tables")
    assert {name: path.name for name, path in tables.items()} == {"animals": "animals.jsonl", "nature": "nature.jsonl"}
    again, problems = read_sources(DataConfig(sources=(SourceConfig(path=str(tables["animals"])),)))
    assert not problems and again == list(split.domains["animals"])
    odd = split_by_domain([Shown(Path("/m/../x.png"), domain="a/../b")], "column")
    assert next(iter(write_tables(odd, tmp_path / "odd").values())).parent == tmp_path / "odd"
    assert json.loads((tmp_path / "odd" / "a____b.jsonl").read_text())["domain"] == "a/../b"
