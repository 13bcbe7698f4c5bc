"""Batches as a function of their number: queues, budget, tasks, dropout, and what the DiT is shown."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import VARIANTS
from kandinsky5_core.footage import look_at, read_frames
from kandinsky5_core.inputs import encode_inputs
from kandinsky5_core.media import read_image
from kandinsky5_core.pipeline import Models
from kandinsky5_core.request import Request, resolve
from kandinsky5_core.sampling.guidance import model_input
from kandinsky5_core.shapes import VideoShape
from tests.train.material import clip, pair, picture
from tests.train.test_data_cache import HASHES, load_models
from train.config import DataConfig, SourceConfig
from train.data import dataset
from train.data.cache import Cache, CachedItem, build_cache, encode_caption
from train.data.dataset import Batches
from train.data.scan import scan
from train.objectives.flow_matching import Batch, FlowMatching

NANO = VARIANTS["nano-video"]
SHARES = {"t2v": 0.5, "i2v": 0.3, "t2i": 0.2}


@pytest.fixture(scope="module")
def video() -> Models:
    return load_models("nano-video")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long and short clips and pictures, in all numbers different."""
    root = tmp_path_factory.mktemp("material")
    for number in range(5):
        clip(root / f"long{number}.mp4", number)
    for number in range(4):
        clip(root / f"short{number}.mp4", 20 + number, num_frames=5)
    for number in range(7):
        picture(root / f"still{number}.png", 40 + number)
    return root


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def config(folder: Path, **values: object) -> DataConfig:
    values = {"tasks": tuple(SHARES.items()), **values}
    repeats = values.pop("repeats", 1)
    return DataConfig(sources=(SourceConfig(path=str(folder), repeats=repeats),), **values)


def make(folder: Path, models: Models, cache_folder: Path, **values: object) -> Batches:
    data = config(folder, **values)
    cache = build_cache(scan(data, models.variant), data, models, HASHES, cache_folder)
    return Batches(cache, data, models.variant)


@pytest.fixture(scope="module")
def batches(folder: Path, video: Models, cache_folder: Path) -> Batches:
    return make(folder, video, cache_folder)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def get(batches: Batches, index: int) -> Batch:
    return batches(index, generator(index))


