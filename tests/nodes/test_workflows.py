"""Every shipped workflow, and combinations that are in no file, in a running ComfyUI over HTTP and websocket."""

import io
import json

import av
import pytest
from PIL import Image

from tests.nodes.comfy_server import PACK, NodeError
from tests.nodes.workflow_tools import filled, replaced

API = sorted((PACK / "workflows" / "api").glob("*.json"))
PROMPT = "a big red circle moves left on a black background"


def read(name):
    return json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text())


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_shipped_workflows_run_to_their_output(comfy, path):
    run = comfy.run(json.loads(path.read_text()))
    saved = [file for output in run.outputs.values() for file in output.get("images", [])]
    assert saved
    for file in saved:
        data = comfy.view(file)
        if file["filename"].endswith(".png"):
            picture = Image.open(io.BytesIO(data))
            assert "prompt" in picture.info
        else:
            with av.open(io.BytesIO(data)) as container:
                assert sum(1 for _ in container.decode(video=0)) >= 13
                assert "prompt" in container.metadata


def test_every_workflow_has_its_three_files_and_is_listed(comfy):
    names = {path.stem for path in API}
    for suffix in (".json", ".jpg"):
        assert {path.stem for path in (PACK / "workflows").glob(f"*{suffix}")} == names
    listed = comfy.get("/workflow_templates")
    assert names <= set(listed[comfy.folder_name])


BASE = {
    "1": {"class_type": "K5LoadAll", "inputs": {"model_name": "built-in: nano-video"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": PROMPT}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
    "4": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64, "length": 17}},
    "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
    "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0]}},
}


def ksampler(model, **extra):
    inputs = {"model": model, "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 3}
    return {"class_type": "KSampler", "inputs": {**inputs, "steps": 4, "cfg": 3.0, "scheduler": "simple", **extra}}


CUSTOM = {
    "10": {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}},
    "11": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "12": {"class_type": "K5Schedule", "inputs": {"model": ["1", 0], "steps": 4}},
    "6": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["10", 0], "guider": ["13", 0], "sampler": ["11", 0], "sigmas": ["12", 0], "latent_image": ["4", 0],
        },
    },
}  # fmt: skip
MIXES = {
    "ksampler_heun": {"6": ksampler(["1", 0], sampler_name="heun")},
    "ksampler_other_scheduler": {"6": ksampler(["1", 0], sampler_name="dpmpp_2m", scheduler="beta")},
    "ksampler_advanced": {
        "6": {
            "class_type": "KSamplerAdvanced",
            "inputs": {
                "model": ["1", 0], "add_noise": "enable", "noise_seed": 3, "steps": 6, "cfg": 3.0, "positive": ["2", 0],
                "negative": ["3", 0], "latent_image": ["4", 0], "start_at_step": 0, "end_at_step": 4,
            },
        }
    },
    "cfg_guider": {
        **CUSTOM,
        "13": {"class_type": "CFGGuider", "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "cfg": 3.0}},
    },
    "basic_guider": {**CUSTOM, "13": {"class_type": "BasicGuider", "inputs": {"model": ["1", 0], "conditioning": ["2", 0]}}},
    "model_sampling": {
        "9": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 5.0}},
        "6": ksampler(["9", 0]),
    },
    "our_shift": {"9": {"class_type": "K5Shift", "inputs": {"model": ["1", 0], "shift": 5.0}}, "6": ksampler(["9", 0])},
    "easy_cache": {"9": {"class_type": "EasyCache", "inputs": {"model": ["1", 0]}}, "6": ksampler(["9", 0], steps=8)},
    "compile": {
        "9": {"class_type": "TorchCompileModel", "inputs": {"model": ["1", 0], "backend": "inductor"}},
        "6": ksampler(["9", 0]),
    },
    "merge": {
        "9": {"class_type": "ModelMergeSimple", "inputs": {"model1": ["1", 0], "model2": ["1", 0], "ratio": 0.5}},
        "6": ksampler(["9", 0]),
    },
    "nabla_then_shift": {
        "9": {"class_type": "K5Attention", "inputs": {"model": ["1", 0], "mode": "nabla", "mass": 0.8}},
        "10": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["9", 0], "shift": 4.0}},
        "6": ksampler(["10", 0]),
    },
    "tiled_decode": {
        "6": ksampler(["1", 0]),
        "7": {"class_type": "VAEDecodeTiled", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
    },
    "encode_and_denoise": {
        "9": {"class_type": "K5NanoPicture", "inputs": {"sentence": PROMPT, "frames": 17}},
        "4": {"class_type": "VAEEncode", "inputs": {"pixels": ["9", 0], "vae": ["1", 2]}},
        "6": ksampler(["1", 0], denoise=0.6),
    },
    "stock_image_to_video": {
        "9": {"class_type": "K5NanoPicture", "inputs": {"sentence": PROMPT}},
        "10": {
            "class_type": "Kandinsky5ImageToVideo",
            "inputs": {
                "positive": ["2", 0], "negative": ["3", 0], "vae": ["1", 2], "width": 64, "height": 64, "length": 17,
                "start_image": ["9", 0],
            },
        },
        "6": ksampler(["1", 0], positive=["10", 0], negative=["10", 1], latent_image=["10", 2]),
    },
    "images_with_stock_nodes": {
        "1": {"class_type": "K5LoadAll", "inputs": {"model_name": "built-in: nano-image"}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 2}},
        "6": ksampler(["1", 0]),
    },
    "stock_inpaint_mask": {
        "1": {"class_type": "K5LoadAll", "inputs": {"model_name": "built-in: nano-image"}},
        "9": {"class_type": "K5NanoPicture", "inputs": {"sentence": "a big red circle on a gray background"}},
        "10": {"class_type": "VAEEncode", "inputs": {"pixels": ["9", 0], "vae": ["1", 2]}},
        "4": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["10", 0], "mask": ["9", 1]}},
        "6": ksampler(["1", 0]),
    },
    "enhanced_prompt": {
        "9": {"class_type": "K5EnhancePrompt", "inputs": {"clip": ["1", 1], "prompt": PROMPT, "task": "t2v", "max_tokens": 24}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ["9", 0]}},
        "6": ksampler(["1", 0]),
    },
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_stock_nodes_work_with_ours(comfy, info, mix):
    run = comfy.run(filled({**BASE, **MIXES[mix]}, info))
    assert run.outputs["8"]["images"]


