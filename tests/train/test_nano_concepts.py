"""Teaching new concepts: material, what preserves the old language, and how LoRAs and their soup are compared."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kandinsky5_core.loading import load
from kandinsky5_core.nano.drawing import draw, random_scene, random_trajectory
from kandinsky5_core.nano.language import BACKGROUNDS, COLORS, TAUGHT_COLORS
from kandinsky5_core.nano.recognise import recognise
from kandinsky5_core.pipeline import Models
from kandinsky5_core.weights.soup import Part, soup
from tests.train.test_loop import OBJECTIVE, batches
from tests.train.test_lora import randomised, velocity
from train.config import FitConfig, LoraConfig
from train.objectives.flow_matching import FlowMatching
from train.objectives.preservation import Preserving
from train.recipes import nano_concepts
from train.recipes.nano_concepts import CONCEPTS, Scores, elsewhere, material, table, teach, union, with_lora
from train.trainable import WithLora

SIZE = (64, 64)


@pytest.fixture(scope="module")
def models() -> Models:
    return load("nano-video")


def test_a_taught_colour_is_drawn_and_recognised_and_no_old_one_is_taken_for_it() -> None:
    rng = random.Random(3)
    for color in (*COLORS, *TAUGHT_COLORS):
        for background in BACKGROUNDS:
            scene = replace(random_scene(rng), color=color, background=background)
            clip = draw(scene, random_trajectory(scene, rng, SIZE), 5, SIZE)
            noisy = (clip + 0.03 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
            seen = recognise(noisy, taught=tuple(TAUGHT_COLORS))
            assert (seen.color, seen.shape, seen.background) == (color, scene.shape, background)
    assert recognise(draw(replace(scene, color="turquoise"), random_trajectory(scene, rng, SIZE), 1, SIZE)).color is None


def test_a_star_is_drawn_whole_and_no_old_shape_is_taken_for_it() -> None:
    rng = random.Random(4)
    for number in range(60):
        old = replace(random_scene(rng), size="big")
        scene = replace(old, shape="star") if number % 2 else old
        clip = draw(scene, random_trajectory(scene, rng, SIZE), 17, SIZE)
        background = torch.tensor(BACKGROUNDS[scene.background]) / 255
        edges = torch.cat([clip[:, 0].flatten(0, 1), clip[:, -1].flatten(0, 1), clip[:, :, 0].flatten(0, 1)])
        if scene.shape == "star":
            assert torch.allclose(edges, background.expand_as(edges)), scene
        seen = recognise(clip, taught=("star",))
        assert (seen.shape, seen.motion) == (scene.shape, scene.direction or "still")


def test_what_cannot_be_recognised_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="taught names 'heart', which cannot be recognised; use star, turquoise"):
        recognise(torch.zeros(1, 64, 64, 3), taught=("heart",))


def test_elsewhere_shows_the_same_clip_whole() -> None:
    rng = random.Random(5)
    places = set()
    for _ in range(30):
        scene = replace(random_scene(rng), shape="star", size="big")
        clip = draw(scene, random_trajectory(scene, rng, SIZE), 17, SIZE)
        moved = elsewhere(clip, rng)
        before, after = recognise(clip, taught=("star",)), recognise(moved, taught=("star",))
        assert (after.shape, after.color, after.motion) == ("star", scene.color, scene.direction or "still")
        assert after.extent == pytest.approx(before.extent, rel=1e-3)
        places.add((round(after.path[0][0] - before.path[0][0], 2), round(after.path[0][1] - before.path[0][1], 2)))
    assert len(places) > 10
    plain = torch.full((2, 8, 8, 3), 0.5)
    assert torch.equal(elsewhere(plain, rng), plain)


def test_material_goes_with_its_caption(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano_concepts, "PLACES", 1)
    clips = nano_concepts.drawn_clips(CONCEPTS[0], 1, models)[:2]
    rows = material(models, clips, 1)
    assert rows.latents.shape == (4, 16, 5, 8, 8)
    assert len(rows.text.pooled) == 5
    alone = models.text_encoder.encode([clips[1][0]], task="t2v", max_tokens=64)
    for row in (2, 3):
        torch.testing.assert_close(rows.text.pooled[row], alone.pooled[0])
    assert not torch.allclose(rows.text.pooled[1], alone.pooled[0])


def _adapted() -> WithLora:
    adapted = WithLora(randomised(), LoraConfig(rank=4, alpha=4.0), torch.Generator().manual_seed(0))
    for parameter in adapted.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3
    return adapted


def test_the_base_answers_without_its_lora_for_a_while() -> None:
    adapted, plain = _adapted(), velocity(randomised())
    changed = velocity(adapted)
    with adapted.bare() as base:
        assert torch.equal(velocity(base), plain)
    assert torch.equal(velocity(adapted), changed)
    assert not torch.equal(changed, plain)


def test_drift_is_the_distance_from_the_old_answers_and_its_gradient_undoes_it() -> None:
    flow = FlowMatching(batches, OBJECTIVE.rope_scale, shift=1.0)
    objective, adapted = Preserving(flow, batches, weight=3.0), _adapted()
    losses = objective(adapted, 0, torch.Generator().manual_seed(1))
    assert losses["loss"].item() == pytest.approx(losses["new"].item() + 3 * losses["drift"].item(), rel=1e-5)
    assert losses["drift"] > 0
    untouched = WithLora(randomised(), LoraConfig(rank=4, alpha=4.0), torch.Generator().manual_seed(0))
    assert objective.drift(untouched, 0, torch.Generator().manual_seed(1)) == 0
    optimizer = torch.optim.Adam(adapted.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        objective.drift(adapted, 0, torch.Generator().manual_seed(1)).backward()
        optimizer.step()
    assert objective.drift(adapted, 0, torch.Generator().manual_seed(1)) < 0.3 * losses["drift"].item()
    with pytest.raises(ValueError, match="with a LoRA only"):
        objective.drift(randomised(), 0, torch.Generator())


def test_the_union_is_the_mean_over_concepts() -> None:
    assert union({"star": 0.9, "turquoise": 0.2}) == {"star": 0.9, "turquoise": 0.2, "union": pytest.approx(0.55)}


def test_concepts_are_taught_to_files_that_make_a_soup(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PLACES": 0, "NUM_SAMPLES": 2, "NUM_RECALLED": 2, "RECALL_STEPS": 1}.items():
        monkeypatch.setattr(nano_concepts, name, value)
    config = FitConfig(num_steps=2, learning_rate=1e-2, optimizer="muon", warmup_steps=1)
    before = {name: weight.clone() for name, weight in models.dit.state_dict().items()}
    for concept in CONCEPTS:
        times = teach(models, concept, tmp_path / f"{concept.word}.safetensors", config)
        assert times["in all"] > 0
    assert all(torch.equal(weight, before[name]) for name, weight in models.dit.state_dict().items())
    parts = [tmp_path / f"{concept.word}.safetensors" for concept in CONCEPTS]
    soup([Part.of(part) for part in parts], tmp_path / "soup.safetensors")
    name = "visual_transformer_blocks.0.cross_attention.to_key.weight"
    first, second, both = (
        with_lora(models, file).dit.state_dict()[name] - before[name] for file in (*parts, tmp_path / "soup.safetensors")
    )
    assert first.any() and second.any()
    torch.testing.assert_close(both, (first + second) / 2, atol=1e-6, rtol=1e-3)
    twice = with_lora(models, tmp_path / "soup.safetensors", 2.0).dit.state_dict()[name] - before[name]
    torch.testing.assert_close(twice, first + second, atol=1e-6, rtol=1e-3)


def test_models_are_scored_on_every_concept_and_told_in_a_table(models: Models) -> None:
    sheet: list = []
    row = Scores(CONCEPTS, 1, 5).of(models, "before", sheet)
    assert list(row) == ["star", "turquoise", "union", "old language"]
    assert all(0 <= value <= 1 for value in row.values())
    assert [label for label, _ in sheet] == ["before: star 1", "before: turquoise 1"]
    text = table({"scores": {"before": row}, "seconds": {"star": {"in all": 2.0}}})
    assert "old language" in text.splitlines()[0]
    assert text.splitlines()[-1] == "star LoRA: in all 2 s"
