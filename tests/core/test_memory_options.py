"""Memory options: words, quantised loading, fp8 files, Qwen in eight and four bits, where networks wait."""

import json
import sys
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky5_core import Request, generate, load
from kandinsky5_core.cli import main
from kandinsky5_core.config import DiTConfig
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.loading import NANO_FOLDER, find_files
from kandinsky5_core.memory import quantized
from kandinsky5_core.memory.block_swap import BlockSwap
from kandinsky5_core.memory.options import MemoryOptions
from kandinsky5_core.memory.quantized import KINDS, block_linears, load_quantized_dit, quantize_blocks
from kandinsky5_core.weights.container import WeightsError
from kandinsky5_core.weights.convert import convert
from kandinsky5_core.weights.detect import inspect_file
from kandinsky5_core.weights.load import load_dit

NANO_DIT = NANO_FOLDER / "video" / "dit.safetensors"
REQUEST = Request(prompt="a red circle moves left", num_steps=2, seed=1)
TINY = DiTConfig(
    in_visual_dim=16, out_visual_dim=16, in_text_dim=24, in_text_dim2=12, time_dim=32, model_dim=64, ff_dim=128,
    num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
)  # fmt: skip


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = DiffusionTransformer(TINY)
    return {name: torch.randn_like(tensor) * 0.1 for name, tensor in model.state_dict().items()}


def tiny_file(folder, dtype=torch.bfloat16, seed: int = 0):
    path = folder / "dit.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in random_state(seed).items()}, path)
    return path


def quantised_names() -> list[str]:
    return [f"{name}.weight" for name, _ in block_linears(DiffusionTransformer(TINY))]


def fp8_file(folder, end: str | None, *, rows=False, fp8=torch.float8_e4m3fn, everything=False):
    """A file as others write them, and what its weights mean, by the definition of the format."""
    made, meaning = {}, {}
    state = random_state(3)
    for name, weight in state.items():
        made[name] = meaning[name] = weight.bfloat16()
        if name in quantised_names():
            scale = weight.abs().amax(1 if rows else None) / torch.finfo(fp8).max if end else torch.ones(())
            wide = scale[:, None] if rows else scale
            made[name] = (weight / wide).to(fp8)
            meaning[name] = made[name].float() * wide
            if end:
                made[name.removesuffix("weight") + end] = scale
        elif everything:
            made[name] = weight.to(fp8)
            meaning[name] = made[name].float()
    if end == "scale_weight":
        made["scaled_fp8"] = torch.empty(0, dtype=fp8)
    save_file(made, folder / "fp8.safetensors")
    return folder / "fp8.safetensors", made, meaning


# --- words


def test_defaults_are_told_as_nothing_and_others_by_name():
    assert MemoryOptions().told() == {}
    assert MemoryOptions(weights="fp8", swap_blocks=2).told() == {"weights": "fp8", "swap_blocks": 2}
    assert {item.name for item in fields(MemoryOptions)} == {"weights", "text_weights", "swap_blocks", "offload"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"weights": "nf4"}, "weights 'nf4' is unknown; use one of as-is, fp8, int8"),
        ({"text_weights": "fp8"}, "text_weights 'fp8' is unknown; use one of as-is, int8, nf4"),
        ({"offload": "disk"}, "offload 'disk' is unknown; use one of stage, none"),
        ({"swap_blocks": -1}, "swap_blocks -1 is negative"),
    ],
)
def test_unknown_options_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        MemoryOptions(**wrong)


