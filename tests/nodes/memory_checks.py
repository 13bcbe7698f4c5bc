"""Partial loading, block swap and text encoders in few bits inside ComfyUI (see in_comfyui.py)."""

import importlib
import shutil
import sys

import torch
from pretend_card import plug_in, without_values

PROMPT = "a big red circle moves left on a black background"
KINDS = ("video", "image")


def module(name, path):
    return importlib.import_module(f"{name}.{path}")


def built_in(name, kind):
    return module(name, "nodes.bridge.folders").built_in(f"built-in: nano-{kind}")


def load_clip(name, kind="video", text_weights="default", qwen=None):
    files = built_in(name, kind)
    load = module(name, "nodes.bridge.clip").load_clip
    return load(qwen or files.text_encoder, files.clip, kind, bundled=True, text_weights=text_weights)


def picture(size=112, seed=1):
    return torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed))


def uses_of(clip):
    """What every use of the encoders gives: a prompt, an edit that looks at a picture, and a written answer."""
    edit = clip.tokenize("make the circle blue", images=[picture()], task="i2i")
    given = (clip.tokenize(PROMPT), edit)
    found = [part for tokens in given for part in clip.encode_from_tokens(tokens, return_pooled=True)]
    write = importlib.import_module(f"{type(clip).__module__.removesuffix('bridge.clip')}text").written_out
    return found, write(clip, "a red circle", "t2v", 3, 0.0, 6, None)


def same_bits(first, second):
    return first[1] == second[1] and all(torch.equal(*pair) for pair in zip(first[0], second[0], strict=True))


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def held_at(patcher, share):
    """The weights as ComfyUI loads them where there is room for that share: it asks the patcher itself from then on."""
    load = type(patcher).partially_load

    def limited(device, extra_memory=0, force_patch_weights=False):
        room = int(patcher.model_size() * share) - patcher.loaded_size()
        return load(patcher, device, min(extra_memory, room), force_patch_weights)

    patcher.partially_load = limited


def waiting(patcher):
    """How many layers wait for their turn, and how many there are."""
    layers = [part for part in patcher.model.modules() if hasattr(part, "comfy_cast_weights")]
    return sum(hasattr(part, "prev_comfy_cast_weights") for part in layers), len(layers)


def check_default_equals_the_core(name, folder):
    """The built-in encoders: the bits that the core alone makes, for both families."""
    core = module(name, "kandinsky5_core.text.encoder")
    for kind in KINDS:
        files = built_in(name, kind)
        plain = core.load_text_encoder(files.text_encoder, files.clip, local_files_only=True, dtype=torch.float32)
        clip = load_clip(name, kind)
        task = {"video": "t2v", "image": "t2i"}[kind]
        expected = plain.encode([PROMPT], task=task, max_tokens=256).trimmed()
        embeds, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
        assert torch.equal(embeds, expected.embeds) and torch.equal(pooled, expected.pooled)
        if plain.qwen.model.visual is not None:
            expected = plain.encode(["make it blue"], task="i2i", max_tokens=512, images=[[picture()]]).trimmed()
            embeds = clip.encode_from_tokens(clip.tokenize("make it blue", images=[picture()], task="i2i"))
            assert torch.equal(embeds, expected.embeds)
        print(kind, "vision", plain.qwen.model.visual is not None)


def check_text_weights_may_lie_anywhere(name, folder):
    """With any share of the encoders on a card, what meets in a layer is on the card, and ends there."""
    card, clip = plug_in(), load_clip(name)
    clip.patcher.load_device, clip.patcher.pin_weight_to_device = card, lambda key: None
    model, qwen = clip.cond_stage_model, clip.encoder.qwen
    with without_values(model):
        for share in (0.0, 0.3, 0.7, 2.0, 0.0):
            move_part(clip.patcher, share)
            model.compute_on(card)
            places = {part.weight.device.type for part in model.modules() if hasattr(part, "comfy_cast_weights")}
            assert places == ({"cpu"} if share == 0 else {"cpu", "card"} if share < 1 else {"card"}), (share, places)
            assert clip.encoder.device == card == clip.encoder.pooled([PROMPT]).device
            ids = torch.zeros(1, 12, dtype=torch.long, device=card)
            assert qwen(input_ids=ids, use_cache=False).logits.device == card
            # In its own forward the windows of a picture follow from values, which are not there.
            patches = torch.zeros(64, qwen.config.vision_config.patch_size**2 * 6, device=card)
            tower = qwen.model.visual
            hidden = tower.patch_embed(patches)
            for block in tower.blocks:
                query, *_ = block.attn.qkv(block.norm1(hidden)).chunk(3, dim=-1)
                hidden = hidden + block.mlp(block.norm2(block.attn.proj(query)))
            assert tower.merger(hidden).device == card