def same(one: Batch, other: Batch) -> bool:
    image = [None if batch.image is None else (batch.image.clean, batch.image.source, batch.image.mask) for batch in (one, other)]
    tensors = [(batch.latents, batch.text.embeds, batch.text.pooled, batch.text.mask) for batch in (one, other)]
    pairs = list(zip(*tensors, strict=True))
    if (image[0] is None) != (image[1] is None):
        return False
    pairs += [] if image[0] is None else list(zip(*image, strict=True))
    return all(a is b is None or (a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)


def names(batches: Batches, index: int) -> list[str]:
    """Files of batch `index`."""
    kind, number = batches._choice(index)
    return [batches.items[position].item.example.path.name for position in batches._streams[kind].batch(number)]


# A function of the number


def test_a_batch_depends_on_its_number_and_generator_alone(
    batches: Batches, folder: Path, video: Models, cache_folder: Path
) -> None:
    straight = [get(batches, index) for index in range(40)]
    other = make(folder, video, cache_folder)
    for index in (39, 0, 17, 3, 17, 38):
        assert same(get(other, index), straight[index])
    # Two processes of one job see what one process sees.
    shared = [make(folder, video, cache_folder) for _ in range(2)]
    for index in range(20):
        assert same(get(shared[index % 2], index), straight[index])
    # The generator decides dropout and conditioning, and not the samples.
    again = batches(5, generator(999))
    assert torch.equal(again.latents, straight[5].latents)


def test_another_seed_is_another_order(folder: Path, video: Models, cache_folder: Path, batches: Batches) -> None:
    other = make(folder, video, cache_folder, seed=1)
    assert [names(other, index) for index in range(10)] != [names(batches, index) for index in range(10)]


def test_reading_little_at_a_time_changes_nothing(
    folder: Path, video: Models, cache_folder: Path, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "KEPT_BYTES", 30_000)
    small = make(folder, video, cache_folder)
    for index in range(25):
        assert same(get(small, index), get(batches, index))
    assert sum(tensor.nbytes for part in small._read.values() for tensor in part.values()) == small._kept_bytes <= 30_000


# Queues and budget


def test_batches_are_of_one_shape_full_and_pictures_are_by_themselves(batches: Batches) -> None:
    seen = Counter()
    for index in range(60):
        batch, files = get(batches, index), names(batches, index)
        kinds = {name[:4] for name in files}
        assert len(kinds) == 1
        count, _, frames, height, width = batch.latents.shape
        assert (height, width) == (8, 8) and len(files) == count == len(batch.text.embeds)
        # The longest clip has five latent frames: one long clip, two short ones, five pictures.
        assert {"long": (1, 5), "shor": (2, 2), "stil": (5, 1)}[kinds.pop()] == (count, frames)
        seen[frames] += 1
    assert min(seen[frames] for frames in (1, 2, 5)) >= 4


def test_mixed_sizes_never_mix(tmp_path: Path) -> None:
    models = load_models("nano-image")
    sizes = {(64, 64): 3, (96, 64): 4, (64, 96): 5, (128, 120): 2}  # the last is scaled to 96x96
    for size, count in sizes.items():
        for number in range(count):
            picture(tmp_path / "data" / f"{size[0]}x{size[1]}-{number}.png", 100 * size[0] + size[1] + number, size)
    batches = make(tmp_path / "data", models, tmp_path / "cache", tasks=(), image_batch=2)
    seen = Counter()
    for index in range(70):
        batch, files = get(batches, index), names(batches, index)
        height, width = (8 * side for side in batch.latents.shape[-2:])
        wanted = "128x120" if (height, width) == (96, 96) else f"{height}x{width}"
        assert len(files) == 2 and {file.rpartition("-")[0] for file in files} == {wanted}
        seen[wanted] += 1
    assert len(seen) == 4
    for size, count in sizes.items():  # 70 batches are ten epochs
        assert abs(seen[f"{size[0]}x{size[1]}"] - 5 * count) <= 1


def test_the_budget_is_the_user_s(folder: Path, video: Models, cache_folder: Path) -> None:
    own = make(folder, video, cache_folder, frame_budget=11, image_batch=3)
    sizes = {tuple(get(own, index).latents.shape[::2][:2]) for index in range(40)}
    assert sizes == {(2, 5), (5, 2), (3, 1)}
    for index in range(10):  # a bucket of four in batches of five: across epochs
        assert len(names(own, index)) == len(get(own, index).latents)


def test_every_sample_comes_equally_often(folder: Path, video: Models, cache_folder: Path) -> None:
    own = make(folder, video, cache_folder, repeats=2)
    counts = Counter(name for index in range(900) for name in names(own, index))
    for kind in ("long", "short", "still"):
        of_kind = [count for name, count in counts.items() if name.startswith(kind)]
        # Whole epochs of two each; the last may be open, and a batch may lie across its end.
        assert max(of_kind) - min(of_kind) <= 4 and min(of_kind) > 50, counts
    # Epochs differ in their order.
    orders = [tuple(names(own, index)[0] for index in range(start, start + 12)) for start in (0, 300, 600)]
    assert len(set(orders)) == 3


# Tasks and dropout


def test_tasks_have_their_shares(batches: Batches) -> None:
    clips = given = held_rows = rows = 0
    for index in range(1200):
        batch = get(batches, index)
        if batch.latents.shape[2] == 1:
            assert batch.image is None
            continue
        clips += 1
        rows += len(batch.latents)
        if batch.image is not None:
            given += 1
            held_rows += int(batch.image.mask[:, 0, 0].sum())
    # 1200 draws: three standard deviations.
    assert abs(clips / 1200 - 0.8) < 0.035
    assert abs(held_rows / rows - 0.3 / 0.8) < 3 * (0.375 * 0.625 / rows) ** 0.5


def test_captions_are_dropped_as_often_as_asked(folder: Path, video: Models, cache_folder: Path) -> None:
    for share in (0.0, 0.1, 1.0):
        own = make(folder, video, cache_folder, caption_dropout=share)
        empty = {key: own.cache.text(key).pooled[0] for key in {item.empty for item in own.items}}
        rows = [row for index in range(500) for row in get(own, index).text.pooled]
        dropped = sum(any(torch.equal(row, one) for one in empty.values()) for row in rows)
        expected = share * len(rows)
        assert abs(dropped - expected) <= 4 * (len(rows) * share * (1 - share)) ** 0.5, (share, dropped, len(rows))


def test_rows_carry_their_own_caption(batches: Batches) -> None:
    for index in range(30):
        batch = batches(index, generator(1))
        kind, number = batches._choice(index)
        for row, position in enumerate(batches._streams[kind].batch(number)):
            item = batches.items[position]
            texts = [batches.cache.text(key) for key in (item.text, item.empty)]
            length = int(batch.text.mask[row].sum())
            assert any(
                text.embeds.shape[1] == length and torch.equal(text.embeds[0], batch.text.embeds[row, :length])
                for text in texts
            )
            assert not batch.text.embeds[row, length:].any()


# What the DiT is shown


def test_image_to_video_is_shown_what_inference_shows(tmp_path: Path, video: Models) -> None:
    clip(tmp_path / "data" / "a.mp4", 5)
    batches = make(tmp_path / "data", video, tmp_path / "cache", tasks=(("i2v", 1.0),), caption_dropout=0.0)
    batch = get(batches, 0)
    item = batches.items[0].item
    frame = read_frames(look_at(item.example.path), item.moments[:1])[0]
    request = resolve(Request(prompt=item.caption, task="i2v", image=frame, height=64, width=64), NANO)
    with torch.no_grad():
        inference = encode_inputs(video, request, VideoShape(1, 17, 64, 64).latent_shape(NANO.vae)).image
    noise = torch.randn(batch.latents.shape, generator=generator(3))
    shown = [model_input(noise, image, NANO.dit) for image in (batch.image, inference)]
    assert shown[0].shape == (1, 33, 5, 8, 8)
    # Latents are stored in fp16.
    torch.testing.assert_close(shown[0], shown[1], rtol=2**-11, atol=2**-24)
    assert not shown[0][:, 16:32].any()
    assert torch.equal(shown[0][0, 32, :, 0, 0], torch.tensor([1.0, 0, 0, 0, 0]))
    assert torch.equal(shown[0][:, :16, 1:], noise[:, :, 1:])


def test_text_to_video_is_shown_noise_alone(tmp_path: Path, video: Models) -> None:
    clip(tmp_path / "data" / "a.mp4", 5)
    batches = make(tmp_path / "data", video, tmp_path / "cache", tasks=(("t2v", 1.0),))
    assert all(get(batches, index).image is None for index in range(10))


def test_an_edit_is_shown_what_inference_shows(tmp_path: Path) -> None:
    models = load_models("nano-edit")
    for number in range(2):
        pair(tmp_path / "data", str(number), number)
    batches = make(tmp_path / "data", models, tmp_path / "cache", tasks=(), caption_dropout=0.0, image_batch=2)
    assert batches.cache.tasks == {"i2i": 1.0}
    batch = get(batches, 0)
    positions = batches._streams["edit"].batch(0)
    for row, position in enumerate(positions):
        item = batches.items[position].item
        before = read_image(item.example.source)
        request = resolve(Request(prompt=item.caption, task="i2i", image=before, height=64, width=64), models.variant)
        with torch.no_grad():
            shape = VideoShape(1, 1, 64, 64).latent_shape(models.variant.vae)
            inference = encode_inputs(models, request, shape).image
        noise = torch.randn(1, *batch.latents.shape[1:], generator=generator(3))
        mine = replace(batch.image, source=batch.image.source[row : row + 1], mask=batch.image.mask[row : row + 1])
        shown = [model_input(noise, image, models.variant.dit) for image in (mine, inference)]
        torch.testing.assert_close(shown[0], shown[1], rtol=2**-11, atol=2**-24)
        assert bool((shown[0][:, 32] == 1).all())


def test_the_objective_takes_every_batch(batches: Batches) -> None:
    from kandinsky5_core.loading import find_files, load_dit_of

    dit = load_dit_of(find_files("nano-video"), torch.float32)
    objective = FlowMatching(batches, NANO.rope_scale)
    with torch.no_grad():
        losses = [float(objective(dit, index, generator(index))["loss"]) for index in range(12)]
    assert all(0 < loss < 4 for loss in losses)


# Text on the fly


def test_text_made_on_the_fly_is_the_cached_one(
    folder: Path, video: Models, cache_folder: Path, batches: Batches
) -> None:
    data = config(folder, cache_text=False)
    cache = build_cache(scan(data, NANO), data, video, HASHES, cache_folder)
    asked = []

    def encode(caption: str, cached: CachedItem) -> TextConditioning:
        asked.append(caption)
        return encode_caption(video.text_encoder, caption, cached.item, NANO.max_text_tokens)

    live = Batches(cache, data, NANO, encode)
    for index in range(12):
        assert same(get(live, index), get(batches, index))
    assert asked
    with pytest.raises(ValueError, match="give encode_text, or cache_text"):
        Batches(cache, data, NANO)


# Held out


def test_held_out_files_are_never_trained_on(batches: Batches) -> None:
    train, held = batches.holdout(0.25)
    files = [{item.item.example.path.name for item in part.items} for part in (train, held)]
    assert not files[0] & files[1]
    assert files[0] | files[1] == {item.item.example.path.name for item in batches.items}
    # Of every kind its share: two of nine clips, two of seven pictures.
    assert Counter(name[:2] for name in files[1]).keys() >= {"st"}
    assert sum(name.endswith(".mp4") for name in files[1]) == 2 and sum(name.endswith(".png") for name in files[1]) == 2
    for part, own in ((train, files[0]), (held, files[1])):
        assert {name for index in range(60) for name in names(part, index)} == own
    again = batches.holdout(0.25)
    assert [[item.latents for item in part.items] for part in again] == [
        [item.latents for item in part.items] for part in (train, held)
    ]


def test_windows_of_one_clip_stay_on_one_side(tmp_path: Path, video: Models) -> None:
    for number in range(4):
        clip(tmp_path / "data" / f"{number}.mp4", number, num_frames=51)
    batches = make(tmp_path / "data", video, tmp_path / "cache", tasks=())
    assert len(batches.items) == 12
    train, held = batches.holdout(0.2)
    assert (len(train.items), len(held.items)) == (9, 3)


def test_a_single_file_cannot_be_held_out(tmp_path: Path, video: Models) -> None:
    clip(tmp_path / "data" / "a.mp4")
    batches = make(tmp_path / "data", video, tmp_path / "cache", tasks=())
    with pytest.raises(ValueError, match=r"validation\.holdout 0\.5 needs at least two files of a kind"):
        batches.holdout(0.5)


def test_the_log_says_what_comes(batches: Batches) -> None:
    assert batches.describe() == (
        "9 clip samples an epoch in about 7 batches; 7 image samples an epoch in about 2 batches; "
        "tasks t2v 0.50, i2v 0.30, t2i 0.20"
    )
    # Five long clips alone, four short ones by two; seven pictures by five.


def test_a_cache_of_nothing_is_refused() -> None:
    data = DataConfig(sources=(SourceConfig(path="x"),))
    with pytest.raises(ValueError, match="no sample"):
        Batches(Cache(items=[], tasks={"t2v": 1.0}, places={}, has_text=True), data, NANO)
