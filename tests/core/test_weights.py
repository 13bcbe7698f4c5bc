"""Detection, refusal, loading and hashing of weights files."""

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path, PurePath

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel
from safetensors.torch import load_file, save_file

from kandinsky5_core.config import (
    FLUX_VAE,
    HUNYUAN_VAE,
    IMAGE_EDITING,
    IMAGE_LITE,
    NANO_VIDEO,
    NANO_VIDEO_VAE,
    VARIANTS,
    VIDEO_LITE,
    VIDEO_PRO,
    DiTConfig,
    VAEConfig,
)
from kandinsky5_core.weights.container import WeightsError, read_header
from kandinsky5_core.weights.detect import inspect_file, inspect_tensors
from kandinsky5_core.weights.hashing import model_hash
from kandinsky5_core.weights.keys import attention_as_convolution, vae_from_single, vae_to_single
from kandinsky5_core.weights.load import load_dit, load_state_into, load_vae
from kandinsky5_core.weights.modules import build_on_meta, tensor_shapes
from kandinsky5_core.weights.variants import choose_variant, matching_variants

TINY = DiTConfig(
    model_dim=64, ff_dim=96, time_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12),
    in_text_dim=24, in_text_dim2=12,
)  # fmt: skip
TINY_VAE = VAEConfig(
    kind="hunyuan", scaling_factor=0.476986, block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=4
)
TINY_FLUX = VAEConfig(
    kind="flux", scaling_factor=0.3611, block_out_channels=(32, 64, 64), layers_per_block=2, temporal_ratio=1
)


@functools.cache
def reference_dit(config):
    fields = dataclasses.asdict(config)
    with torch.device("meta"):
        return Kandinsky5Transformer3DModel(**fields)


def reference_vae(config):
    count = len(config.block_out_channels)
    fields = dict(
        latent_channels=config.latent_channels, block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block, norm_num_groups=config.norm_num_groups,
    )  # fmt: skip
    with torch.device("meta"):
        if config.kind == "hunyuan":
            return AutoencoderKLHunyuanVideo(
                **fields, spatial_compression_ratio=config.spatial_ratio,
                temporal_compression_ratio=config.temporal_ratio,
                down_block_types=("HunyuanVideoDownBlock3D",) * count,
                up_block_types=("HunyuanVideoUpBlock3D",) * count,
            )  # fmt: skip
        return AutoencoderKL(
            **fields, use_quant_conv=False, use_post_quant_conv=False,
            down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count,
        )  # fmt: skip


def shapes_of(module, dtype="BF16"):
    return {name: (tuple(tensor.shape), dtype) for name, tensor in module.state_dict().items()}


def random_state(config, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in tensor_shapes(config).items()
    }  # fmt: skip


def as_single(state, config):
    """The same VAE tensors in the BFL / ComfyUI layout."""
    levels, dims = len(config.block_out_channels), 3 if config.kind == "hunyuan" else 2
    return {
        vae_to_single(name, levels): tensor.reshape(attention_as_convolution(name, tuple(tensor.shape), dims))
        for name, tensor in state.items()
    }


def save_shards(state, folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    weight_map = {}
    for i in range(count):
        shard = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: state[name] for name in names[i::count]}, folder / shard)
        weight_map |= dict.fromkeys(names[i::count], shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def assert_same(module, state, dtype=None):
    loaded = module.state_dict()
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        expected = tensor.to(dtype or tensor.dtype)
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name], expected), name


# Released sizes -----------------------------------------------------------------------------------------------------

