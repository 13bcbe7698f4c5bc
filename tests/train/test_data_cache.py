"""Latents and text in shards: read by webdataset, made once, whole whatever happens."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from kandinsky5_core.footage import look_at, read_frames
from kandinsky5_core.inputs import encode_frames
from kandinsky5_core.loading import find_files, load_text_of, load_vae_of
from kandinsky5_core.media import read_image
from kandinsky5_core.pipeline import Models
from kandinsky5_core.vae.tiling import DEFAULT_BUDGET_BYTES
from tests.train.material import clip, pair, picture
from train.config import DataConfig, SourceConfig
from train.data import cache as cache_module
from train.data import shards
from train.data.cache import Cache, Hashes, build_cache
from train.data.scan import scan
from train.data.shards import ShardWriter, index_shards, locked, read_sample, resolution_class

HASHES = Hashes(vae="v", text="t")


def load_models(name: str) -> Models:
    files = find_files(name)
    return Models(
        variant=files.variant, dit=None, text_encoder=load_text_of(files, torch.float32),
        vae=load_vae_of(files, torch.float32), device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def video() -> Models:
    return load_models("nano-video")


@pytest.fixture(scope="module")
def edit() -> Models:
    return load_models("nano-edit")


def config(path: Path, **values: object) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path=str(path)),), **values)


def build(folder: Path, models: Models, target: Path, hashes: Hashes = HASHES, **values: object) -> Cache:
    on_item = values.pop("on_item", None)
    data = config(folder, **values)
    return build_cache(scan(data, models.variant), data, models, hashes, target, on_item=on_item)


def mixed(folder: Path) -> None:
    for number in range(3):
        clip(folder / "clips" / f"{number}.mp4", number)
    for number in range(4):
        picture(folder / "stills" / f"{number}.png", 10 + number)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def encoded(told: list[str]) -> Counter:
    """How many samples and captions were encoded, by the messages."""
    return Counter("caption" if "caption" in message else "sample" for message in told if "encoding" in message)


# What is stored


def test_latents_are_those_of_inference(tmp_path: Path, video: Models) -> None:
    mixed(tmp_path / "data")
    cache = build(tmp_path / "data", video, tmp_path / "cache")
    kinds = Counter(cached.item.example.kind for cached in cache.items)
    assert kinds == {"clip": 3, "image": 4}
    for cached in cache.items:
        item = cached.item
        if item.example.kind == "clip":
            frames = read_frames(look_at(item.example.path), item.moments)
        else:
            frames = read_image(item.example.path)[None]
        with torch.no_grad():
            expected = encode_frames(video, frames, DEFAULT_BUDGET_BYTES)[0]
        stored = cache.tensors(cached.latents)["latents"]
        assert stored.dtype == torch.float16 and stored.shape == expected.shape
        torch.testing.assert_close(stored.float(), expected, rtol=2**-11, atol=2**-24)


def test_the_first_frame_of_a_clip_is_also_stored_as_image_to_video_is_given_it(tmp_path: Path, video: Models) -> None:
    clip(tmp_path / "data" / "a.mp4", 3)
    cache = build(tmp_path / "data", video, tmp_path / "cache")
    item = cache.items[0].item
    first = read_frames(look_at(item.example.path), item.moments[:1])
    with torch.no_grad():
        alone = encode_frames(video, first, DEFAULT_BUDGET_BYTES)[0]
    stored = cache.tensors(cache.items[0].latents)
    torch.testing.assert_close(stored["first"].float(), alone, rtol=2**-11, atol=2**-24)
    # Nearly, and not quite, the clip's own first latent frame: group norms see all frames.
    difference = (stored["latents"][:, :1].float() - alone).square().mean().sqrt() / alone.std()
    assert 1e-4 < float(difference) < 0.1


def test_text_is_that_of_inference_and_the_empty_caption_is_there_too(tmp_path: Path, video: Models) -> None:
    mixed(tmp_path / "data")
    cache = build(tmp_path / "data", video, tmp_path / "cache", trigger="zxc")
    for cached in cache.items:
        task = {"clip": "t2v", "image": "t2i"}[cached.item.example.kind]
        for key, prompt in ((cached.text, cached.item.caption), (cached.empty, "")):
            direct = video.text_encoder.encode([prompt], task=task, max_tokens=video.variant.max_text_tokens).trimmed()
            stored = cache.text(key)
            assert torch.equal(stored.embeds, direct.embeds) and torch.equal(stored.pooled, direct.pooled)
            assert bool(stored.mask.all())
    assert all(cached.item.caption.startswith("zxc, ") for cached in cache.items)


def test_edits_store_both_pictures_and_text_that_has_seen_the_one_before(tmp_path: Path, edit: Models) -> None:
    for number in range(2):
        pair(tmp_path / "data", str(number), number)
    cache = build(tmp_path / "data", edit, tmp_path / "cache")
    for cached in cache.items:
        example = cached.item.example
        part = cache.tensors(cached.latents)
        for name, path in (("latents", example.path), ("source", example.source)):
            with torch.no_grad():
                expected = encode_frames(edit, read_image(path)[None], DEFAULT_BUDGET_BYTES)[0]
            torch.testing.assert_close(part[name].float(), expected, rtol=2**-11, atol=2**-24)
        direct = edit.text_encoder.encode(
            [cached.item.caption], task="i2i", max_tokens=512, images=[read_image(example.source)]
        )
        assert torch.equal(cache.text(cached.text).embeds, direct.trimmed().embeds)
    assert cache.items[0].empty != cache.items[1].empty


def test_transparent_parts_are_white_and_greys_are_colours(tmp_path: Path, video: Models) -> None:
    picture(tmp_path / "data" / "a.png", words="a")
    shown = Image.open(tmp_path / "data" / "a.png").convert("RGB")
    clear = shown.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 64, 20))
    clear.save(tmp_path / "data" / "a.png")
    shown.paste((255, 255, 255), (0, 0, 64, 20))
    shown.save(tmp_path / "data" / "b.png")
    shown.convert("L").save(tmp_path / "data" / "c.png")
    shown.convert("L").convert("RGB").save(tmp_path / "data" / "d.png")
    cache = build(tmp_path / "data", video, tmp_path / "cache", drop_duplicates=False)
    a, b, c, d = (cache.tensors(cached.latents)["latents"] for cached in cache.items)
    assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)
    assert len(build(tmp_path / "data", video, tmp_path / "cache").items) == 2


def test_the_cost_said_before_is_what_is_stored(tmp_path: Path, video: Models) -> None:
    mixed(tmp_path / "data")
    data = config(tmp_path / "data")
    report = scan(data, video.variant)
    cache = build_cache(report, data, video, HASHES, tmp_path / "cache")
    stored = [tensor for cached in cache.items for tensor in cache.tensors(cached.latents).values()]
    assert sum(tensor.nbytes for tensor in stored) == report.cost.latent_bytes


# Shards


def test_webdataset_reads_every_sample(tmp_path: Path, video: Models) -> None:
    webdataset = pytest.importorskip("webdataset")
    mixed(tmp_path / "data")
    cache = build(tmp_path / "data", video, tmp_path / "cache")
    urls = sorted(str(path) for path in (tmp_path / "cache").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    samples = {sample["__key__"]: sample for sample in dataset}
    assert samples.keys() == cache.places.keys()
    for cached in cache.items:
        sample = samples[cached.latents]
        assert torch.equal(load(sample["safetensors"])["latents"], cache.tensors(cached.latents)["latents"])
        told = json.loads(sample["json"])
        assert told["caption"] == cached.item.caption and told["file"] == cached.item.example.path.name
        assert told["domain"] in ("clips", "stills") and tuple(told["bucket"]) == cached.item.bucket
        assert json.loads(samples[cached.text]["json"]) == {"caption": cached.item.caption}


@pytest.mark.parametrize(
    ("size", "name"), [((256, 384), "low"), ((512, 512), "medium"), ((512, 768), "medium"), ((768, 1280), "high")]
)
def test_resolutions_count_as_in_the_report(size: tuple[int, int], name: str) -> None:
    assert resolution_class(size[0] * size[1]) == name
    assert [shards.SAMPLES["image", level] for level in ("low", "medium", "high")] == [1024, 256, 64]
    assert [shards.SAMPLES["clip", level] for level in ("low", "medium", "high")] == [16, 4, 1]


def write(folder: Path, count: int, size: int = 3) -> ShardWriter:
    writer = ShardWriter(folder, "clip-low", size)
    for number in range(count):
        writer.add(f"k{number}", {"latents": torch.full((2, 3), float(number))}, {"caption": f"красный {number}"})
    return writer


def test_shards_have_their_size_and_equal_samples_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 8).flush()
        time.sleep(1.1 if name == "a" else 0)  # headers that hold the time would differ
    assert files(tmp_path / "a") == files(tmp_path / "b")
    names = sorted(files(tmp_path / "a"))
    assert names == ["clip-low-000000.tar", "clip-low-000001.tar", "clip-low-000002.tar"]
    with tarfile.open(tmp_path / "a" / names[0]) as tar:
        assert tar.getnames() == [f"k{number}.{kind}" for number in range(3) for kind in ("safetensors", "json")]
        assert {(member.mtime, member.uid, member.uname) for member in tar.getmembers()} == {(0, 0, "")}
    found = index_shards(tmp_path / "a")
    assert sorted(found) == [f"k{number}" for number in range(8)]
    assert read_sample(found["k7"])["latents"].tolist() == [[7.0] * 3] * 2


def test_a_damaged_shard_is_named_and_leftovers_go(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "clip-low-000001.partial").write_bytes(b"half")
    assert len(index_shards(tmp_path)) == 3 and not list(tmp_path.glob("*.partial"))
    path = tmp_path / "clip-low-000000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"shard .*clip-low-000000\.tar is damaged.*delete it"):
        index_shards(tmp_path)


def test_a_full_disk_leaves_whole_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write(tmp_path, 5)
    before = files(tmp_path)
    assert len(before) == 1

    def full(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        tar.fileobj.write(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_add", full)
    with pytest.raises(OSError, match=r"clip-low-000001\.tar could not be written .* free on its disk\).*No space"):
        writer.flush()
    assert files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == list(before)


# Made once


def test_a_second_job_encodes_nothing(tmp_path: Path, video: Models) -> None:
    mixed(tmp_path / "data")
    told: list[str] = []
    first = build(tmp_path / "data", video, tmp_path / "cache", on_item=told.append)
    assert encoded(told) == {"sample": 7, "caption": 9}  # seven captions and the empty one of two templates
    before = files(tmp_path / "cache")
    told.clear()
    second = build(tmp_path / "data", video, tmp_path / "cache", on_item=told.append)
    assert encoded(told) == {} and files(tmp_path / "cache") == before
    assert [cached.latents for cached in second.items] == [cached.latents for cached in first.items]
    assert second.places == first.places


def test_only_what_changed_is_made_again(tmp_path: Path, video: Models) -> None:
    mixed(tmp_path / "data")
    made = build(tmp_path / "data", video, tmp_path / "cache")
    keys = {cached.item.example.path.name: cached for cached in made.items}

    def again(hashes: Hashes = HASHES, **values: object) -> tuple[dict, Counter]:
        told: list[str] = []
        cache = build(tmp_path / "data", video, tmp_path / "cache", hashes, on_item=told.append, **values)
        return {cached.item.example.path.name: cached for cached in cache.items}, encoded(told)

    # A caption: its text alone.
    (tmp_path / "data" / "clips" / "0.txt").write_text("other words")
    changed, work = again()
    assert work == {"caption": 1}
    assert changed["0.mp4"].latents == keys["0.mp4"].latents and changed["0.mp4"].text != keys["0.mp4"].text
    # The content, under the same name: its latents alone.
    picture(tmp_path / "data" / "stills" / "1.png", 77, words=None)
    changed, work = again()
    assert work == {"sample": 1} and changed["1.png"].latents != keys["1.png"].latents
    # Another name for the same content: nothing.
    (tmp_path / "data" / "stills" / "2.png").rename(tmp_path / "data" / "stills" / "9.png")
    (tmp_path / "data" / "stills" / "2.txt").rename(tmp_path / "data" / "stills" / "9.txt")
    changed, work = again()
    assert work == {} and changed["9.png"].latents == keys["2.png"].latents
    # Another cut, another VAE, other text encoders.
    _, work = again(max_frames=9)
    assert work == {"sample": 3 * 1}
    _, work = again(replace(HASHES, vae="w"))
    assert work == {"sample": 7}
    _, work = again(replace(HASHES, text="u"))
    assert work == {"caption": 9}
    _, work = again(trigger="zxc")
    assert work == {"caption": 7}


def test_another_rate_or_precision_is_another_sample(tmp_path: Path, video: Models) -> None:
    clip(tmp_path / "data" / "a.mp4", num_frames=34)
    data = config(tmp_path / "data", cache_text=False)
    keys = set()
    for variant in (video.variant, replace(video.variant, fps=4)):
        for dtype in (torch.float32, torch.bfloat16):
            models = replace(video, variant=variant, vae=load_vae_of(find_files("nano-video"), dtype))
            cache = build_cache(scan(data, variant), data, models, HASHES, tmp_path / "cache")
            keys |= {cached.latents for cached in cache.items}
    assert len(keys) == 2 * (2 + 1)  # two windows at 8 frames a second, one at 4


def test_without_text_no_text_is_encoded(tmp_path: Path, video: Models) -> None:
    mixed(tmp_path / "data")
    told: list[str] = []
    cache = build(tmp_path / "data", video, tmp_path / "cache", cache_text=False, on_item=told.append)
    assert encoded(told) == {"sample": 7} and not cache.has_text
    assert not list((tmp_path / "cache").glob("text-*"))


def test_one_picture_with_two_captions_is_encoded_once(tmp_path: Path, video: Models) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "t.jsonl").write_text('{"path": "a.png", "caption": "one"}\n{"path": "a.png", "caption": "two"}')
    told: list[str] = []
    cache = build(tmp_path / "t.jsonl", video, tmp_path / "cache", on_item=told.append)
    assert encoded(told) == {"sample": 1, "caption": 3}
    assert len(cache.items) == 2 and len({cached.latents for cached in cache.items}) == 1


# Stopped, killed, full


def test_what_was_made_before_a_cancel_is_kept(tmp_path: Path, video: Models) -> None:
    mixed(tmp_path / "data")
    told: list[str] = []

    def on_item(message: str) -> None:
        told.append(message)
        if encoded(told)["sample"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "data", video, tmp_path / "cache", on_item=on_item)
    assert len(index_shards(tmp_path / "cache")) == 5
    told.clear()
    cache = build(tmp_path / "data", video, tmp_path / "cache", on_item=told.append)
    assert encoded(told) == {"sample": 2, "caption": 9}
    assert all(cached.latents in cache.places for cached in cache.items)


CHILD = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from tests.train.test_data_cache import HASHES, build, load_models
    from train.data import shards

    shards.SAMPLES.update({key: 2 for key in shards.SAMPLES})
    when, seen = sys.argv[3], []
    add = shards._add

    def dying(tar, name, data):
        seen.append(name)
        if when == "inside" and len(seen) == 6:
            tar.fileobj.write(data[:10])
            tar.fileobj.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(tar, name, data)

    def on_item(message):
        if when == "between" and message.startswith("encoding 2.png"):
            os.kill(os.getpid(), signal.SIGKILL)

    shards._add = dying
    build(Path(sys.argv[1]), load_models("nano-video"), Path(sys.argv[2]), on_item=on_item)
"""