def move_part(patcher, share):
    """As much of the weights on the card as the share allows."""
    room = int(patcher.model_size() * share)
    patcher.partially_load(patcher.load_device, room - patcher.loaded_size())


def check_text_in_parts(name, folder):
    """Any share loaded, with a LoRA or without: the bits of whole loading, for prompts, pictures and the enhancer."""
    for text_weights in ("default", "fp8", "int8"):
        clip = load_clip(name, "image", text_weights)
        plain = uses_of(clip)
        assert waiting(clip.patcher)[0] == 0
        names = dict(clip.cond_stage_model.named_parameters())
        ends = ("layers.1.mlp.up_proj.weight", "blocks.1.mlp.up_proj.weight", "fc1.weight", "norm1.weight")
        keys = [key for key in names if key.endswith(ends)]
        assert len(keys) >= 4
        torch.manual_seed(0)
        patches = {key: ("diff", (0.1 * torch.randn(names[key].shape),)) for key in keys}
        patched = clip.clone()
        patched.add_patches(patches, 1.0)
        expected = uses_of(patched)
        assert error(expected[0][0], plain[0][0]) > 1e-3
        for share in (0.0, 0.4, 0.8):
            for some, wanted in ((clip.clone(), plain), (patched.clone(), expected)):
                held_at(some.patcher, share)
                found = uses_of(some)
                count, total = waiting(some.patcher)
                assert 0 < count < total if share else count == total, (share, count, total)
                lossless = some.patcher.patches == {} or text_weights == "default"
                print(text_weights, share, count, total, error(found[0][0], wanted[0][0]), found[1] == wanted[1])
                # A LoRA on weights in eight bits is rounded into them where they are loaded, and not where they wait.
                assert same_bits(found, wanted) if lossless else error(found[0][0], wanted[0][0]) < 0.05
        assert same_bits(uses_of(clip), plain)


def quantised(clip):
    from comfy.quant_ops import QuantizedTensor

    return {key: part for key, part in clip.cond_stage_model.named_parameters() if isinstance(part, QuantizedTensor)}


def fp8_copy(name, folder, end, per_row=False, bare=False):
    """The built-in encoder with its linear layers in fp8, as ComfyUI's files have them, and how many those are."""
    from safetensors.torch import load_file, save_file

    source = built_in(name, "image").text_encoder
    shutil.copytree(source, folder / end)
    made, count = {}, 0
    for key, weight in load_file(source / "model.safetensors").items():
        made[key] = weight.contiguous()
        if key.endswith("weight") and weight.ndim == 2 and (".layers." in key or ".blocks." in key):
            scale = weight.float().abs().amax(1) / 448 if per_row else weight.float().abs().max() / 448
            made[key] = (weight.float() / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
            made[key.removesuffix("weight") + end] = scale
            count += 1
    if bare:
        ends = {"model.language_model.": "", "model.visual.": "visual."}
        for old, new in ends.items():
            made = {key.replace(old, new): part for key, part in made.items()}
    save_file(made, folder / end / "model.safetensors")
    return folder / end, count


def check_text_files_in_fp8(name, folder):
    """They stay in fp8 with their own scales, at most rounded where ComfyUI's layers are, and widen on request."""
    for end, per_row in (("scale_weight", False), ("weight_scale", True)):
        path, count = fp8_copy(name, folder, end, per_row, bare=per_row)
        kept, again = (load_clip(name, "image", weights, path) for weights in ("default", "fp8"))
        wide = load_clip(name, "image", "bf16", path)
        assert len(quantised(kept)) == len(quantised(again)) == count and not quantised(wide)
        assert kept.patcher.model_size() < 0.75 * load_clip(name, "image").patcher.model_size()
        core = module(name, "kandinsky5_core.text.encoder")
        files = built_in(name, "image")
        plain = core.load_text_encoder(path, files.clip, local_files_only=True, dtype=torch.float32)
        for key, weight in quantised(kept).items():
            expected = plain.qwen.get_parameter(key.removeprefix("qwen."))
            assert error(weight.dequantize(), expected) < (0.03 if per_row else 1e-6), key
        expected = plain.encode([PROMPT], task="t2i", max_tokens=512).trimmed().embeds
        found = kept.encode_from_tokens(kept.tokenize(PROMPT))
        print(end, "kept, to the widened core", error(found, expected))
        assert error(found, expected) < (0.05 if per_row else 1e-5)
        assert torch.equal(again.encode_from_tokens(again.tokenize(PROMPT)), found)
        assert error(wide.encode_from_tokens(wide.tokenize(PROMPT)), expected) < 0.05


def check_text_in_few_bits(name, folder):
    """fp8 and int8: the language model's layers, near the plain encoder; unknown words are refused."""
    plain = load_clip(name)
    expected, size = plain.encode_from_tokens(plain.tokenize(PROMPT)), plain.patcher.model_size()
    for text_weights, bound in (("fp8", 0.06), ("int8", 0.02)):
        clip = load_clip(name, text_weights=text_weights)
        assert all(".language_model.layers." in key for key in quantised(clip)) and len(quantised(clip)) >= 14
        found = clip.encode_from_tokens(clip.tokenize(PROMPT))
        print(text_weights, error(found, expected), clip.patcher.model_size() / size)
        assert 0 < error(found, expected) < bound and clip.patcher.model_size() < size
    try:
        load_clip(name, text_weights="int3")
    except ValueError as problem:
        assert "int3" in str(problem) and "nf4" in str(problem)
    else:
        raise AssertionError("an unknown word was taken")


def check_text_in_nf4(name, folder):
    """bitsandbytes' layers, which are moved whole; without the package the error names it."""
    try:
        load_clip(name, text_weights="nf4")
    except ValueError as problem:
        assert "bitsandbytes" in str(problem)
    else:
        raise AssertionError("this check wants a ComfyUI without bitsandbytes")
    library = folder / "bitsandbytes"
    if not library.is_dir():
        print("no bitsandbytes was given")
        return
    sys.path.append(str(folder))
    plain, clip = load_clip(name), load_clip(name, text_weights="nf4")
    expected = plain.encode_from_tokens(plain.tokenize(PROMPT))
    found = clip.encode_from_tokens(clip.tokenize(PROMPT))
    assert clip.whole and type(clip.clone().patcher) is type(clip.patcher) and clip.clone().whole
    print("nf4", error(found, expected), clip.patcher.model_size() / plain.patcher.model_size())
    assert 0 < error(found, expected) < 0.2
    import comfy.model_management

    comfy.model_management.unload_all_models()
    again = clip.encode_from_tokens(clip.tokenize(PROMPT))
    # On CPUs bitsandbytes packs weights anew for the product, and back whenever ComfyUI counts them, with roundings.
    assert error(again, found) < 0.01


def sampled(model, conditioning, steps=4):
    import nodes

    latent = {"samples": torch.zeros(1, 16, 5, 8, 8)}
    (made,) = nodes.KSampler().sample(model, 7, steps, 3.0, "euler", "simple", *conditioning, latent)
    return made["samples"]


def load_dit(name, weight_dtype="fp32"):
    return module(name, "nodes.load").open_dit("built-in: nano-video", "auto", weight_dtype)[0]


def conditioning_of(name):
    import nodes

    clip = load_clip(name)
    return [nodes.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPT, "")]


