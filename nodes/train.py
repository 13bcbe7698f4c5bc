"""Training: material, settings, and a job as a process of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io, ui

from ..train.config import (
    TARGETS,
    DataConfig,
    FitConfig,
    FlowConfig,
    JobConfig,
    LoraConfig,
    SampleConfig,
    SourceConfig,
    ValidationConfig,
)  # fmt: skip
from .bridge.folders import AUTO, choices, find_auto, variant_choices
from .bridge.jobs import (
    built_in_data,
    cached,
    check_name,
    data_path,
    jobs,
    keep_image,
    model_files,
    start,
    wait,
)  # fmt: skip
from .bridge.results import model_root

CATEGORY = "Kandinsky 5/train"
DATA, SETTINGS = io.Custom("K5_DATA"), io.Custom("K5_TRAINING")
MODEL_TIP = "The model that learns: a file of models/diffusion_models, or a built-in one."
LORA, FULL = "LoRA", "full fine-tune"
STRENGTHS = {"gentle": 0.5, "normal": 1.0, "strong": 3.0}
RATES = {LORA: 1e-4, FULL: 1e-5}
"""Learning rate at strength 'normal'."""


class K5TrainingData(io.ComfyNode):
    """Folders and tables to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TrainingData",
            display_name="Kandinsky 5 Training Data",
            category=CATEGORY,
            description="A folder of pictures, clips or edit pairs with .txt captions, or a JSONL, CSV or Parquet table. "
            "Connect another one before it to train on both.",
            search_aliases=["dataset", "training images", "captions"],
            inputs=[
                io.String.Input(
                    "folder",
                    default=built_in_data()[0],
                    tooltip="Name of a folder or table in ComfyUI's input folder; or a drawn one of this pack: "
                    + ", ".join(built_in_data()),
                ),
                io.String.Input(
                    "trigger", default="",
                    tooltip="A word put before every caption; put it into prompts to call up what was learnt.",
                ),
                DATA.Input(
                    "more", optional=True,
                    tooltip="Another data node: its folder and repeats are added; all else is as in this node.",
                ),
                io.Int.Input(
                    "repeats", default=1, min=1, max=1000, optional=True, advanced=True,
                    tooltip="How often one pass over the material shows this folder.",
                ),
                io.Int.Input(
                    "resolution", default=0, min=0, max=2048, step=16, optional=True, advanced=True,
                    tooltip="Side of the square that has as many pixels as a frame shall have. 0: the model's own sizes.",
                ),
                io.Int.Input(
                    "max_frames", default=0, min=0, max=481, optional=True, advanced=True,
                    tooltip="Longest clip, 4k+1 frames at the model's rate: 121 is 5 s at 24 a second. "
                    "0: the model's own length.",
                ),
                io.Float.Input(
                    "caption_dropout", default=0.1, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="Share of samples shown without their caption; guidance needs some.",
                ),
                io.Int.Input(
                    "frame_budget", default=0, min=0, max=4096, optional=True, advanced=True,
                    tooltip="Latent frames in a batch; a clip of 121 frames has 31, a picture 1. 0: one longest clip.",
                ),
                io.Int.Input(
                    "image_batch", default=0, min=0, max=1024, optional=True, advanced=True,
                    tooltip="Pictures in a batch of pictures. 0: the frame budget.",
                ),
                io.String.Input(
                    "tasks", default="", optional=True, advanced=True,
                    tooltip="Probabilities of t2v, i2v, t2i, i2i, such as 't2v 0.8, i2v 0.2'. Empty: the report's.",
                ),
                io.Boolean.Input(
                    "cache_text", default=True, optional=True, advanced=True,
                    tooltip="Keep text embeddings beside the latents: the text encoders then leave memory.",
                ),
                io.Boolean.Input(
                    "drop_duplicates", default=True, optional=True, advanced=True,
                    tooltip="Leave out pictures and clips that look the same as another.",
                ),
            ],
            outputs=[DATA.Output(display_name="data")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, folder: str, trigger: str, more: Any = None, repeats: int = 1, resolution: int = 0,
        max_frames: int = 0, caption_dropout: float = 0.1, frame_budget: int = 0, image_batch: int = 0,
        tasks: str = "", cache_text: bool = True, drop_duplicates: bool = True,
    ) -> io.NodeOutput:  # fmt: skip
        source = SourceConfig(path=str(data_path(folder)), repeats=repeats)
        data = DataConfig(
            sources=(*(more.sources if more else ()), source), trigger=trigger.strip(),
            area=resolution * resolution, max_frames=max_frames, caption_dropout=caption_dropout,
            frame_budget=frame_budget, image_batch=image_batch, tasks=read_tasks(tasks), cache_text=cache_text,
            drop_duplicates=drop_duplicates,
        )  # fmt: skip
        return io.NodeOutput(data)


