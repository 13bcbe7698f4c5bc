"""The planner: its arithmetic beside what is counted, its choices, its words. Never how long anything takes."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kandinsky5_core import commands, pipeline, planning
from kandinsky5_core.attention import block_mask, gather
from kandinsky5_core.bench import planned, subjects
from kandinsky5_core.bench.live import LiveBytes, live_peak
from kandinsky5_core.caching import choose_cache
from kandinsky5_core.cli import main
from kandinsky5_core.config import NANO_VIDEO, VARIANTS, variant
from kandinsky5_core.dit import layers
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.fitting import budget_bytes, fitted, job_of_request
from kandinsky5_core.loading import load
from kandinsky5_core.memory import activations, parameters, training
from kandinsky5_core.memory.activations import WORKSPACE
from kandinsky5_core.memory.apply import checkpoint_blocks
from kandinsky5_core.memory.choose import BUDGETS, GIB, DoesNotFitError, choose, reserve, smaller_shape
from kandinsky5_core.memory.estimate import Job, Settings, default_job, dit_work, estimate
from kandinsky5_core.memory.options import MemoryOptions
from kandinsky5_core.request import Request, resolve
from kandinsky5_core.shapes import VideoShape
from kandinsky5_core.vae.flux import FluxVAE
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE
from train.config import LoraConfig

CPU = torch.device("cpu")
WITHIN = 0.10


def needs_of(name="lite-t2v-5s-sft", **memory):
    job = default_job(variant(name))
    return {need.stage: need for need in estimate(job, Settings(memory=MemoryOptions(**memory)))}


# --- counting what lives


def test_live_bytes_are_those_held_at_once_and_views_are_free():
    given = torch.ones(1000)

    def work():
        kept = given + 1  # 4000
        kept.view(10, 100).t()
        for _ in range(3):
            temporary = kept * 2  # 4000 more, one at a time beside the one it replaces
        return temporary

    assert live_peak(work) == 12_000
    with LiveBytes() as counter:
        made = given.t()
        assert counter.live == 0
        made = given * 2
        assert counter.live == 4000
        del made
        assert counter.live == 0 and counter.peak == 4000


# --- predictions


@pytest.mark.parametrize("name", sorted({row.name for row in VARIANTS.values()} - {"nano-edit"}))
def test_numbers_in_the_dit_are_those_of_the_network(name):
    config = variant(name).dit
    with torch.device("meta"):
        network = DiffusionTransformer(config)
    assert parameters.dit(config).total == sum(tensor.numel() for tensor in network.parameters())


@pytest.mark.parametrize("config", parameters.RELEASED_VAES)
def test_numbers_in_the_released_vaes_are_those_of_the_networks(config):
    with torch.device("meta"):
        network = (FluxVAE if config.kind == "flux" else HunyuanVAE)(config)
    assert parameters.vae(config) == sum(tensor.numel() for tensor in network.parameters())


def test_numbers_in_the_text_encoders_are_those_of_the_networks():
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    language = {**subjects.QWEN, "vocab_size": 152_064}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    with torch.device("meta"):
        qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=language, vision_config=vision)).model
        pooled = CLIPTextModel(clip)
    sizes = parameters.TextSizes()
    assert sizes.qwen().total == sum(tensor.numel() for tensor in qwen.parameters())
    assert sizes.clip == sum(tensor.numel() for tensor in pooled.parameters())


@pytest.mark.parametrize(
    "measure",
    [
        lambda: planned.dit_step("nano-video", VideoShape(1, 17, 64, 64), dtype=torch.float32, blocks=5),
        lambda: planned.dit_step("lite-t2v-5s-sft", VideoShape(2, 5, 128, 256), dtype=torch.bfloat16),
        lambda: planned.dit_step("lite-t2v-5s-sft", VideoShape(1, 9, 128, 256), dtype=torch.float32, text_tokens=200),
        lambda: planned.dit_step("lite-t2v-10s-sft", VideoShape(1, 13, 128, 256), dtype=torch.bfloat16),
        lambda: planned.text_pass(100, layers=1, dtype=torch.bfloat16),
        lambda: planned.vae_pass("nano-video", VideoShape(1, 17, 64, 64), "encode", dtype=torch.float32),
        lambda: planned.vae_pass("nano-image", VideoShape(2, 1, 96, 64), "decode", dtype=torch.float32),
        lambda: planned.vae_pass("lite-t2v-5s-sft", VideoShape(1, 5, 64, 64), "decode", dtype=torch.bfloat16),
        lambda: planned.vae_pass("nano-video", VideoShape(1, 9, 128, 128), "decode", dtype=torch.float32,
                                 budget=40 * 2**20),
        lambda: planned.vae_pass("nano-video", VideoShape(1, 33, 96, 96), "encode", dtype=torch.float32,
                                 budget=16 * 2**20),
        lambda: planned.full_step("lite-t2v-5s-sft"),
        lambda: planned.full_step("pro-t2v-10s-sft-hd", blocks=1),
        lambda: planned.full_step("image-lite-i2i-sft"),
        lambda: planned.full_vae("lite-t2v-5s-sft", "decode", budget=8 * 2**30),
        lambda: planned.full_vae("lite-t2v-5s-sft", "encode", budget=8 * 2**30),
        lambda: planned.loaded("nano-video"),
        lambda: planned.loaded("nano-image"),
        lambda: planned.block_weights(variant("lite-t2v-5s-sft"), "int8"),
    ],
)  # fmt: skip
def test_predictions_are_within_a_tenth_of_what_is_counted(measure):
    row = measure()
    assert row.predicted == pytest.approx(row.measured, rel=WITHIN), f"{row.what}: {row.ratio:.3f}"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("nano-video", {}), ("nano-video", {"batch": 2, "batch_guidance": "on"}), ("nano-video", {"guidance_scale": 1.0}),
     ("nano-image", {"width": 96, "height": 96})],
)  # fmt: skip
@torch.no_grad()
def test_whole_stages_are_within_a_tenth_of_what_is_counted(name, wanted):
    models = load(name)
    task = models.variant.tasks[0]
    request = resolve(
        Request(prompt="a red circle on a gray background", task=task, num_steps=2, **wanted), models.variant
    )
    shape = VideoShape(request.batch, request.num_frames, request.height, request.width)
    kept = {}

    def read():
        kept["text"] = pipeline.encode_prompts(models, request)

    def sample():
        kept["latents"] = pipeline.sample_latents(
            models, request, shape.latent_shape(models.variant.vae), *kept["text"]
        )

    measured = {"text": live_peak(read)}
    # The text was there before.
    measured["dit"] = live_peak(sample) + sum(row.embeds.nbytes for row in kept["text"] if row is not None)
    # Beside live tensors the plan holds a quarter for convolution kernels.
    measured["vae_decode"] = WORKSPACE * live_peak(
        lambda: pipeline.decode_frames(models, kept["latents"], request.vae_budget_bytes)
    )
    words = int(kept["text"][0].mask.sum(dim=1).max())
    job = Job(variant=models.variant, shape=shape, task=task, text_tokens=words, element_size=4,
              guided=request.guidance_scale != 1)  # fmt: skip
    needs = estimate(job, Settings(guidance_batched="batch_guidance" in wanted))
    assert {need.stage: need.work for need in needs[1:]} == pytest.approx(measured, rel=WITHIN)


# --- what settings change


def test_stages_hold_their_own_network_or_all_of_them():
    alone, together = needs_of(offload="stage"), needs_of(offload="none")
    whole = sum(alone[stage].weights for stage in ("text", "dit", "vae_decode"))
    assert {need.weights for stage, need in together.items() if stage != "load"} == {whole}
    assert alone["dit"].weights == parameters.dit(variant("lite-t2v-5s-sft").dit).total * 2
    assert alone["text"].cpu == whole - alone["text"].weights and together["dit"].cpu == 0


def test_swapped_blocks_leave_but_for_two():
    config = variant("pro-t2v-5s-sft").dit
    block = 2 * parameters.visual_block(config).total
    plain, swapped = needs_of("pro-t2v-5s-sft"), needs_of("pro-t2v-5s-sft", swap_blocks=10)
    assert plain["dit"].weights - swapped["dit"].weights == 8 * block
    assert swapped["dit"].cpu - plain["dit"].cpu == 10 * block and plain["load"] == swapped["load"]
    with pytest.raises(ValueError, match="swap_blocks 61 is more than the 60 visual blocks"):
        needs_of("pro-t2v-5s-sft", swap_blocks=61)


@pytest.mark.parametrize(("kind", "low", "high"), [("int8", 0.5, 0.51), ("nf4", 0.25, 0.27)])
def test_text_encoder_in_fewer_bits(kind, low, high):
    matrices = parameters.TextSizes().qwen().matrices * 2
    saved = needs_of()["text"].weights - needs_of(text_weights=kind)["text"].weights
    assert low * matrices <= matrices - saved <= high * matrices


# --- choices


@pytest.mark.parametrize("name", ["lite-t2v-5s-sft", "lite-i2v-5s", "pro-t2v-5s-sft", "image-lite-i2i-sft"])
def test_choices_fit_and_need_no_more_savings_than_the_smaller_card(name):
    job, before = default_job(variant(name)), None
    for budget in BUDGETS:
        choice = choose(job, budget_bytes=budget * GIB)
        assert choice.peak.device <= budget * GIB - reserve(budget * GIB)
        assert choice.needs == estimate(job, choice.settings)
        if before is not None:
            assert len(choice.reasons) <= len(before.reasons)
            assert choice.settings.memory.swap_blocks <= before.settings.memory.swap_blocks
        before = choice
    assert choice.settings.memory == MemoryOptions(offload="none") and not choice.reasons


def test_no_fewer_blocks_would_do():
    job = default_job(variant("pro-t2v-5s-sft"))
    choice = choose(job, budget_bytes=24 * GIB)
    memory = choice.settings.memory
    assert memory.weights == "as-is" and 0 < memory.swap_blocks < 60
    fewer = replace(choice.settings, memory=replace(memory, swap_blocks=memory.swap_blocks - 1))
    assert max(need.device for need in estimate(job, fewer)) > 24 * GIB - reserve(24 * GIB)


def test_small_cpu_memory_takes_fewer_bits_or_is_refused():
    job = default_job(variant("lite-t2v-5s-sft"))
    assert choose(job, budget_bytes=24 * GIB).settings.memory.text_weights == "as-is"
    tight = choose(job, budget_bytes=24 * GIB, cpu_bytes=16 * GIB)
    assert tight.settings.memory.text_weights == "int8" and tight.cpu_peak <= 16 * GIB
    with pytest.raises(DoesNotFitError, match="with 4 GiB of CPU memory: at least"):
        choose(job, budget_bytes=24 * GIB, cpu_bytes=4 * GIB)


def test_what_does_not_fit_is_refused_with_a_size_that_does():
    job = default_job(variant("pro-t2v-10s-sft-hd"))
    with pytest.raises(DoesNotFitError, match="with every saving sampling still takes"):
        choose(job, budget_bytes=8 * GIB)
    shape = smaller_shape(job, 8 * GIB)
    assert choose(replace(job, shape=shape), budget_bytes=8 * GIB).peak.device < 8 * GIB
    with pytest.raises(DoesNotFitError, match="no smaller size fits either"):
        choose(job, budget_bytes=2 * GIB)


PUBLISHED = {
    # Report, table 5, in 10^9 bytes: one H100 with offload.
    "lite-t2v-5s-sft": 21, "pro-t2v-5s-sft": 47, "pro-t2v-10s-sft": 51, "pro-t2v-5s-sft-hd": 53,
    "pro-t2v-10s-sft-hd": 68, "image-lite-t2i-sft": 17,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_of_the_same_order(name):
    needs = estimate(default_job(variant(name)), Settings())
    peak = max(need.device for need in needs) + reserve(0)
    assert 0.75 <= peak / (PUBLISHED[name] * 1e9) <= 1.1


# --- training


def step_peak(config, num_frames, *, rank, dtype, checkpointing):
    from train.config import LoraConfig
    from train.trainable import WithLora

    model = dit = subjects.random_dit(config, CPU, dtype)
    if checkpointing:
        checkpoint_blocks(dit)
    if rank:
        model = WithLora(dit, LoraConfig(rank=rank), torch.Generator().manual_seed(0)).train()
    else:
        dit.requires_grad_(True)
    text = subjects.random_text(config, 16, CPU, dtype)
    latents = torch.randn(1, config.input_channels, num_frames, 32, 32).to(dtype)
    plan = plan_visual(config, (num_frames, 16, 16), (1.0, 1.0, 1.0))
    with LiveBytes() as counter:
        model(latents, torch.full((1,), 500.0), text, plan).float().square().mean().backward()
    return counter.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8])
def test_a_training_step_is_predicted_within_a_tenth(rank, dtype, checkpointing):
    job = training.TrainingJob(
        config=NANO_VIDEO, num_tokens=6 * 256, rank=rank, element_size=dtype.itemsize, checkpointing=checkpointing
    )
    measured = step_peak(NANO_VIDEO, 6, rank=rank, dtype=dtype, checkpointing=checkpointing)
    assert training.activation_peak(job) == pytest.approx(measured, rel=WITHIN)


def test_the_reports_formulas():
    config = variant("lite-t2v-5s-sft").dit
    assert training.report_step_time(config, 256 * 384 * 31, 2) == (9 + 14 + 6) * 32 * 2
    numbers = 32 * (9 * 512 * 1792 + 8 * 1792**2 + 2 * 7168 * 1792)
    assert training.report_bytes(config, 0) == 16 * numbers
    tokens = 10**6
    activations = 2 * tokens * (32 * 1792 + 18 * 1792 + 2 * 7168)
    assert training.report_bytes(config, tokens, gpus=4) == pytest.approx(12 * numbers / 4 + activations)
    assert training.report_bytes(config, tokens, gpus=4, offloaded=True) < training.report_bytes(config, tokens, gpus=4)


def test_a_training_need_counts_states_and_average():
    config = variant("lite-t2v-5s-sft").dit
    full = training.training_need(training.TrainingJob(config=config, num_tokens=1000, checkpointing=True))
    numbers = parameters.dit(config).total
    assert (full.weights, full.gradients, full.optimizer, full.ema) == (
        4 * numbers, 4 * numbers, 8 * numbers, 4 * numbers,
    )  # fmt: skip
    small = training.TrainingJob(config=config, num_tokens=1000, rank=32, optimizer="adamw8bit", base_weights="int8")
    need = training.training_need(small)
    assert need.optimizer == 2 * small.moving and need.weights < 1.3 * numbers and need.total < full.total / 4
    with pytest.raises(ValueError, match="base_weights 'int8' needs a LoRA"):
        training.TrainingJob(config=config, num_tokens=1, base_weights="int8")


# --- the command


def test_the_command_says_stages_settings_and_reasons(capsys):
    options = ["plan", "--variant", "lite-t2v-5s-sft", "--height", "512", "--width", "768", "--frames", "121"]
    assert main([*options, "--budget", "12", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["settings"]["text_weights"] == "int8" and values["tokens"] == 31 * 32 * 48
    assert [stage["stage"] for stage in values["stages"]] == ["load", "text", "dit", "vae_decode"]
    assert main([*options, "--budget", "12"]) == 0
    told = capsys.readouterr().out
    assert "options: --text-weights int8" in told and "because: text encoder in int8: text encoding would" in told
    assert main(["plan"]) == 0
    assert [line.split(" |")[0] for line in capsys.readouterr().out.splitlines()[3:]] == [
        f"| {budget} GB" for budget in BUDGETS
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--variant", "pro-t2v-10s-sft-hd", "--budget", "8"], "does not fit 8 GiB"),
     (["--frames", "120"], "frames 120 is not of the form 4k\\+1"),
     (["--task", "i2i"], "task 'i2i' is not one of lite-t2v-5s-sft"), (["--budget", "0"], "--budget 0 is not a size")],
)  # fmt: skip
def test_the_command_refuses_in_a_line(options, told, capsys):
    assert main(["plan", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line)


def test_the_command_reads_a_training_job(tmp_path, capsys):
    path = tmp_path / "job.json"
    job = {"model": "file.safetensors", "variant": "lite-t2v-5s-sft", "lora": {"rank": 8}, "fit": {"ema_decay": 0},
           "data": {"area": 256 * 384, "max_frames": 61}, "gradient_checkpointing": True}  # fmt: skip
    path.write_text(json.dumps(job))
    assert main(["plan", "--train", str(path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tokens"] == 16 * 16 * 24 and values["ema"] == 0
    assert values["moving"] == training.lora_numbers(variant("lite-t2v-5s-sft").dit, 8)
    path.write_text(json.dumps({**job, "variant": ""}))
    assert main(["plan", "--train", str(path)]) == 2
    assert "name its variant with the key 'variant'" in capsys.readouterr().err


def test_numbers_of_a_lora_are_those_of_the_pairs():
    from train.config import LoraConfig
    from train.trainable import WithLora

    model = WithLora(subjects.random_dit(NANO_VIDEO, CPU, torch.float32), LoraConfig(rank=4))
    assert training.lora_numbers(NANO_VIDEO, 4) == sum(tensor.numel() for tensor in model.parameters())


def generate_args(tmp_path, *options):
    return ["generate", "--prompt", "a red circle on a gray background", "--steps", "2", "--out", str(tmp_path / "a.mp4"),
            *options]  # fmt: skip


def test_generate_takes_the_settings_that_the_planner_chooses(tmp_path, capsys, monkeypatch):
    def open_to_plans(args, _):
        return taken(args, torch.device("mps"))

    # Computed here, planned as for a card.
    taken = commands.check_left_open
    monkeypatch.setattr(commands, "check_left_open", open_to_plans)
    assert main(generate_args(tmp_path, "--budget", "8", "--json")) == 0
    told = capsys.readouterr()
    used = json.loads(told.out)["settings"]
    assert used["offload"] == "none" and used["batch_guidance"] == "on"
    assert used["vae_budget_bytes"] == Settings().vae_budget_bytes and "settings: all networks" in told.err
    for options, problem in (
        (["--budget", "0.85", "--frames", "1025"], "does not fit 0.85 GiB"),
        (["--budget", "0"], "--budget 0 is not a size"), (["--budget", "inf"], "--budget inf is not a size"),
        (["--budget", "auto"], "does not tell its memory"),
        (["--budget", "8", "--weights", "as-is", "--vae-budget", "2"], "--budget chooses --weights, --vae-budget itself"),
    ):  # fmt: skip
        assert main(generate_args(tmp_path, *options)) == 2
        assert problem in capsys.readouterr().err


def test_a_budget_is_for_accelerators_and_no_more_than_they_have(tmp_path, capsys, monkeypatch, caplog):
    assert main(generate_args(tmp_path, "--budget", "8")) == 2
    assert "add --device cuda" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 15 * GIB))
    assert budget_bytes("auto", torch.device("cuda")) == 15 * GIB
    assert budget_bytes("12", torch.device("cuda")) == 12 * GIB and not caplog.records
    assert budget_bytes("16", torch.device("cuda")) == 15 * GIB and "the device has 15.0 GiB" in caplog.text


@torch.no_grad()
def test_a_step_cache_is_counted():
    models = load("nano-video")
    request = resolve(Request(prompt="a red circle on a gray background", num_steps=2), models.variant)
    latents = pipeline.latent_shape_of(request, models.variant)
    text = pipeline.encode_prompts(models, request)
    cached = replace(request, cache="magcache")
    cache = choose_cache(cached, models.variant, models.weights)

    def peak(new_cache):
        return live_peak(lambda: pipeline.sample_latents(models, request, latents, *text, new_cache=new_cache))

    added = peak(cache.start) - peak(None)
    plain = job_of_request(request, models.variant, torch.float32)
    planned_more = dit_work(job_of_request(cached, models.variant, torch.float32), Settings())
    planned_more -= dit_work(plain, Settings())
    assert added == pytest.approx(planned_more, rel=WITHIN)


@pytest.mark.parametrize("name", ["lite-t2v-10s-sft", "pro-i2v-5s-sft", "image-lite-i2i-sft"])
def test_a_request_is_the_job_that_is_planned(name):
    row = variant(name)
    image = torch.zeros(64, 64, 3) if row.tasks[0] in ("i2v", "i2i") else None
    height, width = row.resolutions[0]
    request = resolve(Request(prompt="a", task=row.tasks[0], image=image, height=height, width=width), row)
    assert job_of_request(request, row, torch.bfloat16) == default_job(row)


def test_a_request_in_a_small_budget_takes_its_savings():
    row = variant("pro-t2v-5s-sft")
    request = resolve(Request(prompt="a"), row)
    request, memory, choice = fitted(request, job_of_request(request, row, torch.bfloat16), 12 * GIB)
    assert memory == choice.settings.memory and memory.swap_blocks > 0 and memory.offload == "stage"
    assert request.batch_guidance == "off" and request.vae_budget_bytes == choice.settings.vae_budget_bytes


def test_the_page_is_up_to_date():
    from benchmarks.memory_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.memory_page"


def test_what_the_planner_repeats_is_what_runs():
    """The originals import torch, or are the trainer's, which the core does not know."""
    assert activations.MAX_SCORES == block_mask.MAX_SCORES
    for name in ("CAST_NUMBERS", "PIECE_NUMBERS_CPU", "PIECE_NUMBERS", "MATMUL_PIECE", "QUARTERS"):
        assert getattr(activations, name) == getattr(layers, name)
    assert activations.GATHERED_NUMBERS_CPU == gather.GATHERED_NUMBERS_CPU
    assert planning.DEFAULT_RANK == LoraConfig().rank


def test_planning_imports_no_torch():
    code = "import sys, kandinsky5_core.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