@pytest.mark.parametrize(
    ("options", "package"),
    [({"weights": "fp8"}, "torchao"), ({"weights": "int8"}, "torchao"), ({"text_weights": "int8"}, "torchao"),
     ({"text_weights": "nf4"}, "bitsandbytes")],
)  # fmt: skip
def test_a_missing_package_is_named_before_loading(monkeypatch, options, package):
    for module in ("torchao", "torchao.quantization", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("kandinsky5_core.loading.load_dit_of", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"need {package}: pip install {package}"):
        load("nano-video", memory=MemoryOptions(**options))


def test_the_command_line_takes_them(tmp_path, capsys):
    out = tmp_path / "a.png"
    common = ["generate", "--model", "nano-image", "--prompt", "a red circle", "--steps", "1", "--out", str(out)]
    assert main([*common, "--swap-blocks", "99"]) == 2
    assert "swap_blocks 99 is more than the" in capsys.readouterr().err
    options = ["--weights", "int8", "--text-weights", "int8", "--swap-blocks", "2", "--offload", "none", "--json"]
    assert main([*common, *options]) == 0
    told = json.loads(capsys.readouterr().out)["settings"]
    assert {name: told[name] for name in ("weights", "text_weights", "swap_blocks", "offload")} == {
        "weights": "int8", "text_weights": "int8", "swap_blocks": 2, "offload": "none",
    }  # fmt: skip
    assert main([*common, "--json"]) == 0
    assert "weights" not in json.loads(capsys.readouterr().out)["settings"]


# --- where networks wait


class Moved(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.places = []

    def to(self, device):
        self.places.append(str(device))


@pytest.mark.parametrize(("offload", "places"), [("stage", ["meta", "cpu"]), ("none", ["meta"])])
def test_networks_leave_the_device_as_asked(offload, places):
    models = replace(load("nano-image"), device=torch.device("meta"), memory=MemoryOptions(offload=offload))
    moved = Moved()
    with pytest.raises(KeyboardInterrupt), models.on_device(moved):
        raise KeyboardInterrupt
    assert moved.places == places


def test_swapped_blocks_stay_when_the_dit_goes_to_its_device():
    models = load("nano-image", memory=MemoryOptions(swap_blocks=2))
    assert isinstance(models.swap, BlockSwap)
    # What went to meta has no data to come back with.
    models = replace(models, device=torch.device("meta"), memory=replace(models.memory, offload="none"))
    with models.on_device(models.dit):
        kinds = {parameter.device.type for parameter in models.dit.visual_transformer_blocks[-1].parameters()}
        assert kinds == {"cpu"} and next(models.dit.out_layer.parameters()).is_meta


# --- the DiT in eight bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_loading_quantised_is_loading_and_then_quantising(tmp_path, kind, stored, dtype):
    path = tiny_file(tmp_path, stored, seed=5)
    plain, _ = load_dit(path, dtype=dtype)
    quantize_blocks(plain, kind)
    found, info = load_quantized_dit(path, kind, dtype=dtype)
    assert info.config == TINY
    expected = plain.state_dict()
    for name, weight in found.state_dict().items():
        assert type(weight) is type(expected[name]) and weight.dtype == torch.bfloat16
        wide = [tensor.dequantize() if hasattr(tensor, "qdata") else tensor for tensor in (weight, expected[name])]
        assert torch.equal(*wide)
    assert sum(hasattr(weight, "qdata") for weight in found.state_dict().values()) == len(quantised_names())


def test_only_one_weight_is_read_at_a_time(tmp_path, monkeypatch):
    path, read, counts = tiny_file(tmp_path), quantized.read_weights, []

    def counted(records, *args, **kwargs):
        counts.append([name for name in records if name in quantised_names()])
        return read(records, *args, **kwargs)

    monkeypatch.setattr(quantized, "read_weights", counted)
    load_quantized_dit(path, "int8")
    assert counts[0] == [] and all(len(names) == 1 for names in counts[1:])
    assert sorted(name for names in counts for name in names) == sorted(quantised_names())


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("fp8", 0.05)])
def test_quantised_weights_are_near_and_half_as_large(tmp_path, kind, bound):
    path = tiny_file(tmp_path, seed=6)
    state, (dit, _) = load_file(path), load_quantized_dit(path, kind)
    for name in quantised_names():
        weight = dit.get_parameter(name)
        assert 0 < (weight.dequantize().float() - state[name].float()).norm() / state[name].float().norm() < bound
        assert weight.qdata.element_size() == 1 and weight.scale.numel() == weight.shape[0]


@pytest.mark.parametrize("options", [{"weights": "int8"}, {"weights": "fp8"}, {"text_weights": "int8"},
                                     {"text_weights": "nf4"}])  # fmt: skip
def test_results_under_options_are_near_the_plain_ones(options):
    plain = generate(load("nano-video"), REQUEST)
    found = generate(load("nano-video", memory=MemoryOptions(**options)), REQUEST)
    assert found.settings == {**plain.settings, **options}
    difference = (found.frames - plain.frames).abs()
    assert 0 < difference.mean() < 0.05


# --- fp8 files


@pytest.mark.parametrize(
    ("end", "rows"),
    [("scale_weight", False), ("scale_weight", True), ("weight_scale", False), ("weight_scale", True), (None, False)],
)
def test_fp8_files_mean_weight_times_scale(tmp_path, end, rows):
    path, _, meaning = fp8_file(tmp_path, end, rows=rows)
    assert inspect_file(path).kind == "dit" and "fp8_e4m3" in inspect_file(path).dtypes
    dit, _ = load_dit(path, dtype=torch.float32)
    for name, weight in dit.state_dict().items():
        assert torch.equal(weight, meaning[name].float())
    assert {weight.dtype for weight in load_dit(path)[0].state_dict().values()} == {torch.bfloat16}


def test_int8_files_of_comfyui_mean_weight_times_scale(tmp_path):
    made, meaning = random_state(3), {}
    for name in quantised_names():
        scale = made[name].abs().amax(1, keepdim=True) / 127
        made[name] = (made[name] / scale).round().to(torch.int8)
        meaning[name] = made[name].float() * scale
        made[f"{name}_scale"] = scale
        mark = b'{"format": "int8_tensorwise"}'
        made[f"{name.removesuffix('weight')}comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    save_file(made, tmp_path / "int8.safetensors")
    state = load_dit(tmp_path / "int8.safetensors", dtype=torch.float32)[0].state_dict()
    assert len(meaning) > 4 and all(torch.equal(state[name], weight) for name, weight in meaning.items())
    name = quantised_names()[0]
    save_file({key: part for key, part in made.items() if key != f"{name}_scale"}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=f"tensor '{name}' is I8"):
        load_dit(tmp_path / "bare.safetensors")
    mark = torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}'), dtype=torch.uint8)
    save_file({**made, f"{name.removesuffix('weight')}comfy_quant": mark}, tmp_path / "rotated.safetensors")
    with pytest.raises(ValueError, match="rotated rows"):
        load_dit(tmp_path / "rotated.safetensors")