RELEASED = {
    "lite-t2v-5s-sft": (VIDEO_LITE, 2_007_702_848, 814),
    "image-lite-t2i-sft": (IMAGE_LITE, 6_022_080_576, 1246),
    "image-lite-i2i-sft": (IMAGE_EDITING, 6_022_254_656, 1246),
    "pro-t2v-5s-sft": (VIDEO_PRO, 19_311_325_248, 1514),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_recognised_from_shapes_alone(name):
    config, num_parameters, num_tensors = RELEASED[name]
    reference = shapes_of(reference_dit(config))
    info = inspect_tensors(reference)
    assert (info.kind, info.config, info.variant) == ("dit", config, name)
    assert (info.num_parameters, info.num_tensors) == (num_parameters, num_tensors)
    assert info.variants == tuple(row.name for row in VARIANTS.values() if row.dit == config)
    assert {key: shape for key, (shape, _) in reference.items()} == tensor_shapes(config)


def test_nano_is_recognised():
    info = inspect_tensors(shapes_of(reference_dit(NANO_VIDEO)))
    assert (info.config, info.variant, info.variant_certain) == (NANO_VIDEO, "nano-video", True)
    info = inspect_tensors(shapes_of(reference_vae(NANO_VIDEO_VAE)))
    assert info.config == NANO_VIDEO_VAE and info.variants == ("nano-video",)


@pytest.mark.parametrize("config", [HUNYUAN_VAE, FLUX_VAE], ids=["hunyuan", "flux"])
def test_released_vaes_are_recognised_in_both_layouts(config):
    reference = reference_vae(config).state_dict()
    for state in (reference, as_single(reference, config)):
        for prefix in ("", "vae.", "first_stage_model."):
            info = inspect_tensors({prefix + k: (tuple(v.shape), "F16") for k, v in state.items()})
            assert info.kind == f"{config.kind}_vae" and info.config == config and info.dtypes == ("fp16",)
    single = "comfyui" if config.kind == "hunyuan" else "bfl"
    assert (info.layout == single and "lite-t2v-5s-sft" in info.variants) or "image-lite-t2i-sft" in info.variants


def test_single_file_vae_names():
    """Spelled-out names of the published single files."""
    pairs = {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight": "encoder.down.1.block.0.nin_shortcut.conv.weight",
        "encoder.down_blocks.2.downsamplers.0.conv.conv.bias": "encoder.down.2.downsample.conv.conv.bias",
        "decoder.up_blocks.0.resnets.2.norm1.weight": "decoder.up.3.block.2.norm1.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.conv.weight": "decoder.up.1.upsample.conv.conv.weight",
        "decoder.mid_block.resnets.1.conv2.conv.bias": "decoder.mid.block_2.conv2.conv.bias",
        "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
        "encoder.mid_block.attentions.0.group_norm.bias": "encoder.mid.attn_1.norm.bias",
        "decoder.conv_norm_out.weight": "decoder.norm_out.weight",
        "decoder.conv_in.conv.weight": "decoder.conv_in.conv.weight",
        "quant_conv.weight": "quant_conv.weight",
    }
    for ours, single in pairs.items():
        assert vae_to_single(ours, 4) == single
        assert vae_from_single(single, 4) == ours
    assert vae_to_single("decoder.up_blocks.0.resnets.0.conv1.weight", 3) == "decoder.up.2.block.0.conv1.weight"


@pytest.mark.parametrize("seed", range(6))
def test_arbitrary_dit_sizes_are_deduced(seed):
    pick = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=pick))  # noqa: E731
    head_dim = 16 * draw(1, 9)
    channels = draw(1, 20)
    config = DiTConfig(
        model_dim=head_dim * draw(1, 5), ff_dim=draw(3, 900), time_dim=draw(3, 200),
        num_text_blocks=draw(1, 4), num_visual_blocks=draw(1, 13),
        axes_dims=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
        in_visual_dim=channels, out_visual_dim=channels, in_text_dim=draw(2, 99), in_text_dim2=draw(2, 99),
        visual_cond=bool(seed % 2),
    )  # fmt: skip
    assert inspect_tensors(shapes_of(reference_dit(config))).config == config


# Variants of the same sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in VARIANTS.values() if row.files], ids=lambda row: row.name)
def test_file_names_break_ties(row):
    rows = matching_variants(row.dit)
    plain = choose_variant(rows, {}, None, PurePath(f"models/{row.files[0]}.safetensors"))
    assert VARIANTS[plain.name].files == row.files and plain.certain
    folder = row.repo.split("/")[1] + "-Diffusers" + ("-hd" if "hd" in row.name else "")
    named = choose_variant(rows, {}, None, PurePath(f"{folder}/transformer/diffusion_pytorch_model.safetensors"))
    assert named.name == row.name


