"""Checks that run inside ComfyUI's Python (see in_comfyui.py). Each gets the pack's name and an empty folder."""

import importlib

import torch

PROMPT = "a big red circle moves left on a black background"


def core(name, module):
    return importlib.import_module(f"{name}.kandinsky5_core.{module}")


def bridge(name, module):
    return importlib.import_module(f"{name}.nodes.bridge.{module}")


def load_video(name):
    files = bridge(name, "folders").built_in("built-in: nano-video")
    model = bridge(name, "model").load_model(files.dit, files.variant, torch.float32)
    clip = bridge(name, "clip").load_clip(files.text_encoder, files.clip, "video", bundled=True)
    return files, model, clip


def encode(clip, text):
    import nodes

    return nodes.CLIPTextEncode().encode(clip, text)[0]


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def check_parity(name, folder):
    """KSampler, euler and simple at the variant's shift: the same latents as the core's sampler."""
    import nodes

    files, model, clip = load_video(name)
    pipeline, request = core(name, "pipeline"), core(name, "request")
    models = core(name, "loading").load_files(files)
    for seed, steps in ((7, 20), (8, 16), (9, 50)):
        latent = {"samples": torch.zeros(1, 16, 5, 8, 8)}
        (theirs,) = nodes.KSampler().sample(
            model, seed, steps, 3.0, "euler", "simple", encode(clip, PROMPT), encode(clip, ""), latent
        )
        resolved = request.resolve(request.Request(prompt=PROMPT, seed=seed, num_steps=steps), files.variant)
        shape = core(name, "shapes").LatentShape(1, 16, 5, 8, 8)
        with torch.no_grad():
            ours = pipeline.sample_latents(models, resolved, shape, *pipeline.encode_prompts(models, resolved))
        error = relative_error(theirs["samples"], ours / files.variant.vae.scaling_factor)
        assert error < 1e-4, (steps, error)


def check_vae_budget(name, folder):
    """The decoding node's VAE: plainly with room, streamed without, nearly the same frames, and it can be cancelled."""
    import comfy.model_management

    vae = bridge(name, "vae").load_vae(bridge(name, "folders").built_in("built-in: nano-video").vae)
    latents = vae.encode(torch.rand(17, 64, 64, 3))
    decode = bridge(name, "decode").decode_latent
    plain, small = decode(latents, vae, 2**30), decode(latents, vae, 24 * 2**20)
    assert plain.shape == small.shape == (1, 17, 64, 64, 3)
    assert 0 < (plain - small).abs().max() < 0.1, (plain - small).abs().max()
    comfy.model_management.interrupt_current_processing(True)
    try:
        decode(latents, vae, 24 * 2**20)
    except comfy.model_management.InterruptProcessingException:
        return
    raise AssertionError("a cancelled decoding went on")


def check_image_to_video(name, folder):
    """Held frames: the sample node equals the core; KSampler returns what was given."""
    import nodes

    files, model, clip = load_video(name)
    vae = bridge(name, "vae").load_vae(files.vae)
    pipeline, request = core(name, "pipeline"), core(name, "request")
    models = core(name, "loading").load_files(files)
    frames, sampling = bridge(name, "frames"), bridge(name, "sampling")
    picture = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(1))
    resolved = request.resolve(request.Request(prompt=PROMPT, task="i2v", image=picture, seed=5), files.variant)
    shape = core(name, "shapes").LatentShape(1, 16, 5, 8, 8)
    with torch.no_grad():
        inputs = core(name, "inputs").encode_inputs(models, resolved, shape)
        ours = pipeline.sample_latents(models, resolved, shape, *pipeline.encode_prompts(models, resolved), inputs)
    scale = files.variant.vae.scaling_factor
    held = frames.GivenFrames.of_pictures(files.variant, vae, {0: picture}, 0, 0, 0)
    assert relative_error(held.held.clean * scale, inputs.image.clean) < 1e-5
    positive, negative = frames.with_given(held, encode(clip, PROMPT), encode(clip, ""))
    settings = sampling.SampleSettings.of(
        files.variant,
        model,
        steps=0,
        guidance=0.0,
        shift=0.0,
        denoise=1.0,
        seed=5,
        sampler_name="euler",
        scheduler="simple",
    )
    made = sampling.run_sampler(model, positive, negative, held.empty(1), settings)
    assert relative_error(made["samples"] * scale, ours) < 1e-4
    (stock,) = nodes.KSampler().sample(model, 5, 20, 3.0, "euler", "simple", positive, negative, held.empty(1))
    assert relative_error(stock["samples"][:, :, :1], held.held.clean[:, :, :1]) < 1e-4


