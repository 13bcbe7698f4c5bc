"""What each shipped workflow does, in API form, and what its note says; `make_workflows.py` turns these into files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HF = "https://huggingface.co"
QWEN = f"`models/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors`, {HF}/Comfy-Org/Qwen-Image_ComfyUI"
CLIP = f"`models/text_encoders/clip_l.safetensors`, {HF}/comfyanonymous/flux_text_encoders"
VIDEO_VAE = f"`models/vae/hunyuan_video_vae_bf16.safetensors`, {HF}/Comfy-Org/HunyuanVideo_repackaged"
IMAGE_VAE = f"`models/vae/ae.safetensors`, {HF}/black-forest-labs/FLUX.1-dev"
RUNS = "Runs as it is with a built-in Nano model, which knows only drawn shapes. For real results put these files in place:"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One workflow."""

    title: str
    about: str
    model: str
    """File name and download page of the real model."""
    vae: str
    nodes: dict[str, dict[str, Any]]

    @property
    def note(self) -> str:
        """Markdown for the note on the canvas."""
        files = "\n".join(f"- {line}" for line in (self.model, QWEN, CLIP, self.vae))
        return f"## {self.title}\n{self.about}\n\n{RUNS}\n{files}\n\nThen choose the model in the loader; 'auto' finds the rest."


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One entry of an API workflow."""
    return {"class_type": kind, "inputs": inputs}


def model_line(file: str, repo: str) -> str:
    """A DiT file and its page."""
    return f"`models/diffusion_models/{file}.safetensors`, {HF}/kandinskylab/{repo}"


T2V = model_line("kandinsky5lite_t2v_sft_5s", "Kandinsky-5.0-T2V-Lite-sft-5s")
I2V = model_line("kandinsky5lite_i2v_5s", "Kandinsky-5.0-I2V-Lite-5s")
T2V_10 = model_line("kandinsky5lite_t2v_sft_10s", "Kandinsky-5.0-T2V-Lite-sft-10s")
T2I = model_line("kandinsky5lite_t2i", "Kandinsky-5.0-T2I-Lite")
I2I = model_line("kandinsky5lite_i2i", "Kandinsky-5.0-I2I-Lite")
MOVES = "a big red circle moves left on a black background"
RESTS = "a big green square stays still on a gray background"


def _video(prompt: str, **extra: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Loader 1, prompts 2, sampler 4, decode 5, save 6; the latent is node 3."""
    return {
        "1": node("K5LoadAll", model_name="built-in: nano-video"),
        "2": node("K5EncodePrompts", clip=["1", 1], positive=prompt, negative=""),
        "4": node("K5Sample", model=["1", 0], positive=["2", 0], negative=["2", 1], latent=["3", 0], seed=7),
        "5": node("K5DecodeVideo", latent=["4", 0], vae=["1", 2], fps=8.0),
        "6": node("SaveVideo", video=["5", 0], filename_prefix="kandinsky5/video", format="auto"),
        **extra,
    }


def _picture(model: str, prompt: str, **extra: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "1": node("K5LoadAll", model_name=f"built-in: {model}"),
        "2": node("K5EncodePrompts", clip=["1", 1], positive=prompt, negative=""),
        "4": node("K5Sample", model=["1", 0], positive=["2", 0], negative=["2", 1], latent=["3", 0], seed=7),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("SaveImage", images=["5", 0], filename_prefix="kandinsky5/image"),
        **extra,
    }