def test_metadata_beats_names_and_wrong_claims_are_ignored(caplog):
    tensors = shapes_of(reference_dit(VIDEO_LITE))
    name = "kandinsky5lite_t2v_sft_10s.safetensors"
    info = inspect_tensors(tensors, name=name, metadata={"kandinsky5.variant": "lite-i2v-5s"})
    assert info.variant == "lite-i2v-5s" and info.variant_certain
    with caplog.at_level("WARNING"):
        info = inspect_tensors(tensors, name=name, metadata={"kandinsky5.variant": "pro-t2v-5s-sft"})
    assert info.variant == "lite-t2v-10s-sft" and "pro-t2v-5s-sft" in caplog.text


def test_attention_keys_of_config_json_break_ties():
    tensors = shapes_of(reference_dit(VIDEO_PRO))
    hd = inspect_tensors(tensors, folder_config={"attention_type": "nabla", "attention_P": 0.7, "attention_wT": 11})
    assert hd.variant == "pro-t2v-10s-sft-hd" and "config.json" in hd.variant_reason
    dense = inspect_tensors(tensors, folder_config={"attention_type": "regular"})
    assert VARIANTS[dense.variant].nabla is None and not dense.variant_certain


def test_shapes_win_over_a_contradicting_config_json(caplog):
    with caplog.at_level("WARNING"):
        info = inspect_tensors(shapes_of(reference_dit(TINY)), folder_config={"model_dim": 1792, "ff_dim": 96})
    assert info.config == TINY and "model_dim=1792" in caplog.text and "ff_dim" not in caplog.text


# What is not ours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("Wan video", ["blocks.0.cross_attn.k.weight", "text_embedding.0.weight", "patch_embedding.weight"]),
        ("HunyuanVideo transformer", ["double_blocks.0.img_attn_qkv.weight", "img_in.proj.weight"]),
        ("FLUX transformer", ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"]),
        ("Stable Diffusion UNet", ["model.diffusion_model.input_blocks.0.0.weight"]),
        ("SDXL", ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"]),
        ("Kandinsky 6", ["visual_transformer_blocks.0.a", "time_embeddings.timestep_embedder.linear_1.weight"]),
        ("Stable Diffusion VAE", ["decoder.conv_in.weight", "encoder.conv_in.weight", "quant_conv.weight"]),
        ("none of the known models", ["layer.weight"]),
    ],
)
def test_foreign_files_are_named_and_refused(tmp_path, words, names):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(4, 4) for name in names}, path)
    assert words in inspect_file(path).looks_like and inspect_file(path).kind == "unknown"
    for load in (load_dit, load_vae):
        with pytest.raises(WeightsError, match=f"{words}.*expected a"):
            load(path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("lora", "transformer.visual_transformer_blocks.0.self_attention.to_query.lora_A.weight"),
        ("lora", "lora_unet_visual_transformer_blocks_0_self_attention_to_query.lora_down.weight"),
        ("qwen", "model.layers.0.self_attn.q_proj.bias"),
        ("clip", "text_model.encoder.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_other_parts_of_the_pipeline_are_recognised(kind, name):
    assert inspect_tensors({name: ((4, 4), "F16")}).kind == kind


def test_not_safetensors_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="pickled PyTorch checkpoint"):
        inspect_file(path)
    for content, words in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "GGUF"),
        (b"", "empty"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all", "malformed"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=words):
            inspect_file(path)
    with pytest.raises(WeightsError, match="no such file"):
        inspect_file(tmp_path / "absent.safetensors")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(random_state(TINY), path)
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 200, 12):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match="truncated"):
            inspect_file(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(WeightsError, match="4 bytes follow"):
        inspect_file(path)
    for old, new in ((b'"F32"', b'"F99"'), (b"[0,", b"[4,"), (b'"shape":[', b'"shape":{')):
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(WeightsError, match=r"malformed|gap"):
            inspect_file(path)


def test_headers_with_random_damage_are_refused_or_read(tmp_path):
    """Nothing but a WeightsError comes out of a damaged header."""
    path = tmp_path / "model.safetensors"
    save_file({"visual_embeddings.in_layer.weight": torch.zeros(4, 8), "b": torch.zeros(2)}, path, {"format": "pt"})
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for place in torch.randint(0, length, (3,), generator=generator).tolist():
            damaged[place] = b'0159-{}[],:"ax\x00\xff'[int(torch.randint(0, 16, (), generator=generator))]
        path.write_bytes(damaged)
        try:
            inspect_file(path)
        except WeightsError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state.pop("visual_transformer_blocks.1.feed_forward.in_layer.weight"), "1 tensors are missing"),
        (lambda state: state.pop("visual_embeddings.in_layer.bias"), "'visual_embeddings.in_layer.bias' is missing"),
        (lambda state: state.update({"stray": torch.zeros(1)}), r"1 tensors do not belong \(stray\)"),
        (
            lambda state: state.update({"text_embeddings.norm.weight": torch.zeros(3)}),
            r"text_embeddings.norm.weight is \(3,\), expected \(64,\)",
        ),
        (lambda state: state.update(random_state(TINY_VAE)), "do not belong.*like a HunyuanVideo VAE"),
        (lambda state: state.update({"vae." + k: v for k, v in random_state(TINY_VAE).items()}), "also holds"),
        (
            lambda state: state.update({"visual_embeddings.in_layer.weight": torch.zeros(64, 4 * 20)}),
            "20 channels for 16",
        ),
        (lambda state: state.update({"text_embeddings.in_layer.weight_scale_2": torch.zeros(2)}), "quantised"),
        (lambda state: state.update({"text_embeddings.in_layer.weight_scale": torch.ones(1)}), "not an fp8 tensor"),
        (
            lambda state: state.update({"visual_transformer_blocks.999999999.x": torch.zeros(1)}),
            "24 tensors are missing .*visual_transformer_blocks.999999999.x",
        ),
    ],
)
def test_mixed_and_incomplete_dits_are_refused(tmp_path, damage, words):
    state = random_state(TINY)
    damage(state)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError, match=f"Kandinsky 5 DiT, but.*{words}"):
        inspect_file(path)