def check_grey_masks(name, folder):
    """Inpainting with grey values: the sample node gives what the core gives."""
    files = bridge(name, "folders").built_in("built-in: nano-image")
    model = bridge(name, "model").load_model(files.dit, files.variant, torch.float32)
    clip = bridge(name, "clip").load_clip(files.text_encoder, files.clip, "image", bundled=True)
    vae = bridge(name, "vae").load_vae(files.vae)
    pipeline, request = core(name, "pipeline"), core(name, "request")
    models = core(name, "loading").load_files(files)
    picture = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(64, 96)
    mask[:32], mask[32:48] = 1.0, 0.4
    prompt = "a big red circle on a gray background"
    resolved = request.resolve(
        request.Request(prompt=prompt, task="t2i", image=picture, mask=mask, seed=5), files.variant
    )
    shape = core(name, "shapes").LatentShape(1, 16, 1, 8, 12)
    with torch.no_grad():
        inputs = core(name, "inputs").encode_inputs(models, resolved, shape)
        ours = pipeline.sample_latents(models, resolved, shape, *pipeline.encode_prompts(models, resolved), inputs)
    pictures, sampling = bridge(name, "pictures"), bridge(name, "sampling")
    made = pictures.inpaint_inputs(
        files.variant, vae, picture[None], mask[None], grow=0, feather=0, outpaint=(0, 0, 0, 0)
    )
    settings = sampling.SampleSettings.of(
        files.variant, model, steps=0, guidance=0.0, shift=0.0, denoise=1.0, seed=5, sampler_name="euler",
        scheduler="simple",
    )  # fmt: skip
    theirs = sampling.run_sampler(model, encode(clip, prompt), encode(clip, ""), made.latent, settings)
    scaled = theirs["samples"] * files.variant.vae.scaling_factor
    # Kept places travel on other roundings here and there, and bf16 rotary embeddings make much of them; blending grey
    # places in every step, as ComfyUI alone does, is off by about 1.
    error = float((scaled.reshape(ours.shape) - ours).norm() / ours.norm())
    print("grey", error)
    assert error < 1e-2, error