def test_an_enhancer_that_cannot_run_says_why_and_passes_the_prompt_on(comfy, info):
    flow = {
        "1": BASE["1"],
        "2": {"class_type": "K5EnhancePrompt", "inputs": {"clip": ["1", 1], "prompt": PROMPT, "task": "i2v"}},
    }
    (shown,) = comfy.run(filled(flow, info)).outputs["2"]["text"]
    assert shown.startswith(PROMPT) and "unchanged, the enhancer cannot run: enhancing a prompt for i2v needs" in shown


def test_saved_models_load_again(comfy, info):
    comfy.run(
        filled({**BASE, "6": ksampler(["1", 0]),
                "9": {"class_type": "ModelSave", "inputs": {"model": ["1", 0], "filename_prefix": "k5/saved"}}}, info)
    )  # fmt: skip
    saved = next((comfy.base / "output" / "k5").glob("saved*.safetensors"))
    saved.rename(comfy.base / "models" / "diffusion_models" / "resaved.safetensors")
    parts = {
        "text_encoder": "built-in: nano-video",
        "clip_name": "built-in: nano-video",
        "vae_name": "built-in: nano-video",
    }
    loader = {"class_type": "K5LoadAll", "inputs": {"model_name": "resaved.safetensors", **parts}}
    assert comfy.run(filled({**BASE, "1": loader, "6": ksampler(["1", 0])}, info)).outputs["8"]["images"]


def test_sharded_models_are_one_entry_and_load(comfy, info):
    from kandinsky5_core.loading import NANO_FOLDER
    from kandinsky5_core.weights.convert import convert

    folder = comfy.base / "models" / "diffusion_models" / "my-nano" / "transformer"
    folder.parent.mkdir()
    convert(NANO_FOLDER / "video" / "dit.safetensors", folder, layout="diffusers", shard_size=4_000_000)
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    (comfy.base / "models" / "diffusion_models" / "old.ckpt").write_bytes(b"pickle")
    offered = comfy.object_info()["K5LoadAll"]["input"]["required"]["model_name"]
    names = offered[0] if isinstance(offered[0], list) else offered[1]["options"]
    index = next(name for name in names if "my-nano" in name)
    assert [name for name in names if "my-nano" in name] == [index] and "old.ckpt" not in names
    parts = dict.fromkeys(("text_encoder", "clip_name", "vae_name"), "built-in: nano-video")
    loader = {"class_type": "K5LoadAll", "inputs": {"model_name": index, "variant": "nano-video", **parts}}
    assert comfy.run(filled({**BASE, "1": loader, "6": ksampler(["1", 0])}, info)).outputs["8"]["images"]


def test_same_seed_same_result_and_rows_are_single_runs(comfy, info):
    def pictures(seed, batch):
        flow = read("text_to_image")
        flow = replaced(replaced(flow, "4", seed=seed, steps=4), "3", batch_size=batch)
        files = comfy.run(replaced(flow, "6", filename_prefix=f"k5/seed{seed}-{batch}")).outputs["6"]["images"]
        return [Image.open(io.BytesIO(comfy.view(file))).tobytes() for file in files]

    both = pictures(20, 2)
    assert pictures(20, 2) == both
    single = pictures(21, 1)[0]
    assert sum(abs(a - b) for a, b in zip(single, both[1], strict=True)) / len(single) < 1