def with_lora(model, strength=1.0):
    keys = [f"diffusion_model.visual_transformer_blocks.{index}.feed_forward.in_layer.weight" for index in (0, 3)]
    torch.manual_seed(0)
    shapes = {key: model.model.state_dict()[key].shape for key in keys}
    made = model.clone()
    made.add_patches({key: ("diff", (0.1 * torch.randn(shape),)) for key, shape in shapes.items()}, strength)
    return made


def check_block_swap(name, folder):
    """Any number of blocks: the same bits, no more loaded than is left, with LoRAs, NABLA, step cache and cancelling."""
    import comfy.model_management

    swap = module(name, "nodes.bridge.block_swap").swap_blocks
    nabla = module(name, "nodes.bridge.attention").patch_attention
    cached = importlib.import_module(f"{name}.nodes.bridge.step_cache").patch_step_cache
    settings = module(name, "kandinsky5_core.sampling.step_cache").MagSettings(threshold=0.1, max_skip=2, retain=0.2)
    ways = {
        "plain": lambda model: model,
        "LoRA": with_lora,
        "NABLA": lambda model: nabla(model, "nabla", 0.5, (1, 1, 1)),
        "step cache": lambda model: cached(model, "magcache", settings, "auto", print)[0],
    }
    model, conditioning = load_dit(name), conditioning_of(name)
    size = model.model_size()
    block = comfy.model_management.module_size(model.model.diffusion_model.visual_transformer_blocks[0])
    expected = {way: sampled(make(model), conditioning, 8) for way, make in ways.items()}
    assert len({tuple(made.flatten()[:9].tolist()) for made in expected.values()}) == len(ways)
    for way, make in ways.items():
        for count, some in ((2, make(swap(model, 2))), (5, swap(make(model), 5))):
            assert torch.equal(sampled(some, conditioning, 8), expected[way]), (count, way)
            assert 0 < waiting(some)[0] and some.loaded_size() <= size - count * block, (count, way)
    swapped = swap(model, 5)
    comfy.model_management.interrupt_current_processing(True)
    try:
        sampled(swapped, conditioning, 8)
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("a cancelled run went on")
    assert torch.equal(sampled(swapped, conditioning, 8), expected["plain"])
    assert torch.equal(sampled(swap(swapped, 0), conditioning, 8), expected["plain"])
    assert waiting(swapped)[0] == 0 and model.loaded_size() == size
    # What is loaded whole gives back what is over the limit.
    assert torch.equal(sampled(swap(model, 4), conditioning, 8), expected["plain"])
    assert model.loaded_size() <= size - 4 * block
    for count in (-1, 6):
        try:
            swap(model, count)
        except ValueError as problem:
            assert "use 0 to 5" in str(problem)
        else:
            raise AssertionError("a number of blocks that the model lacks was taken")