def test_a_whole_checkpoint_holds_two_models(tmp_path):
    dit, vae = random_state(TINY), random_state(TINY_VAE)
    path = tmp_path / "all.safetensors"
    save_file({"model.diffusion_model." + k: v for k, v in dit.items()} | {"vae." + k: v for k, v in vae.items()}, path)
    model, info = load_dit(path)
    assert_same(model, dit)
    assert (info.layout, info.prefix) == ("comfyui", "model.diffusion_model.")
    model, info = load_vae(path)
    assert_same(model, vae)
    assert (info.kind, info.prefix) == ("hunyuan_vae", "vae.")


def test_an_index_cannot_reach_outside_its_folder(tmp_path):
    index = save_shards(random_state(TINY), tmp_path / "model")
    values = json.loads(index.read_text())
    first = next(iter(values["weight_map"]))
    outside = tmp_path / "outside.safetensors"
    save_file({first: torch.zeros(1)}, outside)
    for name in ("../outside.safetensors", str(outside), "..\\outside.safetensors", "C:\\outside.safetensors", ".."):
        values["weight_map"][first] = name
        index.write_text(json.dumps(values))
        with pytest.raises(WeightsError, match="not a file of its own folder"):
            inspect_file(index)
    values["weight_map"][first] = "absent.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"absent.safetensors: shard is missing"):
        inspect_file(tmp_path / "model")