SPECS: dict[str, Spec] = {
    "text_to_video": Spec(
        title="Text to video",
        about="A clip from a prompt, with the steps, guidance and shift of the checkpoint.",
        model=T2V,
        vae=VIDEO_VAE,
        nodes=_video(MOVES, **{"3": node("K5EmptyLatent", model=["1", 0])}),
    ),
    "image_to_video": Spec(
        title="Image to video",
        about="The picture is the first frame. Replace Nano Picture by Load Image.",
        model=I2V,
        vae=VIDEO_VAE,
        nodes=_video(
            "a big purple square moves down on a black background",
            **{
                "7": node("K5NanoPicture", sentence="a big purple square moves down on a black background", seed=3),
                "3": node(
                    "K5ImageToVideo",
                    model=["1", 0],
                    positive=["2", 0],
                    negative=["2", 1],
                    vae=["1", 2],
                    start_image=["7", 0],
                ),
                "4": node("K5Sample", model=["1", 0], positive=["3", 0], negative=["3", 1], latent=["3", 2], seed=7),
            },
        ),
    ),
    "keyframes_and_loop": Spec(
        title="Keyframes and loop",
        about="Above: a first and a last frame. Below: the same picture at both ends; drop the last 4 frames to play it "
        "round. Released models were trained on the first frame only; other places are extrapolation.",
        model=I2V,
        vae=VIDEO_VAE,
        nodes=_video(
            MOVES,
            **{
                "7": node("K5NanoPicture", sentence=MOVES, frames=17, seed=1),
                "8": node("ImageFromBatch", image=["7", 0], batch_index=0, length=1),
                "9": node("ImageFromBatch", image=["7", 0], batch_index=16, length=1),
                "3": node(
                    "K5ImageToVideo",
                    model=["1", 0],
                    positive=["2", 0],
                    negative=["2", 1],
                    vae=["1", 2],
                    start_image=["8", 0],
                    end_image=["9", 0],
                ),
                "4": node("K5Sample", model=["1", 0], positive=["3", 0], negative=["3", 1], latent=["3", 2], seed=7),
                "10": node("K5EncodePrompts", clip=["1", 1], positive=RESTS, negative=""),
                "11": node("K5NanoPicture", sentence=RESTS, seed=2),
                "12": node(
                    "K5ImageToVideo",
                    model=["1", 0],
                    positive=["10", 0],
                    negative=["10", 1],
                    vae=["1", 2],
                    start_image=["11", 0],
                    loop=True,
                ),
                "13": node(
                    "K5Sample", model=["1", 0], positive=["12", 0], negative=["12", 1], latent=["12", 2], seed=8
                ),
                "14": node("K5DecodeVideo", latent=["13", 0], vae=["1", 2], fps=8.0),
                "15": node("ImageFromBatch", image=["14", 1], batch_index=0, length=13),
                "16": node("CreateVideo", images=["15", 0], fps=8.0),
                "17": node("SaveVideo", video=["16", 0], filename_prefix="kandinsky5/loop", format="auto"),
            },
        ),
    ),
    "long_video_by_extension": Spec(
        title="Long video by extension",
        about="The clip's last frames become the held beginning of the next piece, and the pieces are joined. Copy the "
        "lower group to go on again; each piece may have its own prompt.",
        model=I2V,
        vae=VIDEO_VAE,
        nodes=_video(
            RESTS,
            **{
                "3": node("K5EmptyLatent", model=["1", 0]),
                "7": node(
                    "K5ExtendVideo",
                    model=["1", 0],
                    positive=["2", 0],
                    negative=["2", 1],
                    vae=["1", 2],
                    clip=["5", 1],
                    overlap=5,
                ),
                "8": node("K5Sample", model=["1", 0], positive=["7", 0], negative=["7", 1], latent=["7", 2], seed=8),
                "9": node("K5DecodeVideo", latent=["8", 0], vae=["1", 2], fps=8.0),
                "10": node("K5JoinVideo", clip=["5", 1], piece=["9", 1], overlap=5),
                "11": node("CreateVideo", images=["10", 0], fps=8.0),
                "6": node("SaveVideo", video=["11", 0], filename_prefix="kandinsky5/long", format="auto"),
            },
        ),
    ),
    "text_to_image": Spec(
        title="Text to image",
        about="A batch of four pictures; row i has the noise of seed + i.",
        model=T2I,
        vae=IMAGE_VAE,
        nodes=_picture(
            "nano-image",
            "a big blue triangle on a gray background",
            **{"3": node("K5EmptyLatent", model=["1", 0], batch_size=4)},
        ),
    ),
    "edit_image": Spec(
        title="Edit an image by instruction",
        about="The picture goes into the model and before Qwen together with the instruction.",
        model=I2I,
        vae=IMAGE_VAE,
        nodes={
            "1": node("K5LoadAll", model_name="built-in: nano-edit"),
            "7": node("K5NanoPicture", sentence="a big red circle on a gray background"),
            "3": node(
                "K5EditConditioning",
                model=["1", 0],
                clip=["1", 1],
                vae=["1", 2],
                image=["7", 0],
                instruction="change the background to navy",
                negative="",
            ),
            "4": node("K5Sample", model=["1", 0], positive=["3", 0], negative=["3", 1], latent=["3", 2], seed=7),
            "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
            "6": node("SaveImage", images=["5", 0], filename_prefix="kandinsky5/edit"),
        },
    ),
    "inpaint": Spec(
        title="Inpaint",
        about="The masked part is made anew; Paste Back keeps every other pixel. Draw your own mask in Load Image's mask "
        "editor.",
        model=T2I,
        vae=IMAGE_VAE,
        nodes=_picture(
            "nano-image",
            "a big blue square on a gray background",
            **{
                "7": node("K5NanoPicture", sentence="a big red circle on a gray background"),
                "3": node("K5Inpaint", model=["1", 0], vae=["1", 2], image=["7", 0], mask=["7", 1], grow=6),
                "8": node("K5PasteBack", image=["5", 0], base=["3", 1], alpha=["3", 2]),
                "6": node("SaveImage", images=["8", 0], filename_prefix="kandinsky5/inpaint"),
            },
        ),
    ),
    "outpaint": Spec(
        title="Outpaint",
        about="Paints on the left and right of a picture; its own pixels stay but for a narrow strip.",
        model=T2I,
        vae=IMAGE_VAE,
        nodes=_picture(
            "nano-image",
            "a big red circle on a gray background",
            **{
                "7": node("K5NanoPicture", sentence="a big red circle on a gray background"),
                "3": node("K5Inpaint", model=["1", 0], vae=["1", 2], image=["7", 0], left=16, right=16),
                "8": node("K5PasteBack", image=["5", 0], base=["3", 1], alpha=["3", 2]),
                "6": node("SaveImage", images=["8", 0], filename_prefix="kandinsky5/outpaint"),
            },
        ),
    ),
    "lora": Spec(
        title="LoRA",
        about="Choose a file of models/loras in any key format. Its trigger word is put before the prompt. Saved with no "
        "LoRA chosen, so that it runs everywhere.",
        model=T2V,
        vae=VIDEO_VAE,
        nodes=_video(
            MOVES,
            **{
                "7": node("K5LoadLora", model=["1", 0]),
                "8": node("StringConcatenate", string_a=["7", 1], string_b=MOVES, delimiter=" "),
                "2": node("K5EncodePrompts", clip=["1", 1], positive=["8", 0], negative=""),
                "3": node("K5EmptyLatent", model=["1", 0]),
                "4": node("K5Sample", model=["7", 0], positive=["2", 0], negative=["2", 1], latent=["3", 0], seed=7),
            },
        ),
    ),
    "ten_seconds_nabla": Spec(
        title="Ten seconds with NABLA",
        about="Sparse attention computes only the blocks that matter. The 10-second checkpoints use it by themselves; "
        "the Attention node sets it by hand, here on the built-in model at twice its length.",
        model=T2V_10,
        vae=VIDEO_VAE,
        nodes=_video(
            RESTS,
            **{
                "3": node("K5EmptyLatent", model=["1", 0], frames=33, width=64, height=64),
                "7": node("K5Attention", model=["1", 0], mode="nabla", mass=0.9),
                "4": node("K5Sample", model=["7", 0], positive=["2", 0], negative=["2", 1], latent=["3", 0], seed=7),
            },
        ),
    ),
    "stock_nodes": Spec(
        title="Only ComfyUI's own nodes after the loader",
        about="The MODEL, CLIP and VAE are ComfyUI's own kinds: KSampler with euler and simple gives the official result.",
        model=T2V,
        vae=VIDEO_VAE,
        nodes={
            "1": node("K5LoadAll", model_name="built-in: nano-video"),
            "2": node("CLIPTextEncode", clip=["1", 1], text=MOVES),
            "3": node("CLIPTextEncode", clip=["1", 1], text=""),
            "4": node("EmptyHunyuanLatentVideo", width=64, height=64, length=17, batch_size=1),
            "5": node(
                "KSampler",
                model=["1", 0],
                positive=["2", 0],
                negative=["3", 0],
                latent_image=["4", 0],
                seed=7,
                steps=20,
                cfg=3.0,
                sampler_name="euler",
                scheduler="simple",
                denoise=1.0,
            ),
            "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
            "7": node("CreateVideo", images=["6", 0], fps=8.0),
            "8": node("SaveVideo", video=["7", 0], filename_prefix="kandinsky5/stock", format="auto"),
        },
    ),
}
"""By file name."""