def check_block_swap_in_eight_bits(name, folder):
    """Quantised weights wait, too; a LoRA on those that wait is not rounded to eight bits, so it may differ a little."""
    swap = module(name, "nodes.bridge.block_swap").swap_blocks
    conditioning = conditioning_of(name)
    for weight_dtype in ("fp8_e4m3fn", "int8", "int8_fast"):
        model = load_dit(name, weight_dtype)
        assert torch.equal(sampled(swap(model, 4), conditioning), sampled(model, conditioning))
        expected = sampled(with_lora(model), conditioning)
        found = sampled(with_lora(swap(model, 4)), conditioning)
        print(weight_dtype, "LoRA", error(found, expected))
        assert error(found, expected) < 0.1


def check_dit_may_lie_anywhere(name, folder):
    """With blocks swapped on a card, what meets in a layer is on the card."""
    card = plug_in()
    swap = module(name, "nodes.bridge.block_swap").swap_blocks
    model = load_dit(name)
    model.load_device = card
    dit = model.model.diffusion_model
    # Whether a row is padded is read from the mask, which has no values here.
    module(name, "kandinsky5_core.conditioning").TextConditioning.is_full = lambda text: True
    for count in (0, 2, 5):
        made = swap(with_lora(model), count)
        made.pin_weight_to_device = lambda key: None
        with without_values(made.model):
            made.partially_load(card, 1e32)
            places = [part.weight.device.type for part in dit.modules() if hasattr(part, "comfy_cast_weights")]
            assert ("cpu" in places) == (count > 0) and "card" in places, (count, places)
            text, pooled = torch.zeros(1, 7, dit.config.in_text_dim), torch.zeros(1, dit.config.in_text_dim2)
            given = [part.to(card) for part in (torch.zeros(1, 16, 5, 8, 8), torch.full((1,), 500.0), text, pooled)]
            assert dit(*given).device == card
            made.detach()


def check_dynamic_vram_is_left_alone(name, folder):
    """A MODEL under ComfyUI's dynamic VRAM goes through as it is, and the log says so."""
    import comfy.model_patcher

    class Dynamic(comfy.model_patcher.ModelPatcher):
        """Says that it is one; a real one needs a card."""

        def is_dynamic(self):
            return True

    told = []
    log = module(name, "nodes.bridge.block_swap").log
    log.info = lambda text, *values: told.append(text % values if values else text)
    model = load_dit(name)
    model.__class__ = Dynamic
    made = module(name, "nodes.bridge.block_swap").swap_blocks(model, 3)
    assert type(made) is Dynamic and made is not model and "dynamic VRAM" in told[0]
    made.partially_load(made.load_device, 1e32)
    assert made.loaded_size() == made.model_size()


def check_loaders_with_dynamic_vram(name, folder):
    """Where ComfyUI makes its layers without weights, ours load all the same, with the same result."""
    import comfy.memory_management

    conditioning = conditioning_of(name)
    expected = {kind: sampled(load_dit(name, kind), conditioning) for kind in ("fp32", "int8")}
    comfy.memory_management.aimdo_enabled = True
    for kind, wanted in expected.items():
        assert torch.equal(sampled(load_dit(name, kind), conditioning), wanted)
    assert all(torch.equal(*pair) for pair in zip(
        [part[0][0] for part in conditioning_of(name)], [part[0][0] for part in conditioning], strict=True
    ))  # fmt: skip
    assert len(load_dit(name).model.diffusion_model.state_dict()) > 100


def check_older_comfyui(name, folder):
    """Without ComfyUI's quantised layers: the choices say so, and 'default' widens a file's fp8."""
    path, _ = fp8_copy(name, folder, "scale_weight")
    wide = load_clip(name, "image", "bf16", path)
    bridge = module(name, "nodes.bridge.quantised")
    bridge.quant_ops = None
    for load in (lambda: load_dit(name, "int8"), lambda: load_clip(name, text_weights="fp8")):
        try:
            load()
        except ValueError as problem:
            assert "update ComfyUI" in str(problem)
        else:
            raise AssertionError("a format that is not there was taken")
    clip = load_clip(name, "image", "default", path)
    assert not quantised(clip) and not quantised(wide)
    assert error(*(some.encode_from_tokens(some.tokenize(PROMPT)) for some in (clip, wide))) < 0.05