@pytest.mark.parametrize("when", ["inside", "between"])
def test_a_killed_process_leaves_whole_shards_and_the_next_goes_on(tmp_path: Path, video: Models, when: str) -> None:
    mixed(tmp_path / "data")
    arguments = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "data"), str(tmp_path / "cache"), when]
    root = Path(__file__).parents[2]
    child = subprocess.run(arguments, cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})
    assert child.returncode == -signal.SIGKILL
    partial = list((tmp_path / "cache").glob("*.partial"))
    assert len(partial) == (when == "inside")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("*.tar")}
    assert kept and len(index_shards(tmp_path / "cache")) == 2 * len(kept)
    told: list[str] = []
    cache = build(tmp_path / "data", video, tmp_path / "cache", on_item=told.append)
    assert encoded(told)["sample"] == 7 - 2 * len(kept)
    assert not list((tmp_path / "cache").glob("*.partial"))
    after = files(tmp_path / "cache")
    assert all(after[name] == data for name, data in kept.items())
    straight = build(tmp_path / "data", video, tmp_path / "straight")
    for cached in straight.items:
        assert torch.equal(cache.tensors(cached.latents)["latents"], straight.tensors(cached.latents)["latents"])


def test_a_disk_too_small_is_told_before_anything_is_encoded(
    tmp_path: Path, video: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed(tmp_path / "data")
    usage = type("Usage", (), {"free": 20_000})()
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    told: list[str] = []
    with pytest.raises(ValueError, match=r"the cache needs about .* GB and the disk of .* free"):
        build(tmp_path / "data", video, tmp_path / "cache", on_item=told.append)
    assert encoded(told) == {}


def test_a_disk_that_fills_up_while_encoding_keeps_what_is_whole(
    tmp_path: Path, video: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed(tmp_path / "data")
    monkeypatch.setattr(cache_module, "SAMPLES", dict.fromkeys(shards.SAMPLES, 2))
    add, seen = shards._add, []

    def filling(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        seen.append(name)
        if len(seen) > 5:
            raise OSError(28, "No space left on device")
        add(tar, name, data)

    monkeypatch.setattr(shards, "_add", filling)
    with pytest.raises(OSError, match="could not be written"):
        build(tmp_path / "data", video, tmp_path / "cache")
    assert len(index_shards(tmp_path / "cache")) == 2
    monkeypatch.setattr(shards, "_add", add)
    told: list[str] = []
    build(tmp_path / "data", video, tmp_path / "cache", on_item=told.append)
    assert encoded(told)["sample"] == 5


def test_a_file_that_breaks_after_the_scan_is_named(tmp_path: Path, video: Models) -> None:
    mixed(tmp_path / "data")
    data = config(tmp_path / "data")
    report = scan(data, video.variant)
    (tmp_path / "data" / "stills" / "3.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"3\.png"):
        build_cache(report, data, video, HASHES, tmp_path / "cache")
    (tmp_path / "data" / "stills" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"3\.png"):
        build_cache(report, data, video, HASHES, tmp_path / "cache")


def test_two_jobs_do_not_write_to_one_cache_at_once(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from train.data.shards import locked\n"
    code += f"with locked(Path({str(tmp_path)!r})):\n    print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as child:
        assert child.stdout.readline() == b"in\n"

        class EnoughError(Exception):
            pass

        def on_wait(message: str) -> None:
            assert "waiting for another job" in message
            raise EnoughError

        with pytest.raises(EnoughError), locked(tmp_path, on_wait):
            pass
        child.kill()
    with locked(tmp_path, on_wait):
        pass