def test_cancel_within_a_step_and_run_again(comfy, info):
    flow = replaced(read("text_to_video"), "4", steps=200, seed=77)
    run = comfy.run(flow, interrupt_at=2)
    assert run.interrupted
    assert max(value for _, value, total in run.progress if total == 200) <= 6
    again = comfy.run(replaced(flow, "4", steps=4, seed=77))
    assert again.outputs["6"]["images"] and again.previews > 0


WRONG = {
    "width": ("text_to_video", "3", {"width": 72, "height": 64}, "width 72 is not a positive multiple of 16"),
    "one side": ("text_to_video", "3", {"width": 64}, "give both"),
    "frames": ("text_to_video", "3", {"frames": 16}, "frames 16 is not of the form 4k\\+1; use 13 or 17"),
    "frames for pictures": ("text_to_image", "3", {"frames": 17}, "makes pictures"),
    "other vae": ("text_to_video", "1", {"vae_name": "built-in: nano-image"}, "needs hunyuan"),
    "picture model, clip": ("image_to_video", "1", {"model_name": "built-in: nano-image"}, "load an image to video"),
    "video model edits": ("edit_image", "1", {"model_name": "built-in: nano-video"}, "does not edit"),
    "empty prompt": ("text_to_video", "2", {"positive": " "}, "positive is empty"),
    "no such file": ("text_to_video", "1", {"model_name": "nothing.safetensors"}, "Value not in list"),
    "outside the folder": ("text_to_video", "1", {"model_name": "../../secret.safetensors"}, "Value not in list"),
    "keyframe names": ("image_to_video", "3", {"keyframe_positions": "x"}, "must be frame numbers"),
    "row": ("text_to_video", "5", {"row": 5}, "row 5 is beyond the batch of 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_say_what_to_do(comfy, info, case):
    workflow, node, change, message = WRONG[case]
    with pytest.raises(NodeError, match=message):
        comfy.run(replaced(read(workflow), node, **change))


def test_a_lora_of_another_model_is_refused_and_a_good_one_is_named(comfy, info):
    import torch
    from safetensors.torch import save_file

    folder = comfy.base / "models" / "loras"
    save_file({"lora_unet_down.lora_down.weight": torch.zeros(4, 8)}, folder / "foreign.safetensors")
    module = "transformer.visual_transformer_blocks.0.self_attention.to_query"
    good = {f"{module}.lora_A.weight": torch.randn(4, 192), f"{module}.lora_B.weight": torch.randn(192, 4)}
    save_file(good, folder / "good.safetensors", metadata={"trigger": "k5style"})
    with pytest.raises(NodeError, match="none of its 1 keys fits"):
        comfy.run(replaced(read("lora"), "7", lora_1="foreign.safetensors"))
    run = comfy.run(replaced(read("lora"), "7", lora_1="good.safetensors"))
    assert "1 layers at strength 1, rank 4; trigger: k5style" in run.outputs["7"]["text"][0]


def test_comfyuis_own_lora_loader_changes_the_result(comfy, info):
    import torch
    from safetensors.torch import save_file

    module = "transformer.visual_transformer_blocks.2.feed_forward.in_layer"
    generator = torch.Generator().manual_seed(0)
    pair = {"lora_A": torch.randn(4, 192, generator=generator), "lora_B": torch.randn(768, 4, generator=generator)}
    save_file(
        {f"{module}.{name}.weight": tensor for name, tensor in pair.items()},
        comfy.base / "models" / "loras" / "stock.safetensors",
    )

    def picture(strength):
        loader = {"model": ["1", 0], "lora_name": "stock.safetensors", "strength_model": strength}
        flow = {**BASE, "9": {"class_type": "LoraLoaderModelOnly", "inputs": loader}, "6": ksampler(["9", 0])}
        return comfy.view(comfy.run(filled(flow, info)).outputs["8"]["images"][0])

    assert picture(0.0) != picture(1.0)


@pytest.mark.parametrize("workflow", ["text_to_image"])
def test_fifty_runs_leave_memory_where_it_was(comfy, info, workflow):
    flow = replaced(read(workflow), "3", batch_size=1)

    def runs(first, count):
        for seed in range(first, first + count):
            comfy.run(replaced(flow, "4", steps=1, seed=seed))

    runs(1000, 10)
    before = comfy.memory()
    runs(2000, 50)
    assert comfy.memory() - before < 120 * 2**20
