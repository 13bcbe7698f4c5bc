"""Conversion of weights between layouts, read back by us and by diffusers."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kandinsky5_core.config import VARIANTS, DiTConfig, VAEConfig
from kandinsky5_core.weights import convert as convert_module
from kandinsky5_core.weights.container import WeightsError, read_header
from kandinsky5_core.weights.convert import convert
from kandinsky5_core.weights.detect import inspect_file, inspect_tensors
from kandinsky5_core.weights.diffusers_config import diffusers_config
from kandinsky5_core.weights.hashing import model_hash
from kandinsky5_core.weights.modules import tensor_shapes

DIT = DiTConfig(
    model_dim=64, ff_dim=96, time_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12),
    in_text_dim=24, in_text_dim2=12,
)  # fmt: skip
# A square norm layer and a 1x1 convolution must not be mistaken for attention projections.
HUNYUAN = VAEConfig(
    kind="hunyuan", scaling_factor=0.7, block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=4,
    latent_channels=4,
)  # fmt: skip
FLUX = VAEConfig(
    kind="flux", scaling_factor=0.3611, block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=16,
    temporal_ratio=1,
)  # fmt: skip
CLASSES = {"hunyuan": AutoencoderKLHunyuanVideo, "flux": AutoencoderKL}


def random_state(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}


def write(config, path, **metadata):
    metadata["kandinsky5.config"] = json.dumps(dataclasses.asdict(config))
    state = random_state(config)
    save_file(state, path, metadata)
    return state


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shard_size", [None, 60_000])
def test_dit_to_a_folder_that_diffusers_loads(tmp_path, shard_size):
    state = write(DIT, tmp_path / "official.safetensors", trigger="a word")
    seen = []
    folder = convert(
        tmp_path / "official.safetensors", tmp_path / "folder", layout="diffusers", shard_size=shard_size,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    shards = sorted(folder.glob("*.safetensors"))
    assert (len(shards) > 2) == (shard_size is not None)
    assert seen[-1] == (sum(tensor.nbytes for tensor in state.values()),) * 2 and seen == sorted(seen)
    model, report = Kandinsky5Transformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert_equal(model.state_dict(), state)
    assert all(getattr(model.config, key) in (value, list(value) if isinstance(value, tuple) else value)
               for key, value in dataclasses.asdict(DIT).items())  # fmt: skip
    info = inspect_file(folder)
    assert (info.layout, info.sharded, info.config) == ("diffusers", shard_size is not None, DIT)
    assert info.metadata["trigger"] == "a word" and info.metadata["kandinsky5.converted_from"] == "official"
    back = convert(folder, tmp_path / "back.safetensors", layout="official")
    assert_equal(load_file(back), state)


def test_dit_with_comfyui_prefix_and_back(tmp_path):
    state = write(DIT, tmp_path / "official.safetensors")
    comfy = convert(tmp_path / "official.safetensors", tmp_path / "comfy.safetensors", layout="comfyui")
    assert_equal(load_file(comfy), {"model.diffusion_model." + name: tensor for name, tensor in state.items()})
    assert inspect_file(comfy).layout == "comfyui"
    assert model_hash(comfy) == model_hash(tmp_path / "official.safetensors")
    back = convert(comfy, tmp_path / "back.safetensors", layout="official", dtype=torch.bfloat16)
    assert_equal(load_file(back), {name: tensor.bfloat16() for name, tensor in state.items()})


@pytest.mark.parametrize(("config", "single"), [(HUNYUAN, "comfyui"), (FLUX, "bfl")], ids=["hunyuan", "flux"])
def test_vae_round_trip_and_diffusers(tmp_path, config, single):
    state = write(config, tmp_path / "vae.safetensors")
    file = convert(tmp_path / "vae.safetensors", tmp_path / "single.safetensors", layout=single)
    names = load_file(file)
    ones = (1,) * (3 if config.kind == "hunyuan" else 2)
    assert names["decoder.mid.attn_1.q.weight"].shape == (config.block_out_channels[-1],) * 2 + ones
    assert not any("blocks" in name or "attentions" in name for name in names)
    assert inspect_file(file).layout == single
    folder = convert(file, tmp_path / "folder", layout="diffusers")
    model, report = CLASSES[config.kind].from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert_equal(model.state_dict(), state)
    assert model.config.scaling_factor == config.scaling_factor
    assert model.config.norm_num_groups == config.norm_num_groups
    assert inspect_file(folder).config == inspect_file(file).config == config
    frames = (1, 3, 1, 16, 16) if config.kind == "hunyuan" else (1, 3, 16, 16)
    assert model.encode(torch.zeros(frames)).latent_dist.mean.shape[-1] == 16 // config.spatial_ratio


def test_tencent_single_file_has_our_names(tmp_path):
    state = write(HUNYUAN, tmp_path / "vae.safetensors")
    comfy = convert(tmp_path / "vae.safetensors", tmp_path / "comfy.safetensors", layout="comfyui")
    assert_equal(load_file(convert(comfy, tmp_path / "tencent.safetensors", layout="tencent")), state)


def test_a_vae_is_taken_out_of_a_whole_checkpoint(tmp_path):
    dit, vae = random_state(DIT), random_state(FLUX)
    tensors = {"model.diffusion_model." + k: v for k, v in dit.items()} | {"vae." + k: v for k, v in vae.items()}
    save_file(tensors, tmp_path / "all.safetensors")
    file = convert(tmp_path / "all.safetensors", tmp_path / "vae.safetensors", layout="bfl", want="vae")
    assert inspect_file(file).num_tensors == len(vae)
    file = convert(tmp_path / "all.safetensors", tmp_path / "dit.safetensors", layout="official")
    assert_equal(load_file(file), dit)


def test_released_variant_gets_its_attention_fields():
    row = VARIANTS["lite-t2v-10s-sft"]
    tensors = {name: (shape, "BF16") for name, shape in tensor_shapes(row.dit).items()}
    values = diffusers_config(inspect_tensors(tensors, name=f"{row.files[0]}.safetensors"))
    assert values["attention_type"] == "nabla" and values["attention_P"] == 0.9
    assert (values["attention_wT"], values["attention_wH"], values["attention_wW"]) == (11, 3, 3)
    with torch.device("meta"):
        model = Kandinsky5Transformer3DModel.from_config(values)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == tensor_shapes(row.dit)


def test_variant_goes_into_metadata_only_where_it_is_known(tmp_path):
    info = inspect_tensors(
        {name: (shape, "BF16") for name, shape in tensor_shapes(VARIANTS["lite-i2v-5s"].dit).items()}
    )
    assert "kandinsky5.variant" not in convert_module._metadata(info)
    known = dataclasses.replace(info, variant="lite-i2v-5s", variant_certain=True)
    assert convert_module._metadata(known)["kandinsky5.variant"] == "lite-i2v-5s"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_an_interruption_leaves_nothing_behind(tmp_path, error, layout):
    source = tmp_path / "source.safetensors"
    write(DIT, source)
    target = tmp_path / ("target.safetensors" if layout == "official" else "target")
    if layout == "official":
        target.write_bytes(b"what was there")

    def interrupt(done, total):
        if done > total // 2:
            raise error

    with pytest.raises(error):
        convert(source, target, layout=layout, shard_size=None, overwrite=True, on_progress=interrupt)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (["source.safetensors", "target.safetensors"] if layout == "official" else ["source.safetensors"])
    assert layout != "official" or target.read_bytes() == b"what was there"


def test_targets_that_are_refused(tmp_path, monkeypatch):
    source = tmp_path / "source.safetensors"
    write(DIT, source)
    before = source.read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    os.link(source, tmp_path / "linked.safetensors")
    (tmp_path / "symbolic.safetensors").symlink_to(source)
    refused = [
        (source, "official", True, "is the source"),
        (tmp_path / "symbolic.safetensors", "official", True, "is the source"),
        (other, "official", False, "exists"),
        (tmp_path / "model.bin", "official", False, r"ends in .safetensors"),
        (tmp_path / "new.safetensors", "diffusers", False, "is a folder"),
        (tmp_path, "diffusers", True, "is the source or holds it"),
        (tmp_path / "full", "diffusers", True, "something in it"),
        (tmp_path / "absent" / "new.safetensors", "official", False, "folder does not exist"),
        (tmp_path / "new.safetensors", "bfl", False, "use official, diffusers, comfyui"),
    ]
    for target, layout, overwrite, words in refused:
        with pytest.raises(WeightsError, match=words):
            convert(source, target, layout=layout, overwrite=overwrite)
    with pytest.raises(WeightsError, match=r"dtype torch\.int8"):
        convert(source, tmp_path / "new.safetensors", layout="official", dtype=torch.int8)
    with pytest.raises(WeightsError, match="shard_size 5"):
        convert(source, tmp_path / "new.safetensors", layout="official", shard_size=5)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WeightsError, match=r"needs 0\.8 MB, its disk has 0\.0 MB free"):
        convert(source, tmp_path / "new.safetensors", layout="official")
    assert source.read_bytes() == before and not (tmp_path / "new.safetensors").exists()


def test_overwriting_a_hard_link_of_the_source_keeps_the_source(tmp_path):
    source, linked = tmp_path / "source.safetensors", tmp_path / "linked.safetensors"
    state = write(DIT, source)
    os.link(source, linked)
    convert(source, linked, layout="comfyui", overwrite=True)
    assert_equal(load_file(source), state)
    assert inspect_file(linked).prefix == "model.diffusion_model."


def test_mixed_dtypes_stay_aligned_and_readable(tmp_path):
    """Two shards, the first ending in a bf16 tensor of an odd count, the second starting with fp32."""
    state = random_state(dataclasses.replace(DIT, time_dim=33))
    state["time_embeddings.in_layer.bias"] = state["time_embeddings.in_layer.bias"].bfloat16()
    weight_map = {name: "a.safetensors" if name.startswith("time") else "b.safetensors" for name in state}
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({name: tensor for name, tensor in state.items() if weight_map[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    file = convert(index, tmp_path / "new.safetensors", layout="comfyui")
    assert_equal(load_file(file), {"model.diffusion_model." + name: tensor for name, tensor in state.items()})
    assert inspect_file(file).dtypes == ("fp32", "bf16")
    assert all(record.begin % 4 == 0 for record in read_header(file)[0].values())
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "pt"


PEAK_SCRIPT = """
import re, sys
from pathlib import Path
import torch
from kandinsky5_core.weights import convert as module
from kandinsky5_core.weights.container import read_header

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

tensors, _ = read_header(Path(sys.argv[1]))
plan = [module._Planned(name, record.shape, "BF16", record) for name, record in tensors.items()]
small = [module._Planned("a", (1,), "BF16", plan[0].record._replace(shape=(1,)))]
with open(sys.argv[2], "wb") as file:
    module._write_tensors(file, small, {}, module._Progress(None, 2))
before = status("VmRSS")
with open(sys.argv[2], "wb") as file:
    module._write_tensors(file, plan, {}, module._Progress(None, 1))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_conversion_holds_a_few_megabytes(tmp_path):
    tensor = torch.randn(4096, 4096)
    save_file({f"{i}": tensor + i for i in range(3)}, tmp_path / "large.safetensors")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PEAK_SCRIPT, str(tmp_path / "large.safetensors"), str(tmp_path / "out")]
    kilobytes = int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)
    assert kilobytes < 0.9 * tensor.nbytes / 1024  # not even one tensor of the three
    assert torch.equal(load_file(tmp_path / "out")["2"], (tensor + 2).bfloat16())