@pytest.mark.parametrize(("end", "rows"), [("scale_weight", False), ("weight_scale", True), (None, False)])
def test_weights_fp8_keeps_the_numbers_of_an_fp8_file(tmp_path, end, rows):
    path, made, meaning = fp8_file(tmp_path, end, rows=rows)
    dit, _ = load_quantized_dit(path, "fp8", dtype=torch.float32)
    for name in quantised_names():
        weight = dit.get_parameter(name)
        assert torch.equal(weight.qdata.view(torch.uint8), made[name].view(torch.uint8))
        assert torch.allclose(weight.dequantize(), meaning[name], rtol=1e-6)
        x = torch.randn(3, weight.shape[1])
        torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ meaning[name].T)


def test_wholly_cast_and_e5m2_files_and_int8_of_fp8(tmp_path):
    path, _, meaning = fp8_file(tmp_path, None, everything=True)
    dit, _ = load_quantized_dit(path, "fp8")
    assert dit.out_layer.out_layer.weight.dtype == torch.bfloat16
    assert torch.equal(dit.out_layer.out_layer.weight.float(), meaning["out_layer.out_layer.weight"].float())
    for fp8, kind in ((torch.float8_e5m2, "fp8"), (torch.float8_e4m3fn, "int8")):
        path, _, meaning = fp8_file(tmp_path, "scale_weight", fp8=fp8)
        dit, _ = load_quantized_dit(path, kind)
        for name in quantised_names():
            error = (dit.get_parameter(name).dequantize().float() - meaning[name]).norm() / meaning[name].norm()
            assert error < 0.04


def test_upcast_fp8_is_told(tmp_path, caplog):
    state, names = load_file(NANO_DIT), {name for name, _ in block_linears(load("nano-video").dit)}
    made = {
        name: tensor.to(torch.float8_e4m3fn) if name.removesuffix(".weight") in names else tensor
        for name, tensor in state.items()
    }
    save_file(made, tmp_path / "fp8.safetensors")
    files = replace(find_files("nano-video"), dit=tmp_path / "fp8.safetensors")
    from kandinsky5_core.loading import load_files

    load_files(files)
    assert "fp8 weights become torch.float32 in memory" in caplog.text
    caplog.clear()
    load_files(files, memory=MemoryOptions(weights="fp8"))
    assert "become" not in caplog.text


def test_other_quantised_files_are_refused(tmp_path):
    path, made, _ = fp8_file(tmp_path, "weight_scale")
    with pytest.raises(WeightsError, match="fp8_e4m3; expected fp32"):
        convert(path, tmp_path / "out.safetensors", layout="comfyui")
    name = quantised_names()[0].removesuffix("weight")
    save_file({**made, name + "weight_scale": torch.ones(64, 2)}, path)
    for kind in (None, "fp8"):
        with pytest.raises(WeightsError, match="expected 1 or a row"):
            load_dit(path) if kind is None else load_quantized_dit(path, kind)
    save_file({**made, name + "comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)}, path)
    with pytest.raises(WeightsError, match="says the weights are mxfp8"):
        load_dit(path)


# --- Qwen


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("nf4", 0.15)])
def test_qwen_in_fewer_bits_stays_near(kind, bound):
    plain = load("nano-edit").text_encoder
    encoder = load("nano-edit", memory=MemoryOptions(text_weights=kind)).text_encoder
    image = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    for task, images in (("t2i", None), ("i2i", [image])):
        expected, found = (
            each.encode(["make the circle red"], task=task, max_tokens=64, images=images) for each in (plain, encoder)
        )
        assert found.embeds.dtype == expected.embeds.dtype and torch.equal(found.pooled, expected.pooled)
        assert 0 < (found.embeds - expected.embeds).norm() / expected.embeds.norm() < bound
    layers = encoder.qwen.model.language_model.layers
    sizes = [_bytes(each.qwen.model.language_model.layers) for each in (plain, encoder)]
    assert sizes[1] < (0.4 if kind == "int8" else 0.25) * sizes[0]
    assert len(layers) == len(plain.qwen.model.language_model.layers)


def _bytes(module) -> int:
    parts = [getattr(p, name) for p in module.parameters() if hasattr(p, "qdata") for name in ("qdata", "scale")]
    plain = [p for p in module.parameters() if not hasattr(p, "qdata")]
    return sum(tensor.nbytes for tensor in (*parts, *plain))