def check_native_nabla(name, folder):
    """On ComfyUI's own Kandinsky 5 class: mass 1 equals dense attention, less mass does not, our DiT agrees."""
    import comfy.sd
    from safetensors.torch import save_file

    config = core(name, "config").DiTConfig(
        model_dim=1792, ff_dim=256, time_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(16, 24, 24)
    )
    dit = core(name, "dit.model").DiffusionTransformer(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    save_file(dit.state_dict(), folder / "native.safetensors")
    model = comfy.sd.load_diffusion_model(str(folder / "native.safetensors"), model_options={"dtype": torch.float32})
    x = torch.randn(1, 16, 3, 32, 32, generator=generator)
    given = {
        "c_concat": torch.zeros(1, 17, 3, 32, 32),
        "c_crossattn": torch.randn(1, 6, 3584, generator=generator),
        "y": torch.randn(1, 768, generator=generator),
    }

    def denoised(patched):
        options = patched.model_options["transformer_options"].copy()
        options["wrappers"] = patched.wrappers
        with torch.no_grad():
            return patched.model.apply_model(x, torch.tensor([0.7]), transformer_options=options, **given)

    patch = bridge(name, "attention").patch_attention
    dense = denoised(model.clone())
    full = denoised(patch(model, "nabla", 1.0, (11, 3, 3)))
    sparse = denoised(patch(model, "nabla", 0.3, (1, 1, 1)))
    assert relative_error(full, dense) < 2e-3, relative_error(full, dense)
    assert relative_error(sparse, dense) > relative_error(full, dense)


def check_merge_and_save(name, folder):
    """ModelMergeSimple gives the mean; ModelSave's file loads again, here and in ComfyUI's key layout."""
    import comfy.sd
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    files, model, _ = load_video(name)
    other = model.clone()
    key = "diffusion_model.visual_transformer_blocks.0.feed_forward.in_layer.weight"
    (merged,) = ModelMergeSimple().merge(model, other, 0.5)
    merged.patch_model()
    merged.unpatch_model()
    target = folder / "saved.safetensors"
    comfy.sd.save_checkpoint(str(target), merged)
    load = importlib.import_module(f"{name}.nodes.bridge.model").load_model
    again = load(target, files.variant, torch.float32)
    assert torch.equal(again.model.state_dict()[key], model.model.state_dict()[key])
    info = core(name, "weights.detect").inspect_file(target)
    assert info.kind == "dit" and info.variant == "nano-video"


def check_lora_formats(name, folder):
    """Every key convention gives the same change; foreign files are refused; left-over keys are counted."""
    from safetensors.torch import save_file

    _, model, _ = load_video(name)
    apply_file = bridge(name, "lora").apply_file
    module = "visual_transformer_blocks.1.self_attention.to_query"
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(4, 192, generator=generator), torch.randn(192, 4, generator=generator)
    expected = 0.5 * (up @ down) * 2.0  # strength 0.5, alpha/rank 2
    alpha = {"lora_alpha": "8"}
    forms = {
        "official": (
            {
                f"base_model.model.{module}.lora_A.default.weight": down,
                f"base_model.model.{module}.lora_B.default.weight": up,
            },
            {**alpha, "trigger": "zoom right"},
        ),
        "diffusers": ({f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}, alpha),
        "comfyui": (
            {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up},
            alpha,
        ),
        "kohya": (
            {
                f"lora_unet_{module.replace('.', '_')}.lora_down.weight": down,
                f"lora_unet_{module.replace('.', '_')}.lora_up.weight": up,
                f"lora_unet_{module.replace('.', '_')}.alpha": torch.tensor(8.0),
            },
            {},
        ),
    }
    key = f"diffusion_model.{module}.weight"
    base = model.model.state_dict()[key].clone()
    for form, (tensors, metadata) in forms.items():
        save_file(tensors, folder / f"{form}.safetensors", metadata=metadata)
        patched, told = apply_file(model, folder / f"{form}.safetensors", 0.5)
        patched.patch_model()
        change = patched.model.state_dict()[key] - base
        patched.unpatch_model()
        assert relative_error(change, expected) < 1e-4, form
        assert told.trigger == ("zoom right" if form == "official" else "")
    odd = {**forms["diffusers"][0], "transformer.no_such_layer.lora_A.weight": down.clone()}
    save_file(odd, folder / "odd.safetensors")
    assert "1 keys do not fit" in apply_file(model, folder / "odd.safetensors", 1.0)[1].line
    for tensors, message in (
        ({"lora_unet_down_blocks_0.lora_down.weight": down}, "none of its 1 keys fits"),
        ({f"transformer.{module}.lora_A.weight": torch.zeros(4, 77)}, "LoRA of another model"),
    ):
        save_file(tensors, folder / "bad.safetensors")
        try:
            apply_file(model, folder / "bad.safetensors", 1.0)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


def check_missing_package(name, folder):
    """A package that cannot be imported hides the nodes that need it, and one line says how to get it."""
    import logging
    import sys

    nodes = sys.modules[f"{name}.nodes"]
    every = {node.__name__ for node in nodes.load_nodes()}
    for module in [
        key for key in sys.modules if key.startswith((f"{name}.nodes.edit", f"{name}.nodes.bridge.pictures"))
    ]:
        del sys.modules[module]
    for module in [key for key in sys.modules if key.startswith(f"{name}.kandinsky5_core.inputs")]:
        del sys.modules[module]
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger(f"{name}.nodes").addHandler(handler)
    finder = type("Block", (), {"find_spec": staticmethod(_no_inputs(f"{name}.kandinsky5_core.inputs"))})
    sys.meta_path.insert(0, finder)
    left = {node.__name__ for node in nodes.load_nodes()}
    assert every - left == {"K5EditConditioning", "K5Inpaint", "K5PasteBack"}, every - left
    assert len(lines) == 1 and "pip install surely-missing" in lines[0], lines


def _no_inputs(blocked):
    def find_spec(module, path=None, target=None):
        if module == blocked:
            raise ModuleNotFoundError("No module named 'surely-missing'", name="surely-missing")

    return find_spec


def cached(name, model, **changes):
    """The MODEL with a step cache; what runs say comes into the list."""
    told = []
    settings = core(name, "sampling.step_cache").MagSettings(**{k: v for k, v in changes.items() if k not in ("mode", "ratios")})
    patch = bridge(name, "step_cache").patch_step_cache
    patched, report = patch(model, changes.get("mode", "magcache"), settings, changes.get("ratios", "auto"), told.append)
    return patched, report, told


def ksampled(model, clip, *, seed=7, steps=20, cfg=3.0, sampler="euler", scheduler="simple", batch=1, texts=(PROMPT, "")):
    import nodes

    latent = {"samples": torch.zeros(batch, 16, 5, 8, 8)}
    positive, negative = (encode(clip, text) for text in texts)
    (made,) = nodes.KSampler().sample(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent)
    return made["samples"]


def check_step_cache(name, folder):
    """On our MODEL: threshold 0 changes no bit, else as the core; runs, samplers, LoRAs, batches and cancels are apart."""
    import gc

    import comfy.model_management
    from safetensors.torch import save_file

    files, model, clip = load_video(name)
    plain = ksampled(model, clip)
    zero, report, told = cached(name, model, threshold=0.0)
    assert torch.equal(ksampled(zero, clip), plain)
    assert told == ["MagCache skipped 0 of 40 block evaluations (0 %) in 20 steps"], told

    fast, report, told = cached(name, model)
    assert "will skip 22 of 40" in report, report
    made = ksampled(fast, clip)
    assert told[-1].startswith("MagCache skipped 22 of 40"), told
    assert not torch.equal(made, plain) and relative_error(made, plain) < 0.5
    pipeline, request = core(name, "pipeline"), core(name, "request")
    models = core(name, "loading").load_files(files)
    resolved = request.resolve(request.Request(prompt=PROMPT, seed=7, cache="magcache", cache_threshold=0.12), files.variant)
    chosen = core(name, "caching").choose_cache(resolved, files.variant, files.dit)
    shape = core(name, "shapes").LatentShape(1, 16, 5, 8, 8)
    with torch.no_grad():
        ours = pipeline.sample_latents(
            models, resolved, shape, *pipeline.encode_prompts(models, resolved), new_cache=chosen.start
        )
    error = relative_error(made * files.variant.vae.scaling_factor, ours)
    assert error < 1e-3, error

    # Each run has its own state: other runs between do not show, with other steps, samplers and without guidance.
    for other in ({"steps": 9}, {"sampler": "heun", "steps": 10}, {"cfg": 1.0}, {"scheduler": "beta", "sampler": "dpmpp_2m"}):
        assert torch.isfinite(ksampled(fast, clip, **other)).all()
    assert torch.equal(ksampled(fast, clip), made)

    # Cancelled in the middle, then again.
    original, calls = model.model.apply_model, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise comfy.model_management.InterruptProcessingException
        return original(*args, **kwargs)

    model.model.apply_model = interrupted
    try:
        ksampled(fast, clip, seed=8)
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("was not interrupted")
    del model.model.apply_model
    assert torch.equal(ksampled(fast, clip), made)

    # Nothing of a run is left: neither of the finished ones nor of the cancelled one.
    gc.collect()
    assert [type(item).__name__ for item in gc.get_objects() if type(item).__name__ in ("MagCache", "_Part")] == []

    # The order of a LoRA and the cache does not matter, and the LoRA works.
    generator = torch.Generator().manual_seed(2)
    module = "transformer.visual_transformer_blocks.1.self_attention.to_query"
    lora = {f"{module}.lora_A.weight": torch.randn(4, 192, generator=generator) * 0.1,
            f"{module}.lora_B.weight": torch.randn(192, 4, generator=generator) * 0.1}  # fmt: skip
    save_file(lora, folder / "lora.safetensors")
    apply_file = bridge(name, "lora").apply_file
    before = ksampled(cached(name, apply_file(model, folder / "lora.safetensors", 1.0)[0])[0], clip)
    after = ksampled(apply_file(fast, folder / "lora.safetensors", 1.0)[0], clip)
    assert torch.equal(before, after) and not torch.equal(before, made)

    # A batch holds what single runs give, as without a cache: to the rounding of rotary embeddings.
    batch = ksampled(fast, clip, batch=2)
    assert float((batch[:1] - made).norm() / made.norm()) < 0.05
    # Twice is once, and off is off.
    twice, _, told = cached(name, fast)
    assert torch.equal(ksampled(twice, clip), made) and len(told) == 1
    assert torch.equal(ksampled(cached(name, fast, mode="off")[0], clip), plain)


def check_step_cache_parts(name, folder):
    """Both branches in one call equal one after the other; areas, windows and left-out blocks keep to themselves."""
    import comfy.samplers

    _, model, clip = load_video(name)
    fast, _, told = cached(name, model, threshold=0.06)
    seen = []

    def counted(apply_model, args):
        seen.append(len(args["cond_or_uncond"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    watched = fast.clone()
    watched.set_model_unet_function_wrapper(counted)
    texts = (PROMPT, "a small blue square moves up on a white background")
    together = ksampled(watched, clip, texts=texts)
    sizes, seen[:] = set(seen), []
    real = comfy.samplers.can_concat_cond
    comfy.samplers.can_concat_cond = lambda a, b: a is b
    try:
        apart = ksampled(watched, clip, texts=texts)
    finally:
        comfy.samplers.can_concat_cond = real
    assert 2 in sizes and set(seen) == {1}, (sizes, set(seen))
    assert told[0] == told[1] and "skipped 0" not in told[0], told
    assert float((together - apart).norm() / apart.norm()) < 0.05

    # Context windows: a residual for each window and side, and none of the windows' results changes hands.
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    def windows(patched, schedule):
        return ContextWindowsManualNode.execute(
            patched, 3, 1, schedule, 1, False, "pyramid", 2, False, causal_window_fix=False
        )[0]

    step_cache = core(name, "sampling.step_cache")
    kept, real = [], step_cache.MagCache._parts
    step_cache.MagCache._parts = lambda self, *given: (kept.append(len(self.parts)), real(self, *given))[1]
    try:
        for schedule, most in (("standard_static", 4), ("standard_uniform", 12)):
            plain = ksampled(windows(model, schedule), clip)
            zero, _, _ = cached(name, model, threshold=0.0)
            assert torch.equal(ksampled(windows(zero, schedule), clip), plain)
            moving, _, said = cached(name, model)
            made = ksampled(windows(moving, schedule), clip)
            assert max(kept) <= most, kept
            kept.clear()
            assert torch.isfinite(made).all()
            # Static windows skip what one window does, 22 of 40, each for itself.
            assert schedule != "standard_static" or "skipped 44 of 80" in said[0], said
    finally:
        step_cache.MagCache._parts = real

    # A guider that evaluates a step again with a block left out gets that, not the cached residual.
    again = []

    def skip_layer(args):
        changed = comfy.model_patcher.create_model_options_clone(args["model_options"])
        changed = comfy.model_patcher.set_model_options_patch_replace(
            changed, lambda given, extra: {"x": given["x"]}, "dit", "double_block", 2
        )
        (without,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], changed
        )
        again.append(float((without - args["cond_denoised"]).abs().max()))
        return args["denoised"]

    guided = fast.clone()
    guided.set_model_sampler_post_cfg_function(skip_layer)
    made = ksampled(guided, clip)
    assert torch.equal(made, ksampled(fast, clip)) and min(again) > 1e-4, min(again)


def check_step_cache_native(name, folder):
    """On ComfyUI's own class: threshold 0 changes no bit; it skips what the rule says, with other nodes' patches."""
    import comfy.sd
    from safetensors.torch import save_file

    import nodes

    config = core(name, "config").DiTConfig(
        model_dim=1792, ff_dim=256, time_dim=32, num_text_blocks=1, num_visual_blocks=3, axes_dims=(16, 24, 24)
    )
    dit = core(name, "dit.model").DiffusionTransformer(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    save_file(dit.state_dict(), folder / "native.safetensors")
    model = comfy.sd.load_diffusion_model(str(folder / "native.safetensors"), model_options={"dtype": torch.float32})

    def conditioning(seed):
        random = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, 768, generator=random)
        return [[torch.randn(1, 6, 3584, generator=random), {"pooled_output": pooled}]]

    def sample(patched, cfg=5.0, steps=50):
        latent = {"samples": torch.zeros(1, 16, 2, 8, 8)}
        given = conditioning(1), conditioning(2)
        return nodes.KSampler().sample(patched, 3, steps, cfg, "euler", "simple", *given, latent)[0]["samples"]

    ran = []
    blocks = model.model.diffusion_model.visual_transformer_blocks
    hooks = [block.register_forward_hook(lambda module, args, out: ran.append(len(out))) for block in blocks]
    plain, full = sample(model), list(ran)
    ran.clear()
    zero, _, told = cached(name, model, threshold=0.0, ratios="lite-t2v-5s-sft")
    assert torch.equal(sample(zero), plain) and ran == full and "skipped 0" in told[-1]
    ran.clear()
    fast, report, told = cached(name, model, ratios="lite-t2v-5s-sft")
    made = sample(fast)
    share = 1 - sum(ran) / sum(full)
    skipped = int(told[-1].split("skipped ")[1].split(" of ")[0])
    assert abs(share - skipped / 100) < 1e-9 and skipped > 30, (share, told)
    assert f"{skipped} of 100" in report, (report, told)
    assert not torch.equal(made, plain)
    assert torch.equal(sample(fast), made)
    for hook in hooks:
        hook.remove()

    # Another node's patch on one block stays in force, whether put before the cache or after it.
    def louder(args, extra):
        return {"x": extra["original_block"](args)["x"] * 1.5}

    before = model.clone()
    before.set_model_patch_replace(louder, "dit", "double_block", 1)
    after = fast.clone()
    after.set_model_patch_replace(louder, "dit", "double_block", 1)
    before = sample(cached(name, before, ratios="lite-t2v-5s-sft")[0])
    assert torch.equal(before, sample(after)) and not torch.equal(before, made)

    try:
        cached(name, model)
    except ValueError as error:
        assert "choose" in str(error), error
    else:
        raise AssertionError("a DiT of no released size was guessed")


def check_step_cache_calibration(name, folder):
    """Calibrate mode writes ratios beside the file, which are used from then on; odd runs and models are told."""
    import shutil

    files = bridge(name, "folders").built_in("built-in: nano-video")
    weights = folder / "mine.safetensors"
    shutil.copy(files.dit, weights)
    model = bridge(name, "model").load_model(weights, files.variant, torch.float32)
    clip = bridge(name, "clip").load_clip(files.text_encoder, files.clip, "video", bundled=True)
    patched, report, _ = cached(name, model)
    assert report.startswith("off: no ratios are known for nano-video") and not patched.wrappers.get("outer_sample")
    plain = ksampled(model, clip)
    assert torch.equal(ksampled(patched, clip), plain)

    calibrating, report, told = cached(name, model, mode="calibrate")
    assert "mine.magcache.json" in report
    for odd in ({"steps": 4}, {"scheduler": "beta"}):
        try:
            ksampled(calibrating, clip, **odd)
        except ValueError as error:
            assert "official schedule" in str(error), error
        else:
            raise AssertionError(odd)
    ksampled(calibrating, clip, sampler="heun")
    assert told[-1].startswith("not calibrated: calibration needs one evaluation in every step"), told
    assert not (folder / "mine.magcache.json").exists()
    assert torch.equal(ksampled(calibrating, clip), plain)
    assert "saved" in told[-1] and (folder / "mine.magcache.json").is_file(), told

    fast, report, told = cached(name, model)
    assert "mine.magcache.json ratios of nano-video (20 steps)" in report, report
    ksampled(fast, clip)
    assert "skipped 22 of 40" in told[-1], told

    flash = core(name, "config").variant("lite-t2v-5s-flash")
    model.model.diffusion_model.variant = flash
    _, report, _ = cached(name, model)
    assert report.startswith("off: lite-t2v-5s-flash is distilled to 16 steps"), report
    try:
        cached(name, model, mode="calibrate")
    except ValueError as error:
        assert "distilled" in str(error)
    else:
        raise AssertionError("calibrated a distilled model")
