"""`kandinsky5 bench`: what is counted and compared, its keys, and what it refuses; never how long anything takes."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kandinsky5_core.attention.block_mask import mass_mask
from kandinsky5_core.attention.dense import dense_attention
from kandinsky5_core.attention.nabla import NablaAttention
from kandinsky5_core.bench import machine, peak, report, rivals, run, sparsity, stages, subjects, timing, work
from kandinsky5_core.bench.nabla import block_tokens, mass_for, selection_error, token_grid
from kandinsky5_core.bench.stages import Case
from kandinsky5_core.cli import main
from kandinsky5_core.config import IMAGE_LITE, NANO_VIDEO, NablaConfig, variant
from kandinsky5_core.dit.plan import plan_visual

CPU = torch.device("cpu")


def bench(tmp_path, *options):
    path = tmp_path / "bench.json"
    assert main(["bench", "--repeats", "1", "--out", str(path), *options]) == 0
    return json.loads(path.read_text())


# --- times


def test_runs_are_taken_in_turns_and_each_round_begins_with_another():
    order = []
    functions = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = timing.alternate(functions, CPU, repeats=3, warm_ups=1)
    assert order[3:] == [*"abc", *"bca", *"cab"] and sorted(order[:3]) == [*"abc"]
    assert [len(samples[name].seconds) for name in "abc"] == [3, 3, 3]
    with pytest.raises(ValueError, match="repeats 0 must be at least 1"):
        timing.alternate(functions, CPU, repeats=0)


def test_ratios_are_of_medians_and_of_rounds():
    ours = timing.Samples([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    other = timing.Samples([3.0, 2.0, 8.0], [2.0, 3.0, 4.0])
    assert timing.ratio(other, ours) == {"ratio": 1.5, "ratio_paired": 2.0, "ratio_best": 2.0, "ratio_cpu": 3.0}


# --- work


@pytest.mark.parametrize(
    ("config", "grid", "text_tokens", "batch"),
    [(NANO_VIDEO, (5, 4, 4), 11, 1), (NANO_VIDEO, (1, 6, 2), 30, 2),
     (replace(IMAGE_LITE, num_visual_blocks=1, num_text_blocks=1), (1, 4, 4), 5, 1)],
)  # fmt: skip
def test_flops_of_the_dit_are_those_that_pytorch_counts(config, grid, text_tokens, batch):
    dit = subjects.random_dit(config, CPU, torch.float32)
    text = subjects.random_text(config, text_tokens, CPU, torch.float32).repeat(batch)
    latents = torch.randn(batch, config.input_channels, grid[0], 2 * grid[1], 2 * grid[2])
    timestep = torch.full((batch,), 500.0)

    def eager(q, k, v, key_mask=None):
        return (q @ k.mT).softmax(-1) @ v

    plan = plan_visual(config, grid, (1.0, 1.0, 1.0), dense=eager)
    monkey = pytest.MonkeyPatch()
    # The counter knows PyTorch's attention only on CUDA: matrix products it counts everywhere.
    monkey.setattr("kandinsky5_core.dit.blocks.dense_attention", eager)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            dit(latents, timestep, text, plan)
    finally:
        monkey.undo()
    assert work.dit_flops(config, grid, text_tokens, batch=batch) == counter.get_total_flops()


def test_flops_of_kept_attention_fall_and_of_tokens_rise():
    dense = work.dit_flops(NANO_VIDEO, (5, 8, 8), 10)
    kept = work.dit_flops(NANO_VIDEO, (5, 8, 8), 10, kept=0.1)
    attention = work.attention_flops(320, NANO_VIDEO.num_heads, NANO_VIDEO.head_dim) * NANO_VIDEO.num_visual_blocks
    assert dense - kept == pytest.approx(0.9 * attention, rel=1e-6)


def test_matmul_is_the_one_that_is_counted():
    multiply, flops = machine.matmul(NANO_VIDEO, CPU, torch.float32)
    with FlopCounterMode(display=False) as counter:
        multiply()
    assert counter.get_total_flops() == flops


def test_peak_is_of_this_work_alone():
    big = peak.peak_of(lambda: torch.ones(64 * 2**20 // 4), CPU)
    small = peak.peak_of(lambda: torch.ones(16), CPU)
    assert big["peak_of"] == small["peak_of"]
    if big["peak_of"] == "process":
        pytest.skip("this system does not let the peak be reset")
    assert 60 * 2**20 < big["added_bytes"] < 100 * 2**20
    assert small["added_bytes"] < 8 * 2**20


# --- subjects and rivals


def test_random_models_have_the_released_widths_and_live_signals():
    config = subjects.fewer_blocks(variant("lite-t2v-5s-sft").dit, 1)
    assert (config.num_visual_blocks, config.model_dim) == (1, 1792)
    dit = subjects.random_dit(NANO_VIDEO, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in dit.parameters()} == {torch.bfloat16}
    again = subjects.random_dit(NANO_VIDEO, CPU, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), again.parameters(), strict=True))
    text = subjects.random_text(NANO_VIDEO, 4, CPU, torch.bfloat16)
    with torch.no_grad():
        out = dit(torch.randn(1, 33, 2, 8, 8).bfloat16(), torch.tensor([500.0]), text,
                  plan_visual(NANO_VIDEO, (2, 4, 4), (1.0, 1.0, 1.0))).float()  # fmt: skip
    assert 0.05 < out.std() < 20
    for blocks in (0, 33):
        with pytest.raises(ValueError, match=f"--blocks {blocks} must be 1 to 32"):
            subjects.fewer_blocks(variant("lite-t2v-5s-sft").dit, blocks)


def test_random_qwen_has_the_layers_asked_for(monkeypatch):
    small = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(subjects, "QWEN", {**subjects.QWEN, **small})
    qwen = subjects.random_qwen(2, CPU, torch.float32)
    assert len(qwen.layers) == 2
    hidden = qwen(input_ids=torch.arange(5)[None], use_cache=False).last_hidden_state
    assert hidden.shape == (1, 5, 256) and hidden.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_computes_the_same_over_the_same_tensors(dtype):
    pytest.importorskip("diffusers")
    dit = subjects.random_dit(NANO_VIDEO, CPU, dtype)
    theirs = rivals.diffusers_dit(dit)
    assert theirs.visual_embeddings.in_layer.weight.data_ptr() == dit.visual_embeddings.in_layer.weight.data_ptr()
    assert theirs.visual_transformer_blocks[0].visual_modulation.out_layer.weight.dtype == torch.float32
    text = subjects.random_text(NANO_VIDEO, 6, CPU, dtype)
    latents, timestep, grid, scale = torch.randn(1, 33, 3, 8, 12).to(dtype), torch.tensor([700.0]), (3, 4, 6), (1, 2, 2)
    with torch.no_grad():
        ours = dit(latents, timestep, text, plan_visual(NANO_VIDEO, grid, scale))
        found = rivals.diffusers_step(theirs, latents, timestep, text, grid, scale)()
    assert run.relative_error(ours, found) < (1e-4 if dtype == torch.float32 else 0.02)


def test_relative_error_is_the_norm_of_the_difference():
    assert run.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1 / math.sqrt(18))


# --- NABLA


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_nabla_is_measured_at_the_sparsity_asked_for(share):
    q, k, v = block_tokens(2, 2048, 16)
    mass = mass_for(q, k, share)
    kept = float(mass_mask(q, k, mass).float().mean())
    assert abs(1 - kept - share) < 0.02
    nabla = NablaAttention(NablaConfig(mass=mass, window=(1, 1, 1)), token_grid(2048), path="gather")
    assert selection_error(nabla, q, k, v) < 1e-5


# --- the command


ROW_KEYS = {"stage", "what", "note", "seconds", "seconds_best", "cpu_seconds", "runs", "peak_bytes", "added_bytes",
            "peak_of", "facts", "beside"}  # fmt: skip


def test_every_stage_of_an_embedded_model_beside_diffusers(tmp_path, capsys):
    pytest.importorskip("diffusers")
    picture = tmp_path / "bench.png"
    found = bench(
        tmp_path, "--variant", "nano-video", "--against", "diffusers", "--frames", "5", "--plot", str(picture)
    )
    assert set(found) == {"variant", "measured", "machine", "engine", "against", "rows"}
    assert found["variant"] == "nano-video" and found["measured"] == "all 5 visual blocks, weights of the file"
    assert found["against"].startswith("diffusers 0.")
    rows = {row["stage"]: row for row in found["rows"]}
    assert list(rows) == ["text", "dit", "vae_encode", "vae_decode", "load"]
    assert all(set(row) >= ROW_KEYS and row["runs"] == 1 for row in rows.values())
    dit = rows["dit"]
    assert dit["tokens"] == 2 * 4 * 4 and dit["tokens_per_second"] == pytest.approx(32 / dit["seconds"])
    assert dit["share_of_matmul"] == pytest.approx(dit["flops"] / dit["seconds"] / dit["matmul_flops_per_second"])
    assert dit["beside"]["diffusers (native)"]["error"] < 1e-4
    assert dit["facts"]["diffusers_backends"] == {"native": "the only one on this device"}
    assert {"ratio", "ratio_paired", "ratio_best", "ratio_cpu"} <= set(rows["vae_decode"]["beside"]["diffusers"])
    assert set(rows["load"]["beside"]) == {"read the bytes"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| dit | 64x64, 5 frames |" in printed and "diffusers: " in printed


def test_random_weights_few_blocks_and_several_sizes(tmp_path):
    found = bench(
        tmp_path, "--variant", "nano-video", "--random-weights", "--blocks", "2", "--stage", "dit", "load", "--dtype",
        "bf16", "--sizes", "32x32x1", "32x64x5", "--text-tokens", "7",
    )  # fmt: skip
    assert found["measured"] == "2 of 5 visual blocks, random weights" and found["against"] is None
    assert [row["what"] for row in found["rows"][:2]] == ["32x32, 1 frame", "32x64, 5 frames"]
    assert [row["tokens"] for row in found["rows"][:2]] == [4, 16]
    assert found["machine"]["dtype"] == "bfloat16"
    sizes = work.dit_flops(replace(NANO_VIDEO, num_visual_blocks=2), (1, 2, 2), 7)
    assert found["rows"][0]["flops"] == sizes


def test_attention_stage_measures_nabla_beside_dense(tmp_path, capsys):
    picture = tmp_path / "bench.png"
    found = bench(tmp_path, "--variant", "nano-video", "--stage", "attention", "--tokens", "2048", "--heads", "2",
                  "--sparsity", "0.8", "--plot", str(picture))  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    (row,) = found["rows"]
    assert set(row["beside"]) == {"dense sdpa"} and row["tokens"] == 2048
    assert abs(row["facts"]["sparsity"] - 0.8) < 0.04 and row["facts"]["error"] < 1e-4
    assert row["facts"]["path"].startswith("nabla: ")
    assert "2 heads of 32, mask included" in row["note"]


def test_compiled_blocks_can_be_measured(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "compile_blocks", asked.append)
    found = bench(tmp_path, "--variant", "nano-video", "--stage", "dit", "--frames", "1", "--compile")
    (row,) = found["rows"]
    assert len(asked) == 1 and row["facts"]["compiled"] is True
    assert list(row["beside"]) == ["ours, not compiled"] and row["beside"]["ours, not compiled"]["error"] == 0


# --- NABLA in a step


SPARSE = ["--variant", "nano-video", "--stage", "dit", "--attention", "nabla", "--sizes", "512x512x5", "--text-tokens", "6"]


def test_a_step_under_nabla_is_measured_at_the_sparsity_asked_for_beside_dense(tmp_path):
    (row,) = bench(tmp_path, *SPARSE, "--random-weights", "--blocks", "3", "--sparsity", "0.56")["rows"]
    facts = row["facts"]
    assert facts["attention"] == "nabla" and facts["window"] == [11, 3, 3] and facts["path"].startswith("nabla: ")
    assert abs(facts["sparsity"] - 0.56) < 0.02
    low, high = facts["sparsity_range"]
    assert low <= facts["sparsity"] <= high
    # The map of random weights is nearly flat: at the mass that was trained with, next to nothing would be dropped.
    assert facts["mass"] < 0.3
    assert list(row["beside"]) == ["dense sdpa"] and "error" not in row["beside"]["dense sdpa"]
    config = replace(NANO_VIDEO, num_visual_blocks=3)
    assert row["flops"] == pytest.approx(work.dit_flops(config, (2, 32, 32), 6, kept=1 - facts["sparsity"]), rel=1e-3)


def test_given_weights_keep_the_mass_they_were_trained_with(tmp_path):
    (row,) = bench(tmp_path, *SPARSE)["rows"]
    assert row["facts"]["mass"] == 0.9 and 0 <= row["facts"]["sparsity"] < 0.56
    assert list(row["beside"]) == ["dense sdpa"]


def test_the_share_that_is_told_is_what_nabla_drops():
    """Counted anew, from the masks of one evaluation."""
    config, grid, masks = replace(NANO_VIDEO, num_visual_blocks=2), (2, 32, 24), []
    dit = subjects.random_dit(config, CPU, torch.float32)
    text = subjects.random_text(config, 5, CPU, torch.float32)
    latents, timestep = torch.randn(1, 33, 2, 64, 48), torch.tensor([500.0])
    plan = plan_visual(config, grid, (1.0, 1.0, 1.0), NablaConfig(mass=0.5, window=(1, 1, 1)))
    step = lambda nabla: dit(latents, timestep, text, replace(plan, nabla=nabla))  # noqa: E731
    with torch.no_grad():
        found = sparsity.found_mass(step, plan.nabla.config, 0.8, grid, CPU, dense_attention)
        nabla = NablaAttention(found.config, grid, path="gather")
        seen = nabla.block_mask
        nabla.block_mask = lambda q, k: masks.append(seen(q, k)) or masks[-1]
        step(nabla)
    shares = [1 - float(mask.float().mean()) for mask in masks]
    assert shares == pytest.approx(found.shares, abs=1e-3) and len(shares) == 2
    assert found.mean == pytest.approx(0.8, abs=0.01)


# --- diffusers' backends


def fake_rival(backends):
    """A model of two blocks whose attention backends add an error or fail; what is set is kept."""

    class Rival(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual_transformer_blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(5))
            self.backend, self.blocks_run = None, set()

        def set_attention_backend(self, name):
            if name not in backends:
                raise RuntimeError(f"{name} is not usable\nmore lines")
            self.backend = name

    rival = Rival()

    def step():
        rival.blocks_run.add(len(rival.visual_transformer_blocks))
        return torch.ones(4) * (1 + backends[rival.backend][1])

    return rival, step


def test_the_fastest_exact_backend_of_diffusers_is_taken(monkeypatch):
    backends = {"native": (3.0, 0), "_native_cudnn": (2.0, 0.001), "_native_flash": (1.0, 0.5), "sage": (0.5, 0)}
    rival, step = fake_rival(backends)
    monkeypatch.setattr(rivals, "timed", lambda function, device: (backends[rival.backend][0], 0.0))
    best, told = rivals.best_backend(rival, step, torch.device("cuda"))
    assert best == rival.backend == "_native_cudnn"
    assert rival.blocks_run == {2} and len(rival.visual_transformer_blocks) == 5
    assert (told["native"], told["_native_cudnn"], told["sage"]) == (3.0, 2.0, 0.5)
    assert told["_native_flash"].startswith("1.00000 s, but differs by 0.5")
    assert told["flash"] == "RuntimeError: flash is not usable"


def test_backends_that_are_probed_are_those_of_diffusers():
    attention_dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    known = {member.value for member in attention_dispatch.AttentionBackendName}
    assert set(rivals.BACKENDS) <= known


def test_the_rival_can_be_compiled_beside_itself(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    asked = []
    monkeypatch.setattr(
        diffusers.Kandinsky5Transformer3DModel, "compile_repeated_blocks", lambda self, *args, **kw: asked.append(self)
    )
    (row,) = bench(
        tmp_path, "--variant", "nano-video", "--stage", "dit", "--frames", "1", "--against", "diffusers",
        "--compile-rival",
    )["rows"]  # fmt: skip
    assert list(row["beside"]) == ["diffusers (native)", "diffusers (native, compiled)"] and len(asked) == 1
    assert all(other["error"] < 1e-4 for other in row["beside"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "lite"], "unknown model variant 'lite'; nearest: "),
        (["--stage", "dream"], "--stage 'dream' is unknown; use text, dit"),
        (["--blocks", "99"], "--blocks 99 must be 1 to 32"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--text-tokens", "9999"], "--text-tokens 9999 must be 1 to 256"),
        (["--text-layers", "0"], "--text-layers 0 must be 1 to 28"),
        (["--height", "100"], "height 100 is not a positive multiple of 16; use 96 or 112"),
        (["--frames", "6"], "frames 6 is not of the form 4k+1"),
        (["--sizes", "512"], "--sizes '512' is not HEIGHTxWIDTHxFRAMES"),
        (["--sizes", "512x512x1", "--width", "64"], "give --sizes or --height, --width and --frames, not both"),
        (["--variant", "image-lite-t2i-sft", "--frames", "5"], "makes pictures"),
        (["--engine", "flash"], "attention engine 'flash' cannot be used: needs CUDA"),
        (["--engine", "warp"], "attention engine 'warp' is unknown"),
        (["--against", "pytorch"], "--against 'pytorch' is unknown; use diffusers"),
        (["--model", "/nowhere.safetensors"], "'/nowhere.safetensors' does not exist"),
        (["--random-weights", "--vae", "x"], "--random-weights measures without files"),
        (["--stage", "attention", "--tokens", "1000"], "--tokens 1000 is not a multiple of 1024; use 1024"),
        (["--stage", "attention", "--sparsity", "1"], "--sparsity 1.0 must be above 0 and below 1"),
        (["--stage", "dit", "--attention", "nabla", "--random-weights", "--frames", "5", "--sparsity", "2"],
         "--sparsity 2.0 must be above 0 and below 1"),
        (["--attention", "nabla", "--stage", "dit", "--sizes", "256x256x5"],
         "NABLA's window alone keeps 100% of the blocks"),
        (["--compile-rival"], "--compile-rival needs a rival: add --against diffusers"),
        (["--plot", "x.txt"], "--plot x.txt is no .png"),
        (["--out", "/nowhere/x.json"], "the folder /nowhere does not exist"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(options, message, capsys, monkeypatch):
    monkeypatch.setattr(subjects, "random_dit", lambda *args: pytest.fail("built a model"))
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_missing_package_is_named(capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("diffusers", "matplotlib") else real(name, *a)
    )
    for options, package in ((["--against", "diffusers"], "diffusers"), (["--plot", "x.png"], "matplotlib")):
        assert main(["bench", *options]) == 2
        assert f"pip install {package}" in capsys.readouterr().err


def test_table_has_a_line_for_each_rival_and_no_empty_figures():
    case = Case(stage="dit", what="small", run=lambda: None, beside={"a": None, "b": None}, tokens=10, flops=100)
    samples = {name: timing.Samples([2.0], [2.0]) for name in ("ours", "a", "b", report.MATMUL)}
    peaks = {"ours": {"peak_bytes": 2**30, "added_bytes": 5, "peak_of": "stage"}}
    row = report.row_of(case, samples, peaks, 400, {"a": 1e-6})
    assert row["share_of_matmul"] == 0.25 and row["tokens_per_second"] == 5
    lines = report.table([row]).splitlines()
    assert lines[2] == "| dit | small | 2 | 5 | 25% | 1.00 GiB | a: 1.00 | 1.00 | 1.0e-06 |"
    assert lines[3] == "|  |  |  |  |  |  | b: 1.00 | 1.00 |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_plot_has_time_and_memory_of_every_stage_and_names_what_ran_beside(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    saved = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, dpi: saved.append(self))
    beside = {"diffusers (native)": {"seconds": 3.0, "peak_bytes": None}}
    rows = [{"stage": stage, "what": "256x256, 1 frame", "seconds": 2.0, "peak_bytes": 2**30, "beside": beside}
            for stage in stages.STAGES]  # fmt: skip
    report.plot(rows, tmp_path / "x.png")
    axes = saved[0].axes
    assert [axis.get_title() for axis in axes] == [f"{s}: {w}" for s in stages.STAGES for w in ("time", "peak memory")]
    shown = [[text.get_text() for text in axis.texts] for axis in axes[:2]]
    # A peak that is not known has no bar, and no label.
    assert shown == [["2 s", "3 s"], ["1 GiB"]]
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == ["ours", "diffusers (native)"]


def test_sizes_are_read():
    assert run.parse_size("512x768x121") == (512, 768, 121)
    assert run.parse_size("64X96") == (64, 96, 1)
    args = SimpleNamespace(sizes=None, height=None, width=None, frames=None)
    assert run.shapes_of(args, variant("lite-t2v-5s-sft"))[0] == (1, 121, 512, 768)
