"""Weights of our MODEL in eight bits inside ComfyUI (see in_comfyui.py)."""

import importlib

import torch

PROMPT = "a big red circle moves left on a black background"
ENDS = (("scale_weight", "scaled_fp8"), ("weight_scale", None))


def module(name, path):
    return importlib.import_module(f"{name}.{path}")


def sampled(model, conditioning):
    import nodes

    latent = {"samples": torch.zeros(1, 16, 5, 8, 8)}
    (made,) = nodes.KSampler().sample(model, 7, 8, 3.0, "euler", "simple", *conditioning, latent)
    return made["samples"]


def conditioning_of(name, files):
    import nodes

    clip = module(name, "nodes.bridge.clip").load_clip(files.text_encoder, files.clip, "video", bundled=True)
    return [nodes.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPT, "")]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def quantised(model):
    from comfy.quant_ops import QuantizedTensor

    weights = dict(model.model.diffusion_model.named_parameters())
    return {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedTensor)}


def check_choices_of_our_loader(name, folder):
    """The loader's choices: blocks in eight bits, near the fp32 result, and a LoRA works on them."""
    load, files = module(name, "nodes.load"), module(name, "nodes.bridge.folders").built_in("built-in: nano-video")
    conditioning = conditioning_of(name, files)
    plain, _, _ = load.open_dit("built-in: nano-video", "auto", "fp32")
    expected = sampled(plain, conditioning)
    layer = "visual_transformer_blocks.1.feed_forward.in_layer.weight"
    bounds = {"fp8_e4m3fn": 0.15, "fp8_e4m3fn_fast": 0.15, "fp8_e5m2": 0.3, "int8": 0.05, "int8_fast": 0.1}
    for choice, bound in bounds.items():
        model, _, _ = load.open_dit("built-in: nano-video", "auto", choice)
        found = sampled(model, conditioning)
        print(choice, error(found, expected))
        assert 0 < error(found, expected) < bound
        names = quantised(model)
        assert layer in names and not any("modulation" in name or "embeddings" in name for name in names)
        assert model.model_size() < 0.75 * plain.model_size()
        delta = torch.randn(plain.model.state_dict()[f"diffusion_model.{layer}"].shape) * 0.15
        pair = []
        for some in (plain, model):
            patched = some.clone()
            patched.add_patches({f"diffusion_model.{layer}": ("diff", (delta,))}, 1.0)
            pair.append(sampled(patched, conditioning))
        print("with LoRA", error(pair[1], pair[0]), error(pair[0], expected))
        assert error(pair[1], pair[0]) < 0.7 * error(pair[0], expected)
        assert torch.equal(sampled(model, conditioning), found)


def check_fp8_files(name, folder):
    """Scaled and plainly cast files are loaded as they are, and dequantised where another dtype is asked for."""
    from safetensors.torch import load_file, save_file

    files = module(name, "nodes.bridge.folders").built_in("built-in: nano-video")
    load_model, is_block = module(name, "nodes.bridge.model").load_model, module(
        name, "kandinsky5_core.memory.quantized"
    ).is_block_weight
    state, conditioning = load_file(files.dit), conditioning_of(name, files)
    for end, mark in (*ENDS, (None, None)):
        made = {} if mark is None else {mark: torch.empty(0, dtype=torch.float8_e4m3fn)}
        for key, weight in state.items():
            made[key] = weight.contiguous()
            if is_block(key, tuple(weight.shape)):
                scale = torch.tensor(1.0) if end is None else weight.float().abs().max() / 448
                made[key] = (weight.float() / scale).to(torch.float8_e4m3fn)
                if end is not None:
                    made[key.removesuffix("weight") + end] = scale
        path = folder / f"{end}.safetensors"
        save_file(made, path)
        kept = load_model(path, files.variant)
        wide = load_model(path, files.variant, torch.float32)
        for key, weight in quantised(kept).items():
            scale = made.get(f"{key.removesuffix('weight')}{end}", torch.tensor(1.0))
            assert torch.allclose(weight.dequantize().float(), made[key].float() * scale, rtol=1e-6)
        assert len(quantised(kept)) == sum(is_block(key, tuple(weight.shape)) for key, weight in state.items())
        assert not quantised(wide)
        # Rotary embeddings are rounded to bf16, so one different bit grows to a thousandth.
        alike = load_model(path, files.variant, kept.model.diffusion_model.dtype)
        assert error(sampled(kept, conditioning), sampled(alike, conditioning)) < 1e-2


def check_int8_files(name, folder):
    """What ComfyUI saves of an int8 model loads as it is, and is dequantised on request."""
    from safetensors.torch import load_file, save_file

    files = module(name, "nodes.bridge.folders").built_in("built-in: nano-video")
    load_model, conditioning = module(name, "nodes.bridge.model").load_model, conditioning_of(name, files)
    made = load_model(files.dit, files.variant, torch.int8)
    state = made.model.diffusion_model.state_dict()
    save_file({key: part.contiguous() for key, part in state.items()}, folder / "int8.safetensors")
    stored = load_file(folder / "int8.safetensors")
    layer = "visual_transformer_blocks.1.feed_forward.in_layer."
    assert stored[f"{layer}weight"].dtype == torch.int8
    assert stored[f"{layer}weight_scale"].shape == (stored[f"{layer}weight"].shape[0], 1)
    kept, wide = (load_model(folder / "int8.safetensors", files.variant, dtype) for dtype in (None, torch.float32))
    assert quantised(kept).keys() == quantised(made).keys() and not quantised(wide)
    weights, rest = quantised(kept), dict(kept.model.diffusion_model.named_parameters())
    for key, weight in made.model.diffusion_model.named_parameters():
        assert torch.equal(weight.dequantize(), weights[key].dequantize()) if key in weights else torch.equal(weight, rest[key])
    # Sums of products depend on where in memory the weights begin, and one different bit grows to a thousandth.
    expected = sampled(made, conditioning)
    for some in (kept, wide):
        assert error(sampled(some, conditioning), expected) < 1e-2
    # The rows may also be rotated, which the core does not undo.
    mark = torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}'), dtype=torch.uint8)
    save_file({**stored, f"{layer}comfy_quant": mark}, folder / "rotated.safetensors")
    try:
        load_model(folder / "rotated.safetensors", files.variant)
    except ValueError as problem:
        assert "convrot" in str(problem)
    else:
        raise AssertionError("rotated rows were taken for plain ones")
