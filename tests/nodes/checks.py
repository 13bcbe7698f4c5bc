"""Checks that run inside ComfyUI's Python (see in_comfyui.py). Each gets the pack's nodes module and its name."""

import importlib

import torch


def core(name, module):
    return importlib.import_module(f"{name}.kandinsky5_core.{module}")


def bridge(name, module):
    return importlib.import_module(f"{name}.nodes.bridge.{module}")


def load_video(name):
    files = bridge(name, "folders").built_in("built-in: nano-video")
    model = bridge(name, "model").load_model(files.dit, files.variant, torch.float32)
    clip = bridge(name, "clip").load_clip(files.text_encoder, files.clip, "video", bundled=True)
    return files, model, clip


def check_parity(pack, name):
    """KSampler, euler and simple at the variant's shift: the same latents as the core's sampler."""
    import nodes

    files, model, clip = load_video(name)
    pipeline, request = core(name, "pipeline"), core(name, "request")
    models = core(name, "loading").load_files(files)
    prompt = "a big red circle moves left on a black background"
    positive = nodes.CLIPTextEncode().encode(clip, prompt)[0]
    negative = nodes.CLIPTextEncode().encode(clip, "")[0]
    latent = {"samples": torch.zeros(1, 16, 5, 8, 8)}
    (theirs,) = nodes.KSampler().sample(model, 7, 20, 3.0, "euler", "simple", positive, negative, latent)
    resolved = request.resolve(request.Request(prompt=prompt, seed=7), files.variant)
    shape = core(name, "shapes").LatentShape(1, 16, 5, 8, 8)
    with torch.no_grad():
        ours = pipeline.sample_latents(models, resolved, shape, *pipeline.encode_prompts(models, resolved))
    ours = ours / files.variant.vae.scaling_factor
    error = float((theirs["samples"] - ours).abs().max() / ours.abs().max())
    assert error < 1e-4, error
    print("parity", error)


def check_debug(pack, name):
    import comfy.samplers

    import nodes
    files, model, clip = load_video(name)
    pipeline, request = core(name, "pipeline"), core(name, "request")
    models = core(name, "loading").load_files(files)
    prompt = "a big red circle moves left on a black background"
    resolved = request.resolve(request.Request(prompt=prompt, seed=7), files.variant)
    pos, neg = pipeline.encode_prompts(models, resolved)
    c = nodes.CLIPTextEncode().encode(clip, prompt)[0]
    print("text", (c[0][0]-pos.trimmed().embeds).abs().max(), (c[0][1]["pooled_output"]-pos.pooled).abs().max(), c[0][0].shape)
    sig = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 20)
    mine = core(name, "sampling.schedule").flow_schedule(20, 3.0)
    print("sig", (sig-mine).abs().max(), (sig*1000-mine*1000).abs().max())
    x = torch.randn(1,16,5,8,8)
    g = core(name, "sampling.guidance")
    plan = core(name, "dit.plan").plan_visual(files.variant.dit, (5,4,4), files.variant.rope_scale)
    v = g.guided_velocity(models.dit, pos, None, 1.0, plan)(x, torch.tensor(0.7))
    w = model.model.diffusion_model(x, torch.tensor([700.0]), c[0][0], c[0][1]["pooled_output"])
    print("velocity", (v-w).abs().max()/v.abs().max())
    d = model.model.apply_model(x, torch.tensor([0.7]), c_crossattn=c[0][0], y=c[0][1]["pooled_output"])
    print("denoised", ((x - 0.7*v) - d).abs().max())