def _train(data: dict[str, Any], name: str, prompts: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Data 21, settings 22, start 23, wait 24 and a plot of the loss 27."""
    return {
        "21": node("K5TrainingData", **data),
        "22": node("K5TrainingSettings", what="LoRA", rank=16, ema_decay=0.98, gradient_checkpointing=False, **settings),
        "23": node(
            "K5StartTraining", model_name="built-in: nano-video", data=["21", 0], settings=["22", 0], name=name,
            sample_prompts=prompts, sample_every=20,
        ),
        "24": node("K5WaitForTraining", job=["23", 0]),
        "27": node("LossGraphNode", loss=["24", 1], filename_prefix="kandinsky5/loss"),
    }  # fmt: skip


def _soup() -> dict[str, dict[str, Any]]:
    """Domains star (2x) and turquoise (3x), soup 40, rows of the sheet 51 to 53."""
    nodes: dict[str, dict[str, Any]] = {
        "1": node("K5LoadAll", model_name="built-in: nano-video"),
        "2": node("K5EncodePrompts", clip=["1", 1], positive="a big turquoise star on a black background", negative=""),
        "3": node("K5EmptyLatent", model=["1", 0]),
        "22": node("K5TrainingSettings", what="LoRA", rank=16, ema_decay=0.98, gradient_checkpointing=False, steps=40,
                   learning_rate=1e-3, warmup_steps=10, least_strength=0.5),
    }  # fmt: skip
    for base, domain in ((20, "star"), (30, "turquoise")):
        nodes |= {
            f"{base + 1}": node("K5TrainingData", folder=f"built-in: {domain}"),
            f"{base + 3}": node(
                "K5StartTraining", model_name="built-in: nano-video", data=[f"{base + 1}", 0], settings=["22", 0],
                name=f"soup-{domain}", sample_prompts="", sample_every=0,
            ),
            f"{base + 4}": node("K5WaitForTraining", job=[f"{base + 3}", 0]),
        }  # fmt: skip
    nodes["40"] = node("K5Soup", weighting="sqrt", name="soup-of-two", existing="replace", part_1=["24", 4], part_2=["34", 4])
    for row, name in enumerate((["24", 4], ["34", 4], ["40", 0]), 1):
        nodes |= {
            f"4{row}": node("LoraLoaderModelOnly", model=["1", 0], lora_name=name, strength_model=1.0),
            f"5{row}": node("K5Sample", model=[f"4{row}", 0], positive=["2", 0], negative=["2", 1], latent=["3", 0], seed=7),
            f"6{row}": node("VAEDecode", samples=[f"5{row}", 0], vae=["1", 2]),
        }
    return {
        **nodes,
        "70": node(
            "K5ContactSheet", images_1=["61", 0], images_2=["62", 0], images_3=["63", 0], labels="star\nturquoise\nsoup"
        ),
        "6": node("SaveImage", images=["70", 0], filename_prefix="kandinsky5/soup"),
    }


STAR = "a big red star on a black background"
SHORT = "40 steps show that everything works; 300 and more teach it."
TRAINS = (
    "Training is a process of its own: watch, stop and resume it in the side panel 'Kandinsky 5 jobs'. Cancel saves; run "
    "again to go on. For your own footage, put a folder with .txt captions into ComfyUI's input folder, name it in the "
    "data node, and choose your model twice: in Start Training and in the loader."
)

SPECS |= {
    "train_lora": Spec(
        title="Train a LoRA",
        about=f"Teaches the built-in model stars from 24 drawn clips, then uses what it learnt. {SHORT} {TRAINS}",
        model=T2V,
        vae=VIDEO_VAE,
        nodes=_video(
            STAR,
            **_train({"folder": "built-in: star"}, "star", STAR, steps=40, learning_rate=1e-3, warmup_steps=10),
            **{
                "3": node("K5EmptyLatent", model=["1", 0]),
                "7": node("K5LoadTrained", model=["1", 0], job=["24", 3]),
                "4": node("K5Sample", model=["7", 0], positive=["2", 0], negative=["2", 1], latent=["3", 0], seed=7),
            },
        ),
    ),
    "train_i2v_lora": Spec(
        title="Train an image to video LoRA",
        about=f"All clips with their clean first frame given and out of the loss, as the released models were trained. {SHORT} "
        + TRAINS,
        model=I2V,
        vae=VIDEO_VAE,
        nodes=_video(
            "a big purple square moves down on a black background",
            **_train(
                {"folder": "built-in: star", "tasks": "i2v 1"}, "star-i2v", STAR, steps=40, learning_rate=1e-3,
                warmup_steps=10,
            ),
            **{
                "8": node("K5NanoPicture", sentence="a big purple square moves down on a black background", seed=3),
                "7": node("K5LoadTrained", model=["1", 0], job=["24", 3]),
                "3": node(
                    "K5ImageToVideo", model=["1", 0], positive=["2", 0], negative=["2", 1], vae=["1", 2],
                    start_image=["8", 0],
                ),
                "4": node("K5Sample", model=["7", 0], positive=["3", 0], negative=["3", 1], latent=["3", 2], seed=7),
            },
        ),
    ),
    "train_edit_lora": Spec(
        title="Train an edit LoRA",
        about="Pairs of pictures before and after, with the instruction as caption: folders `source` and `target` with the "
        f"same names. {SHORT} {TRAINS}",
        model=I2I,
        vae=IMAGE_VAE,
        nodes={
            **_train(
                {"folder": "built-in: star-edits", "frame_budget": 8}, "star-edit", "turn the circle into a star",
                steps=40, learning_rate=1e-3, warmup_steps=10,
            ),
            "23": node(
                "K5StartTraining", model_name="built-in: nano-edit", data=["21", 0], settings=["22", 0],
                name="star-edit", sample_prompts="turn the circle into a star", sample_every=20, sample_image=["7", 0],
            ),
            "1": node("K5LoadAll", model_name="built-in: nano-edit"),
            "7": node("K5NanoPicture", sentence="a big red circle on a gray background"),
            "8": node("K5LoadTrained", model=["1", 0], job=["24", 3]),
            "3": node(
                "K5EditConditioning", model=["8", 0], clip=["1", 1], vae=["1", 2], image=["7", 0],
                instruction="turn the circle into a star", negative="",
            ),
            "4": node("K5Sample", model=["8", 0], positive=["3", 0], negative=["3", 1], latent=["3", 2], seed=7),
            "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
            "6": node("SaveImage", images=["5", 0], filename_prefix="kandinsky5/edit-lora"),
        },
    ),
    "soup": Spec(
        title="Soup of two domains",
        about="One LoRA for each domain folder, averaged into a soup, and all three compared on the same prompt and seed. "
        f"The second job waits until the first has left the card. {SHORT} {TRAINS}",
        model=T2V,
        vae=VIDEO_VAE,
        nodes=_soup(),
    ),
}  # fmt: skip
