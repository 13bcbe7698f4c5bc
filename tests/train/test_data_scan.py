"""What the scan says of a folder before any model is loaded."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5_core.config import VARIANTS, Variant
from kandinsky5_core.vae.flux import FluxVAE
from tests.train.material import clip, pair, picture, timed_clip
from train.config import DataConfig, SourceConfig
from train.data.buckets import Bucket, batch_size, bucket_sizes, choose_length, choose_size
from train.data.cost import encode_flops_per_pixel
from train.data.hashing import fingerprint, near_duplicates
from train.data.scan import ScanReport, scan

NANO, NANO_IMAGE, NANO_EDIT = VARIANTS["nano-video"], VARIANTS["nano-image"], VARIANTS["nano-edit"]
LITE, LITE_10S = VARIANTS["lite-t2v-5s-sft"], VARIANTS["lite-t2v-10s-sft"]


def config(path: Path, **values: object) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path=str(path)),), **values)


def look(path: Path, variant: Variant = NANO, **values: object) -> ScanReport:
    return scan(config(path, **values), variant)


def reasons(report: ScanReport) -> dict[str, str]:
    return {problem.path.name: problem.reason for problem in report.problems}


# Buckets


def test_sizes_are_the_variant_s_own_or_come_from_an_area(tmp_path: Path) -> None:
    assert bucket_sizes(config(tmp_path), LITE) == LITE.resolutions
    for variant, multiple in ((LITE, 16), (LITE_10S, 128)):
        sizes = bucket_sizes(config(tmp_path, area=640 * 384), variant)
        assert len(sizes) >= 5 and len(set(sizes)) == len(sizes)
        for height, width in sizes:
            assert height % multiple == width % multiple == 0
            # Each side is rounded by at most half a multiple.
            assert abs(math.sqrt(height * width) - math.sqrt(640 * 384)) <= multiple
        assert any(size[0] < size[1] for size in sizes) and any(size[0] > size[1] for size in sizes)
    with pytest.raises(ValueError, match=r"data\.area 10000 is below 128x128"):
        bucket_sizes(config(tmp_path, area=10_000), LITE_10S)
    with pytest.raises(ValueError, match="beyond the 2048 pixels"):
        bucket_sizes(config(tmp_path, area=4000 * 4000), LITE)


@pytest.mark.parametrize(
    ("picture_size", "bucket"),
    [((1080, 1920), (512, 768)), ((1920, 1080), (768, 512)), ((600, 640), (512, 512)), ((100, 1000), (512, 768))],
)
def test_the_bucket_of_the_nearest_ratio(picture_size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert choose_size(*picture_size, LITE.resolutions) == bucket
    # As wide as high is as far from 2:1 as from 1:2: it is the ratio of ratios that counts.
    assert choose_size(1000, 1400, ((1000, 1000), (1000, 2000))) == (1000, 1000)


def test_of_one_ratio_the_nearest_area() -> None:
    assert choose_size(70, 70, NANO_IMAGE.resolutions) == (64, 64)
    assert choose_size(90, 90, NANO_IMAGE.resolutions) == (96, 96)


def test_lengths_are_4k_plus_1_and_never_more_than_there_is() -> None:
    for longest in (5, 17, 21, 121, 241):
        for available in range(300):
            length = choose_length(available, longest)
            assert length <= min(available, longest) and (length == 0 or length % 4 == 1)
            assert bool(length) == (available >= 5)
            # A queue's step never costs more than a third of the clip.
            assert length >= 0.66 * min(available, longest) or available < 9
    assert choose_length(400, 21) == 21


def test_batches_hold_as_much_as_the_budget(tmp_path: Path) -> None:
    long, short, still = Bucket(64, 64, 17), Bucket(64, 64, 5), Bucket(64, 64, 1)
    plain = config(tmp_path)
    assert [batch_size(bucket, "clip", 5, plain, 4) for bucket in (long, short)] == [1, 2]
    assert batch_size(still, "image", 5, plain, 4) == 5
    own = config(tmp_path, frame_budget=12, image_batch=3)
    assert [batch_size(bucket, "clip", 5, own, 4) for bucket in (long, short)] == [2, 6]
    assert batch_size(still, "image", 5, own, 4) == batch_size(still, "edit", 5, own, 1) == 3
    assert batch_size(long, "clip", 5, config(tmp_path, frame_budget=2), 4) == 1


# Pictures


def test_every_format_of_picture(tmp_path: Path) -> None:
    for number, suffix in enumerate((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif")):
        picture(tmp_path / f"a{number}{suffix}", seed=number, size=(96, 64))
    report = look(tmp_path, NANO_IMAGE)
    assert report.problems == [] and len(report.items) == 6
    assert {item.bucket for item in report.items} == {Bucket(96, 64, 1)}
    assert report.tasks == {"t2i": 1.0}


def test_a_turned_photo_is_measured_as_it_is_seen(tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 64, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    upright.save(tmp_path / "a.jpg", exif=exif)
    report = look(tmp_path, NANO_IMAGE)
    assert [item.bucket for item in report.items] == [Bucket(64, 96, 1)]


def test_bad_pictures_are_told_and_the_rest_is_used(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.new("RGB", (300, 12)).save(tmp_path / "strip.png")
    frames = [Image.fromarray(np.full((64, 64, 3), 40 * number, np.uint8)) for number in range(4)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    report = look(tmp_path, NANO_IMAGE)
    assert [item.example.path.name for item in report.items] == ["good.png"]
    told = reasons(report)
    assert set(told) == {"empty.png", "text.jpg", "cut.png", "pixel.png", "strip.png", "moving.webp"}
    assert "too small: 1x1, the shorter side must have 16 pixels" in told["pixel.png"]
    assert "too small: 300x12" in told["strip.png"]
    assert "has 4 frames" in told["moving.webp"]
    assert "found 7: 1 image; 6 left out" in report.text()


def test_min_side_is_the_user_s_when_given(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(64, 64))
    assert len(look(tmp_path, NANO_IMAGE, min_side=64).items) == 1
    assert "must have 65 pixels" in reasons(look(tmp_path, NANO_IMAGE, min_side=65))["a.png"]


# Clips


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_every_format_of_clip(tmp_path: Path, suffix: str) -> None:
    if suffix in (".mov", ".mkv"):
        timed_clip(tmp_path / f"a{suffix}", [number / 8 for number in range(17)], [number / 20 for number in range(17)])
    else:
        clip(tmp_path / f"a{suffix}")
    report = look(tmp_path)
    assert report.problems == []
    assert [item.bucket for item in report.items] == [Bucket(64, 64, 17)]
    assert report.items[0].moments == tuple(number / 8 for number in range(17))
    assert report.tasks == {"t2v": pytest.approx(0.79 / 0.99), "i2v": pytest.approx(0.2 / 0.99)}


def test_a_long_clip_becomes_windows_around_its_middle(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", num_frames=41)
    items = look(tmp_path).items
    assert [item.bucket.num_frames for item in items] == [17, 17]
    moments = [round(moment * 8) for item in items for moment in item.moments]
    assert moments == list(range(3, 37))


def test_clips_are_measured_at_the_model_s_rate(tmp_path: Path) -> None:
    clip(tmp_path / "fast.mp4", 1, num_frames=36, fps=24)  # 1.5 s: 12 frames at 8
    clip(tmp_path / "slow.mp4", 2, num_frames=5, fps=4)  # 1.25 s: 10 frames
    clip(tmp_path / "short.mp4", 3, num_frames=12, fps=24)  # half a second: 4 frames
    report = look(tmp_path)
    assert {item.example.path.name: item.bucket.num_frames for item in report.items} == {"fast.mp4": 9, "slow.mp4": 9}
    assert reasons(report) == {"short.mp4": "too short: 4 frames at 8 a second, at least 5 are needed"}


def test_bad_clips_are_told(tmp_path: Path) -> None:
    clip(tmp_path / "good.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    clip(tmp_path / "tiny.mp4", size=(8, 8))
    picture(tmp_path / "still.png")
    report = look(tmp_path)
    assert set(reasons(report)) == {"empty.mp4", "cut.mp4", "tiny.mp4"}
    assert "too small: 8x8" in reasons(report)["tiny.mp4"]


# Edits


def test_edits_look_at_both_pictures(tmp_path: Path) -> None:
    pair(tmp_path, "good", 1)
    pair(tmp_path, "broken", 2)
    (tmp_path / "source" / "broken.png").write_bytes(b"")
    pair(tmp_path, "other", 3)
    picture(tmp_path / "source" / "other.png", 4, size=(64, 96), words=None)
    report = look(tmp_path, NANO_EDIT)
    assert [item.example.path.name for item in report.items] == ["good.png"]
    assert "the picture before is 96x64 and the one after 64x64" in reasons(report)["other.png"]
    assert "broken.png" in reasons(report)
    assert report.tasks == {"i2i": 1.0}


# Captions


def test_captions_are_cleaned_counted_and_get_the_trigger(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1, words="The image shows a red circle")
    picture(tmp_path / "b.png", 2, words=None)
    picture(tmp_path / "c.png", 3, words=" \n")
    report = look(tmp_path, NANO_IMAGE, trigger="zxc")
    assert [item.caption for item in report.items] == ["zxc, A red circle", "zxc", "zxc"]
    assert report.num_without_caption == 2 and "2 without a caption" in report.text()


# Duplicates


def natural(seed: int, side: int = 256) -> np.ndarray:
    """Noise with the spectrum of photographs."""
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / side) ** 1.2
    waves = np.stack([np.fft.ifft2(fall * np.fft.fft2(rng.normal(size=(side, side)))).real for _ in range(3)], -1)
    waves = 128 + 50 * waves / waves.std()
    return waves.clip(0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    Image.fromarray(pixels).save(path, **options)


def test_copies_are_found_whatever_their_file_and_others_are_not(tmp_path: Path) -> None:
    for seed in range(40):
        save(tmp_path / f"{seed:02d}.png", natural(seed))
    for seed in range(10):
        image = Image.fromarray(natural(seed))
        image.resize((200, 200), Image.Resampling.LANCZOS).save(tmp_path / f"{seed:02d}-copy.jpg", quality=70)
    report = look(tmp_path, NANO_IMAGE)
    pairs = {tuple(sorted((one.stem, other.stem))) for one, other in report.duplicates}
    assert pairs == {(f"{seed:02d}", f"{seed:02d}-copy") for seed in range(10)}
    assert len(report.items) == 40
    assert len(look(tmp_path, NANO_IMAGE, drop_duplicates=False).items) == 50


def test_drawn_pictures_that_differ_are_no_duplicates(tmp_path: Path) -> None:
    for seed in range(300):
        picture(tmp_path / f"{seed}.png", seed)
    assert look(tmp_path, NANO_IMAGE).duplicates == []


def test_a_small_thing_of_another_colour_is_no_duplicate() -> None:
    pictures = torch.full((2, 64, 64, 3), 0.5)
    pictures[0, 28:36, 28:36] = torch.tensor([0.9, 0.2, 0.2])
    pictures[1, 28:36, 28:36] = torch.tensor([0.9, 0.2, 0.6])
    assert near_duplicates([fingerprint(one[None]) for one in pictures]) == {}
    assert near_duplicates([fingerprint(pictures[:1])] * 2) == {1: 0}


def test_copies_of_clips_are_found(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", 1)
    clip(tmp_path / "a.webm", 1)
    clip(tmp_path / "b.mp4", 2)
    report = look(tmp_path)
    assert [(one.name, other.name) for one, other in report.duplicates] == [("a.webm", "a.mp4")]
    assert [item.example.path.name for item in report.items] == ["a.mp4", "b.mp4"]


def test_one_file_with_two_captions_is_two_samples_and_with_one_caption_twice_is_one(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    rows = [("a.png", "one"), ("a.png", "two"), ("b.png", "three"), ("a.png", "one")]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"path": path, "caption": text}) for path, text in rows))
    report = look(tmp_path / "t.jsonl", NANO_IMAGE)
    assert [item.caption for item in report.items] == ["one", "two", "three"]
    assert [(one.name, other.name) for one, other in report.duplicates] == [("a.png", "a.png")]
    assert len(look(tmp_path / "t.jsonl", NANO_IMAGE, drop_duplicates=False).items) == 4


def test_duplicates_are_sought_in_time_that_grows_with_the_number(tmp_path: Path) -> None:
    """Comparisons, counted: far fewer than all pairs."""
    rng = np.random.default_rng(0)
    looks = [fingerprint(torch.from_numpy(rng.random((1, 9, 9, 3)))) for _ in range(600)]
    compared = 0

    class Counting(Sequence):
        def __len__(self) -> int:
            return len(looks)

        def __getitem__(self, index: int) -> object:
            nonlocal compared
            compared += index < len(looks)
            return looks[index]

    near_duplicates(Counting())
    assert compared < 5 * len(looks)


# Tasks, cost, report


def mixed(folder: Path) -> None:
    for number in range(3):
        clip(folder / "clips" / f"{number}.mp4", number)
    for number in range(4):
        picture(folder / "stills" / f"{number}.png", 10 + number)
    pair(folder / "edits", "one", 20)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("nano-video", {"t2i": 0.01, "t2v": 0.79, "i2v": 0.2}),
        ("lite-i2v-5s", {"t2i": 0.01, "t2v": 0.79, "i2v": 0.2}),
        ("pro-i2v-5s-sft", {"t2i": 0.02, "t2v": 0.77, "i2v": 0.21}),
        ("lite-t2v-5s-sft", {"t2i": 0.01 / 0.8, "t2v": 0.79 / 0.8}),
        ("nano-edit", {"i2i": 0.8, "t2i": 0.2}),
        ("image-lite-i2i-sft", {"i2i": 0.8, "t2i": 0.2}),
        ("nano-image", {"t2i": 1.0}),
    ],
)  # fmt: skip
def test_tasks_have_the_report_s_shares_of_what_there_is(tmp_path: Path, name: str, shares: dict[str, float]) -> None:
    mixed(tmp_path)
    variant = VARIANTS[name]
    # Drawn clips are short for the large models.
    report = look(tmp_path, replace(variant, fps=8), min_side=16)
    assert report.tasks == pytest.approx(shares)
    used = {"clip" for task in shares if task[-1] == "v"} | {"image"} | {"edit" for task in shares if task == "i2i"}
    assert {item.example.kind for item in report.items} == used
    # What is not used is told, each file once.
    left = {problem.path for problem in report.problems}
    assert len(left) == (0 if "clip" in used else 3) + (0 if "edit" in used else 1)


def test_tasks_of_the_user_s_choice(tmp_path: Path) -> None:
    mixed(tmp_path)
    report = look(tmp_path, tasks=(("i2v", 3.0), ("t2v", 1.0)))
    assert report.tasks == {"i2v": 0.75, "t2v": 0.25}
    assert "a picture, and the tasks (i2v, t2v) use none" in reasons(report)["0.png"]
    with pytest.raises(ValueError, match=r"data\.tasks asks for i2i: nano-video has no such task"):
        look(tmp_path, tasks=(("i2i", 1.0),))
    with pytest.raises(ValueError, match=r"data\.tasks asks for t2i: the material has none for it"):
        look(tmp_path / "clips", tasks=(("t2i", 0.5), ("t2v", 0.5)))


def test_material_that_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    pair(tmp_path / "edits", "one")
    with pytest.raises(ValueError, match=r"nano-video cannot be trained on what there is \(edit\)"):
        look(tmp_path / "edits").check()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no usable sample among 0 files"):
        look(tmp_path / "nothing").check()
    (tmp_path / "nothing" / "a.png").write_text("")
    with pytest.raises(ValueError, match=r"no usable sample among 1 files; the first: .*a\.png"):
        look(tmp_path / "nothing").check()


def test_cost_by_hand(tmp_path: Path) -> None:
    mixed(tmp_path)
    cost = look(tmp_path).cost
    # Three clips of 17 frames to 5 latent frames, and the first frame of each once more; four pictures; 16 channels of
    # 8x8 cells in two bytes.
    assert cost.num_frames == 3 * (17 + 1) + 4
    assert cost.latent_bytes == (3 * (5 + 1) + 4) * 16 * 8 * 8 * 2
    assert cost.text_bytes > 0 and look(tmp_path, cache_text=False).cost.text_bytes == 0
    edits = look(tmp_path / "edits", NANO_EDIT).cost
    assert (edits.num_frames, edits.latent_bytes) == (2, 2 * 16 * 8 * 8 * 2)


def test_operations_of_the_encoder_are_those_it_makes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    vae = FluxVAE(NANO_IMAGE.vae)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.rand(2, 3, 1, 64, 64))
    # Convolutions go by the pixel; attention in the middle by the square of their number, and is little here.
    assert encode_flops_per_pixel(NANO_IMAGE.vae) * 2 * 64 * 64 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_report_as_text_and_json(tmp_path: Path) -> None:
    mixed(tmp_path)
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"")
    report = look(tmp_path)
    text = report.text()
    for said in (
        "found 9: 3 clips, 4 images; 2 left out, 0 duplicates, 0 without a caption", "64x64x17  3 clips",
        "64x64  4 images", "domains: clips 3, stills 4", "tasks: t2v 79%, i2v 20%, t2i 1%",
        "batches 3 of clips, 1 of images", "to encode: 58 frames", "bad.mp4",
    ):  # fmt: skip
        assert said in text, (said, text)
    values = json.loads(json.dumps(report.as_dict()))
    assert values["buckets"] == {"64x64": 4, "64x64x17": 3} and values["found"] == 9
    assert values["batches"] == {"clip": 3.0, "image": 0.8}
    assert [Path(problem["path"]).name for problem in values["problems"]] == ["bad.mp4", "one.png"]


def test_a_scan_can_be_cancelled_and_tells_of_every_file(tmp_path: Path) -> None:
    mixed(tmp_path)
    told = []

    def on_item(message: str) -> None:
        told.append(message)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(config(tmp_path), NANO, on_item=on_item)
    assert told[-1] == "looking at 2.mp4, 3 of 8"