def test_missing_and_foreign_shards_are_refused(tmp_path):
    index = save_shards(random_state(TINY), tmp_path)
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    with pytest.raises(WeightsError, match="one shard: name its folder"):
        load_dit(shard)
    save_file({"foreign": torch.zeros(3)}, shard)
    with pytest.raises(WeightsError, match="shards of two models"):
        inspect_file(index)
    shard.unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00003.safetensors: shard is missing"):
        inspect_file(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no .safetensors file.*model.ckpt"):
        inspect_file(tmp_path)
    for name in ("a", "b"):
        save_file(random_state(TINY), tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"2 candidates \(a.safetensors, b.safetensors\)"):
        inspect_file(tmp_path)


# Loading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_dit_loads_bit_exact_in_every_dtype(tmp_path, stored, dtype):
    state = random_state(TINY, dtype=stored)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    model, info = load_dit(path, dtype=dtype)
    assert_same(model, state, dtype)
    words = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    assert info.layout == "official" and info.dtypes == (words[stored],)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_every_way_of_storing_a_dit_loads(tmp_path):
    state = random_state(TINY, seed=3)
    save_file({"diffusion_model." + k: v for k, v in state.items()}, tmp_path / "comfy.safetensors")
    index = save_shards(state, tmp_path / "pipeline" / "transformer")
    fields = dataclasses.asdict(TINY) | {"_class_name": "Kandinsky5Transformer3DModel", "attention_type": "regular"}
    (index.parent / "config.json").write_text(json.dumps(fields))
    (tmp_path / "nano").mkdir()
    save_file(state, tmp_path / "nano" / "dit.safetensors")
    save_file(random_state(TINY_VAE), tmp_path / "nano" / "vae.safetensors")
    (tmp_path / "official" / "model").mkdir(parents=True)
    save_file(state, tmp_path / "official" / "model" / "kandinsky5lite.safetensors")
    expected = {
        "comfy.safetensors": "comfyui", "pipeline": "diffusers", "pipeline/transformer": "diffusers",
        "nano": "official", "official": "official", str(index.relative_to(tmp_path)): "diffusers",
    }  # fmt: skip
    for name, layout in expected.items():
        model, info = load_dit(tmp_path / name)
        assert_same(model, state)
        assert (info.layout, info.sharded) == (layout, "pipeline" in name), name
    assert_same(load_vae(tmp_path / "nano")[0], random_state(TINY_VAE))


@pytest.mark.parametrize("config", [TINY_VAE, TINY_FLUX], ids=["hunyuan", "flux"])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_vaes_load_from_both_layouts(tmp_path, config, prefix):
    state = random_state(config, seed=5)
    assert set(state) == set(reference_vae(config).state_dict())
    for name, tensors in (("diffusers", state), ("single", as_single(state, config))):
        path = tmp_path / f"{name}.safetensors"
        save_file({prefix + key: value for key, value in tensors.items()}, path)
        model, info = load_vae(path)
        assert_same(model, state)
        assert info.config == config and model.config == config


def test_what_shapes_cannot_tell_about_a_vae_comes_from_config_or_is_refused(tmp_path):
    config = dataclasses.replace(TINY_VAE, block_out_channels=(8, 16, 24), norm_num_groups=4, scaling_factor=0.7)
    path = tmp_path / "vae.safetensors"
    save_file(random_state(config), path)
    with pytest.raises(WeightsError, match=r"norm groups.*norm_num_groups in config.json"):
        load_vae(path)
    save_file(random_state(config), path, {"kandinsky5.config": json.dumps(dataclasses.asdict(config))})
    assert load_vae(path)[1].config == config
    save_file(random_state(config), path)
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 4, "scaling_factor": 0.7}))
    assert load_vae(path)[1].config == config
    for wrong in (0, "4", [4], None):
        (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": wrong}))
        with pytest.raises(WeightsError, match=r"norm_num_groups.*positive int"):
            load_vae(path)


def test_changing_loaded_weights_leaves_the_file_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(random_state(TINY), path)
    before = path.read_bytes()
    model, _ = load_dit(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert path.read_bytes() == before
    assert_same(load_dit(path)[0], random_state(TINY))


def test_odd_offsets_and_empty_tensors_load(tmp_path):
    """A file whose float32 data starts at an odd byte, with a tensor of no elements beside it."""
    data = torch.arange(6, dtype=torch.float32)
    entries = {
        "flag": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]},
        "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }
    raw = json.dumps(entries).encode()
    raw += b" " * (1 - len(raw) % 2)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data.numpy().tobytes())
    assert read_header(path)[0]["weight"].begin % 4

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(2, 3))
            self.flag = torch.nn.Parameter(torch.empty(0))

    for dtype in (None, torch.float64):
        assert torch.equal(load_state_into(Holder, path, dtype=dtype).weight.float(), data.view(2, 3))