def read_tasks(text: str) -> tuple[tuple[str, float], ...]:
    """'t2v 0.8, i2v 0.2' as pairs.

    Raises:
        ValueError: a part is not a task and a number.
    """
    pairs = []
    for part in filter(None, (part.strip() for part in text.replace(";", ",").split(","))):
        task, _, share = part.replace("=", " ").replace(":", " ").partition(" ")
        try:
            pairs.append((task, float(share)))
        except ValueError:
            raise ValueError(f"tasks: '{part}' is not a task and its probability, such as 't2v 0.8'") from None
    return tuple(pairs)


class K5TrainingSettings(io.ComfyNode):
    """What moves and how fast."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fit, lora, flow = _defaults(FitConfig), _defaults(LoraConfig), _defaults(FlowConfig)
        return io.Schema(
            node_id="K5TrainingSettings",
            display_name="Kandinsky 5 Training Settings",
            category=CATEGORY,
            description="What to train, for how long and how strongly. The rest has defaults that follow the report.",
            search_aliases=["train lora", "learning rate", "optimizer"],
            inputs=[
                io.Combo.Input(
                    "what", options=[LORA, FULL], default=LORA,
                    tooltip="A LoRA is a small file beside the model; a full fine-tune moves all its weights.",
                ),
                io.Int.Input(
                    "steps", default=1500, min=1, max=1_000_000,
                    tooltip="How often the weights move; each time on one batch, or as many as accumulation says.",
                ),
                io.Combo.Input(
                    "strength", options=list(STRENGTHS), default="normal",
                    tooltip="Learning rate: 5e-5, 1e-4 or 3e-4 for a LoRA; a tenth of it for a full fine-tune.",
                ),
                io.Int.Input(
                    "rank", default=lora["rank"], min=1, max=512,
                    tooltip="Of a LoRA: how much it can hold. 16 to 32 is usual; the official ones have 128.",
                ),
                io.Float.Input(
                    "learning_rate", default=0.0, min=0.0, max=1.0, step=0.000001, round=False, optional=True,
                    advanced=True, tooltip="0: by strength.",
                ),
                io.Float.Input(
                    "alpha", default=0.0, min=0.0, max=1024.0, optional=True, advanced=True,
                    tooltip="A LoRA is scaled by alpha / rank. 0: alpha is the rank, so the scale is 1.",
                ),
                io.Float.Input(
                    "dropout", default=0.0, min=0.0, max=0.9, step=0.01, optional=True, advanced=True,
                    tooltip="Share of a LoRA's inputs that a step leaves out, against learning by heart.",
                ),
                io.Boolean.Input(
                    "rank_stabilised", default=False, optional=True, advanced=True,
                    tooltip="rsLoRA: scaled by alpha / sqrt(rank), for high ranks; set alpha too.",
                ),
                io.String.Input(
                    "targets", default=", ".join(TARGETS), multiline=True, optional=True, advanced=True,
                    tooltip="Endings of the names of the layers that get a LoRA.",
                ),
                io.Combo.Input(
                    "optimizer", options=["adamw", "adamw8bit", "muon"], default="adamw", optional=True,
                    advanced=True,
                    tooltip="adamw8bit saves memory and needs bitsandbytes; muon is for matrices, AdamW for the rest.",
                ),
                io.Combo.Input(
                    "schedule", options=["cosine", "constant"], default=fit["schedule"], optional=True, advanced=True,
                    tooltip="After the warm-up the learning rate falls to 2 % (cosine) or stays (constant).",
                ),
                io.Int.Input(
                    "warmup_steps", default=100, min=0, max=100_000, optional=True, advanced=True,
                    tooltip="Steps in which the learning rate rises to its value.",
                ),
                io.Float.Input(
                    "weight_decay", default=0.0, min=0.0, max=1.0, step=0.0001, round=False, optional=True,
                    advanced=True, tooltip="The report uses 0 to 0.001.",
                ),
                io.Float.Input(
                    "max_grad_norm", default=1.0, min=0.01, max=100.0, optional=True, advanced=True,
                    tooltip="Gradients with a larger norm are scaled down to it.",
                ),
                io.Int.Input(
                    "accumulation", default=1, min=1, max=1024, optional=True, advanced=True,
                    tooltip="Batches whose gradients make one step; like a larger batch, for no memory.",
                ),
                io.Float.Input(
                    "ema_decay", default=0.99, min=0.0, max=0.9999, step=0.0001, round=False, optional=True,
                    advanced=True, tooltip="Of the averaged weights that are the result. 0: no average. The report: "
                    "0.9999, for runs of many thousand steps.",
                ),
                io.Combo.Input(
                    "noise", options=["logit_normal", "uniform"], default=flow["distribution"], optional=True,
                    advanced=True,
                    tooltip="Distribution of the noise levels before the shift; logit_normal prefers the middle ones.",
                ),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=100.0, step=0.1, optional=True, advanced=True,
                    tooltip="Warp of the noise levels as in sampling: more is more training at strong noise. "
                    "1: none. 0: the model's own.",
                ),
                io.Combo.Input(
                    "base_weights", options=["as loaded", "int8", "fp8"], default="as loaded", optional=True,
                    advanced=True,
                    tooltip="Of the frozen model below a LoRA: eight bits take half the memory and need torchao.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing", default=True, optional=True, advanced=True,
                    tooltip="Much less memory for a third more time.",
                ),
                io.Boolean.Input(
                    "bf16", default=False, optional=True, advanced=True,
                    tooltip="Compute a full fine-tune in bfloat16 while its weights stay fp32.",
                ),
                io.Combo.Input(
                    "nabla", options=["auto", "on", "off"], default="auto", optional=True, advanced=True,
                    tooltip="Sparse attention in training; auto: where the model was trained with it.",
                ),
                io.Int.Input(
                    "checkpoint_every", default=250, min=1, max=100_000, optional=True, advanced=True,
                    tooltip="Steps between checkpoints.",
                ),
                io.Int.Input(
                    "keep_last", default=2, min=1, max=100, optional=True, advanced=True,
                    tooltip="Checkpoints that stay, beside the best.",
                ),
                io.Int.Input(
                    # Else the frontend draws another seed after each run, and another seed is another job.
                    "seed", default=0, min=0, max=2**31 - 1, control_after_generate="fixed", optional=True,
                    advanced=True, tooltip="Of everything random in training. Another seed is another job.",
                ),
                io.String.Input(
                    "device", default="auto", optional=True, advanced=True,
                    tooltip="auto, cpu, cuda, cuda:1, ... A second card leaves the first to ComfyUI.",
                ),
                io.Int.Input(
                    "threads", default=0, min=0, max=512, optional=True, advanced=True, tooltip="CPU threads; 0: all."
                ),
                io.Float.Input(
                    "least_strength", default=1.0, min=0.1, max=1.0, step=0.05, optional=True, advanced=True,
                    tooltip="Below 1 a LoRA trains at random strengths from this to 1, so that it also works weakened; "
                    "0.5 for a soup of two.",
                ),
            ],
            outputs=[SETTINGS.Output(display_name="settings")],
        )  # fmt: skip

    @classmethod
    def execute(cls, what: str, steps: int, strength: str, rank: int, **rare: Any) -> io.NodeOutput:
        rate = rare.get("learning_rate") or RATES[what] * STRENGTHS[strength]
        named = {key: rare[key] for key in _FIT_INPUTS if key in rare}
        fit = FitConfig(num_steps=steps, learning_rate=rate, **named)
        lora = None
        if what == LORA:
            targets = rare.get("targets", "")
            lora = LoraConfig(
                rank=rank, alpha=rare.get("alpha") or float(rank), dropout=rare.get("dropout", 0.0),
                targets=tuple(filter(None, (part.strip() for part in targets.split(",")))) or TARGETS,
                rank_stabilised=rare.get("rank_stabilised", False),
                least_strength=rare.get("least_strength", 1.0),
            )  # fmt: skip
        base = rare.get("base_weights", "as loaded")
        return io.NodeOutput(
            {
                "fit": fit,
                "lora": lora,
                "flow": FlowConfig(distribution=rare.get("noise", "logit_normal"), shift=rare.get("shift", 0.0)),
                "base_weights": "" if base == "as loaded" else base,
                **{key: rare[key] for key in ("gradient_checkpointing", "nabla", "device", "threads") if key in rare},
            }
        )


_FIT_INPUTS = (
    "optimizer", "schedule", "warmup_steps", "weight_decay", "max_grad_norm", "accumulation", "ema_decay", "bf16",
    "checkpoint_every", "keep_last", "seed",
)  # fmt: skip


def _defaults(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


def _part_inputs() -> list[io.Input]:
    """The files beside the DiT."""
    usual = {"default": AUTO, "optional": True, "advanced": True, "tooltip": "auto: the usual file."}
    return [
        io.Combo.Input("text_encoder", options=[AUTO, *choices("text_encoders")], **usual),
        io.Combo.Input("clip_name", options=[AUTO, *choices("text_encoders")], **usual),
        io.Combo.Input("vae_name", options=[AUTO, *choices("vae")], **usual),
        io.Combo.Input(
            "variant", options=variant_choices(), default=AUTO, optional=True, advanced=True,
            tooltip="What the file is, where one file serves several uses.",
        ),
    ]  # fmt: skip


def _files(model_name: str, parts: dict[str, str]) -> dict[str, str]:
    """What a job calls the chosen files; `parts` without entries means 'auto'."""
    named = {name: parts.get(name, AUTO) for name in ("text_encoder", "clip_name", "vae_name")}
    variant = parts.get("variant", AUTO)
    return {
        **model_files(model_name, **find_auto(model_name, **named)), "variant": "" if variant == AUTO else variant,
    }  # fmt: skip


class K5CacheData(io.ComfyNode):
    """Scan and encode the material before training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5CacheData",
            display_name="Cache Kandinsky 5 Training Data",
            category=CATEGORY,
            is_output_node=True,
            description="Looks through the material (unreadable, too small, duplicates, buckets, cost) and encodes it, so "
            "that training starts at once. Optional: training does the same where it was not done. Cancel keeps what is "
            "encoded.",
            search_aliases=["encode dataset", "latent cache", "scan dataset"],
            inputs=[
                io.Combo.Input("model_name", options=choices("diffusion_models"), tooltip=MODEL_TIP),
                DATA.Input("data", tooltip="From a training data or cache node."),
                *_part_inputs(),
                io.String.Input(
                    "device", default="auto", optional=True, advanced=True, tooltip="auto, cpu, cuda, cuda:1, ..."
                ),
            ],
            outputs=[DATA.Output(display_name="data"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model_name: str, data: DataConfig, device: str = "auto", **parts: str) -> io.NodeOutput:
        config = JobConfig(
            name="cache", data=cached(data), only_cache=True, fit=FitConfig(num_steps=1, learning_rate=1.0), device=device,
            validation=ValidationConfig(every=0), **_files(model_name, parts),
        )  # fmt: skip
        job = start(config, again=True)
        try:
            wait(job)
            report = job.scan_report()
        finally:
            jobs().delete(job.id)
        return io.NodeOutput(data, report, ui=ui.PreviewText(report))


class K5StartTraining(io.ComfyNode):
    """Start a job and return at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5StartTraining",
            display_name="Start Kandinsky 5 Training",
            category=CATEGORY,
            is_output_node=True,
            description="Starts training as a process of its own and returns the job's id at once. Run again with the "
            "same settings, it goes on with that job, or finds it done. Watch it in the side panel 'Kandinsky 5 jobs'.",
            search_aliases=["train lora", "fine-tune"],
            inputs=[
                io.Combo.Input(
                    "model_name", options=choices("diffusion_models"), tooltip=MODEL_TIP
                ),
                DATA.Input("data", tooltip="From a training data or cache node."),
                SETTINGS.Input("settings", tooltip="From a training settings node."),
                io.String.Input(
                    "name", default="my-lora",
                    tooltip="Of the job and of its file in models/loras; "
                    "that of a full fine-tune is in models/diffusion_models.",
                ),
                io.String.Input(
                    "sample_prompts", multiline=True, default="",
                    tooltip="Each line gives a sample in the model's own size and length, "
                    "from the same noise every time.",
                ),
                io.Int.Input(
                    "sample_every", default=250, min=0, max=100_000,
                    tooltip="Steps between samples, and between validation losses; 0: neither.",
                ),
                io.Image.Input(
                    "sample_image", optional=True,
                    tooltip="For models that animate or edit a picture: the one that samples begin from.",
                ),
                *_part_inputs(),
                io.Int.Input(
                    "sample_steps", default=0, min=0, max=1000, optional=True, advanced=True,
                    tooltip="Sampling steps of the samples. 0: the model's own.",
                ),
                io.Int.Input(
                    "sample_frames", default=0, min=0, max=481, optional=True, advanced=True,
                    tooltip="Frames of the samples, 4k+1. 0: the model's own; fewer are much faster.",
                ),
                io.Combo.Input(
                    "if_done_before", options=["continue", "start anew"], default="continue", optional=True,
                    advanced=True,
                    tooltip="When a job with the same settings is there: go on with it (or take its result), "
                    "or make another.",
                ),
            ],
            outputs=[io.String.Output(display_name="job", tooltip="The job's id, for the nodes that wait and look.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model_name: str, data: DataConfig, settings: dict[str, Any], name: str, sample_prompts: str,
        sample_every: int, sample_image: Any = None, sample_steps: int = 0, sample_frames: int = 0,
        if_done_before: str = "continue", **parts: str,
    ) -> io.NodeOutput:  # fmt: skip
        picture = "" if sample_image is None else str(keep_image(sample_image))
        prompts = [line.strip() for line in sample_prompts.splitlines() if line.strip()]
        samples = tuple(SampleConfig(prompt=prompt, image=picture, seed=row) for row, prompt in enumerate(prompts))
        config = JobConfig(
            name=check_name(name), data=cached(data),
            validation=ValidationConfig(
                every=sample_every, samples=samples, num_steps=sample_steps, num_frames=sample_frames
            ),
            output_folder=str(model_root("loras" if settings["lora"] else "diffusion_models")),
            **_files(model_name, parts), **settings,
        )  # fmt: skip
        job = start(config, again=if_done_before != "continue")
        return io.NodeOutput(job.id, ui=ui.PreviewText(f"job {job.id}: {job.status().state}"))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> object:
        """Runs again when jobs came or went: the one it started may have been deleted."""
        return tuple(job.id for job in jobs().all())
