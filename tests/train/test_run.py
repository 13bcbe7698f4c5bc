"""Whole jobs in this process: what moves, in which precision, on which material."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kandinsky5_core.loading import find_files
from kandinsky5_core.weights.detect import inspect_file
from kandinsky5_core.weights.load import load_dit
from tests.train.test_jobs import STAR, config
from train.checkpoint import list_checkpoints
from train.config import DataConfig, FitConfig, FlowConfig, SampleConfig, SourceConfig, ValidationConfig
from train.jobs import EXIT_CODES, SAMPLES, Job, Jobs
from train.loop import DivergedError, fit
from train.objectives.flow_matching import FlowMatching
from train.run import run_job

SHORT = FitConfig(num_steps=2, learning_rate=1e-4, warmup_steps=1, ema_decay=0.0, checkpoint_every=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def made(tmp_path: Path, cache: Path, **changes) -> Job:
    """A job run to its end."""
    values = config(**{"fit": SHORT, "threads": 0, **changes})
    if not values.data.cache:
        values = dataclasses.replace(values, data=dataclasses.replace(values.data, cache=str(cache)))
    job = Jobs(tmp_path / "jobs").create(values)
    assert run_job(job) == EXIT_CODES["done"], job.status()
    return job


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(list_checkpoints(job.folder)[-1]).items()}


def test_a_full_fine_tune_moves_all_weights_and_loads_as_a_model(tmp_path: Path, cache: Path) -> None:
    output = tmp_path / "models"
    job = made(tmp_path, cache, lora=None, output_folder=str(output))
    result = Path(job.status().result)
    assert result.parent == output
    assert inspect_file(result, want="dit").variant == "nano-video"
    before, _ = load_dit(find_files("nano-video").dit)
    after, _ = load_dit(result)
    moved = [name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])]
    assert len(moved) > 0.8 * len(before.state_dict())
    second = made(tmp_path, cache, lora=None, output_folder=str(output), name="star")
    assert Path(second.status().result) != result, "a result of another job is not replaced"


def test_text_on_the_fly_trains_as_cached_text_does(tmp_path: Path, cache: Path) -> None:
    data = config().data
    cached = made(tmp_path, cache)
    live = made(tmp_path, cache, data=dataclasses.replace(data, cache_text=False, cache=str(tmp_path / "latents")))
    assert not list((tmp_path / "latents").glob("text-*"))
    assert all(torch.equal(tensor, weights(live)[name]) for name, tensor in weights(cached).items())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, cache: Path) -> None:
    plain, recomputed = made(tmp_path, cache), made(tmp_path, cache, gradient_checkpointing=True)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(recomputed)[name], tensor, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_frozen_base_in_eight_bits_trains_much_the_same(tmp_path: Path, cache: Path, kind: str) -> None:
    pytest.importorskip("torchao")
    plain, small = made(tmp_path, cache), made(tmp_path, cache, base_weights=kind)
    losses = [[record["loss"] for record in job.progress()] for job in (plain, small)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_edit_pairs_train_the_editing_model(tmp_path: Path) -> None:
    edits = STAR.parent / "star-edits"
    job = made(
        tmp_path, tmp_path / "edits", model="nano-edit",
        data=DataConfig(sources=(SourceConfig(path=str(edits)),), frame_budget=4),
        validation=ValidationConfig(
            every=2, num_steps=2,
            samples=(SampleConfig(prompt="turn the circle into a star", image=str(edits / "source" / "00.png")),),
        ),
    )  # fmt: skip
    assert "24 edits" in job.scan_report()
    assert [file.name for file in job.samples()[0][1]] == ["00.png"]
    assert json.loads((job.folder / SAMPLES / "step-00000002" / "samples.json").read_text())["step"] == 2


def test_held_out_files_give_the_validation_loss_and_noise_is_the_users(tmp_path: Path, cache: Path) -> None:
    validation = ValidationConfig(every=1, holdout=0.25)
    job = made(tmp_path, cache, validation=validation, flow=FlowConfig(distribution="uniform", shift=1.0))
    assert all("validation" in record for record in job.progress())
    other = made(tmp_path, cache, validation=validation)
    assert [r["loss"] for r in job.progress()] != [r["loss"] for r in other.progress()]


def test_only_cache_encodes_and_ends(tmp_path: Path) -> None:
    job = made(tmp_path, tmp_path / "cache", only_cache=True)
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.tar"))
    assert job.progress() == [] and not list_checkpoints(job.folder)


def test_the_result_tells_what_it_is(tmp_path: Path, cache: Path) -> None:
    data = dataclasses.replace(config().data, trigger="sks")
    job = made(tmp_path, cache, data=data, name="My star")
    with safe_open(job.status().result, framework="pt") as file:
        told = file.metadata()
    assert told["trigger"] == "sks"
    assert told["kandinsky5.samples"] == "24"
    assert told["kandinsky5.steps"] == "2"
    assert str(STAR.parent) not in json.dumps(told), "folders may name people"
    assert Path(job.status().result).name == "My star-nano-video-r4-2.safetensors"


def test_an_exploding_loss_ends_the_run_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    from tests.train.test_loop import OBJECTIVE, make

    class Exploding(FlowMatching):
        def __call__(self, model, index, generator):
            losses = super().__call__(model, index, generator)
            return {"loss": losses["loss"] * (1e4 if index > 35 else 1)}

    objective = Exploding(OBJECTIVE.batches, OBJECTIVE.rope_scale)
    with pytest.raises(DivergedError, match="exploded"):
        fit(make(), objective, FitConfig(num_steps=99, learning_rate=1e-4, checkpoint_every=10), tmp_path)
    assert list_checkpoints(tmp_path)[-1].stem == "step-00000030"


def test_tensorboard_gets_losses_and_samples(tmp_path: Path, cache: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    samples = (SampleConfig(prompt="a big red star on a black background"),)
    job = made(tmp_path, cache, validation=ValidationConfig(every=2, num_steps=2, samples=samples))
    board = events.EventAccumulator(str(job.folder / "tensorboard")).Reload()
    assert {"loss", "smoothed", "rate"} <= set(board.Tags()["scalars"])
    assert len(board.Scalars("loss")) == 2
    assert len(board.Tags()["images"]) == 1