def test_load_state_into_maps_names_and_keeps_computed_buffers(tmp_path):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.register_buffer("table", torch.arange(4.0).cos(), persistent=False)

    state = {"x.weight": torch.randn(2, 3), "x.bias": torch.randn(2), "unused": torch.zeros(1)}
    path = tmp_path / "layer.safetensors"
    save_file(state, path)
    keymap = lambda name: name.replace("x.", "layer.") if name != "unused" else None  # noqa: E731
    module = load_state_into(Holder, path, keymap=keymap)
    assert torch.equal(module.layer.weight, state["x.weight"]) and module.layer.weight.requires_grad
    assert torch.equal(module.table, torch.arange(4.0).cos())
    with pytest.raises(WeightsError, match=r"2 tensors are missing .*3 tensors do not belong"):
        load_state_into(Holder, path)
    with pytest.raises(WeightsError, match=r"layer.weight is \(2, 3\), expected \(2, 5\)"):
        load_state_into(
            lambda: torch.nn.ModuleDict({"layer": torch.nn.Linear(5, 2)}), path, keymap=keymap
        )  # fmt: skip
    assert all(parameter.is_meta for parameter in build_on_meta(Holder).parameters())


PEAK_SCRIPT = """
import re, sys
from pathlib import Path, PurePath
import torch
from kandinsky5_core.weights.load import load_state_into

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def build(count):
    return torch.nn.ModuleList([torch.nn.Linear(2048, 2048, bias=False) for _ in range(count)])

count, dtype = int(sys.argv[2]), getattr(torch, sys.argv[3])
first_only = lambda name: name if name.startswith("0.") else None
load_state_into(lambda: build(1), sys.argv[1], dtype=dtype, keymap=first_only)
before = status("VmRSS")
module = load_state_into(lambda: build(count), sys.argv[1], dtype=dtype)
with torch.no_grad():
    for parameter in module.parameters():
        parameter.view(-1).view(torch.uint8)[::1024].sum()  # touches every page
weights = sum(parameter.nbytes for parameter in module.parameters())
print((max(status("VmHWM"), before) - before) / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")],
)
def test_peak_memory_of_loading(tmp_path, stored, dtype):
    """A file of 200 or 400 MB; the peak above the interpreter is within 1.15 of the weights in their target dtype."""
    count = 25
    tensor = torch.randn(2048, 2048).to(getattr(torch, stored))
    path = tmp_path / "model.safetensors"
    save_file({f"{i}.weight": tensor + i for i in range(count)}, path)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PEAK_SCRIPT, str(path), str(count), dtype]
    ratio = float(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.15


# Hash ---------------------------------------------------------------------------------------------------------------


def test_hash_is_of_the_tensors_bytes(tmp_path):
    state = random_state(TINY)
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert model_hash(path) == hashlib.sha256(data).hexdigest()[:16]
    prefixed = tmp_path / "b.safetensors"
    save_file({"diffusion_model." + k: v for k, v in state.items()}, prefixed, {"note": "other metadata"})
    assert model_hash(prefixed, length=64) == hashlib.sha256(data).hexdigest()
    state["out_layer.out_layer.bias"][0] += 1
    save_file(state, path)
    assert model_hash(path) != model_hash(prefixed)
    save_shards(state, tmp_path / "folder")
    digest = hashlib.sha256()
    for shard in sorted((tmp_path / "folder").glob("*.safetensors")):
        raw = shard.read_bytes()
        digest.update(raw[8 + int.from_bytes(raw[:8], "little") :])
    assert model_hash(tmp_path / "folder") == digest.hexdigest()[:16]
    assert load_file(path).keys() == state.keys()
