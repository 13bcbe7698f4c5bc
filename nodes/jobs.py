"""Looking at training jobs, waiting for them, and using what they made."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .bridge.frames import require_variant
from .bridge.jobs import continued, jobs, lora_weights, model_name, wait
from .bridge.lora import apply_file
from .bridge.model import load_model
from .bridge.plots import loss_plot, sample_sheet
from .bridge.results import FileName

CATEGORY = "Kandinsky 5/train"
LORA_MODEL, LOSS_MAP = io.Custom("LORA_MODEL"), io.Custom("LOSS_MAP")
JOB_TIP = "Id of a job, from the start node or copied from the side panel."


class K5WaitForTraining(io.ComfyNode):
    """Hold the queue until a job is done."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5WaitForTraining",
            display_name="Wait for Kandinsky 5 Training",
            category=CATEGORY,
            description="Waits until the job is done, with its progress and samples; a job that was stopped or cut off "
            "goes on. While it waits the card belongs to the job. Cancel saves and stops the job; run again to go on.",
            search_aliases=["train lora", "wait for job"],
            inputs=[io.String.Input("job", tooltip=JOB_TIP, force_input=True)],
            outputs=[
                LORA_MODEL.Output(
                    display_name="lora",
                    tooltip="For Save LoRA Weights and Load LoRA Model; empty after a full fine-tune.",
                ),
                LOSS_MAP.Output(display_name="loss", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps"),
                io.String.Output(display_name="job", tooltip="The same id, once it is done."),
                FileName.Output(
                    display_name="name",
                    tooltip="Of the file in models/loras or models/diffusion_models, for any loader or a soup.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, job: str) -> io.NodeOutput:
        found = continued(jobs().get(job))
        status = wait(found)
        config, result = found.config(), found.result()
        weights = lora_weights(result) if config.lora is not None and result is not None else {}
        losses = [record["loss"] for record in found.progress()]
        return io.NodeOutput(weights, {"loss": losses}, status.step, job, model_name(result))

    @classmethod
    def fingerprint_inputs(cls, job: str | None) -> object:
        """Looked at again whenever the job has moved on; a linked id is not known yet."""
        if job is None:
            return float("nan")
        status = jobs().get(job).status()
        return (status.state, status.step)


class K5TrainingStatus(io.ComfyNode):
    """A job's state as pictures and text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TrainingStatus",
            display_name="Kandinsky 5 Training Status",
            category=CATEGORY,
            is_output_node=True,
            description="How a job stands now: its loss as a plot, its samples as a sheet with a row for each time they "
            "were made, and a report. Does not wait.",
            search_aliases=["loss plot", "training samples"],
            inputs=[io.String.Input("job", tooltip=JOB_TIP, force_input=True)],
            outputs=[
                io.Image.Output(display_name="plot"),
                io.Image.Output(display_name="samples"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, job: str) -> io.NodeOutput:
        found = jobs().get(job)
        status = found.status()
        report = "\n".join(
            filter(None, (f"{found.id}: {status.state}, step {status.step} of {status.num_steps}", status.message,
            f"loss {status.loss:.4f}" if status.loss is not None else "",
            f"best validation loss {status.best_loss:.4f}" if status.best_loss is not None else "",
            f"memory peak {status.peak_bytes / 2**30:.2f} GiB" if status.peak_bytes else "",
            f"result {status.result}" if status.result else ""))
        )  # fmt: skip
        plot = loss_plot(found.progress())
        return io.NodeOutput(plot, sample_sheet(found.samples()), report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, job: str | None) -> object:
        """Looked at again whenever the job has moved on; a linked id is not known yet."""
        if job is None:
            return float("nan")
        status = jobs().get(job).status()
        return (status.state, status.step)


class K5LoadTrained(io.ComfyNode):
    """What a job made, on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5LoadTrained",
            display_name="Load Trained Kandinsky 5",
            category=CATEGORY,
            description="The MODEL with the LoRA that a job made, or the model that a full fine-tune made. Of a job "
            "that was stopped, or a LoRA's that still runs: what its last checkpoint gave.",
            search_aliases=["load lora", "training result"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the job began from."),
                io.String.Input("job", tooltip=JOB_TIP, force_input=True),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05,
                    tooltip="Of a LoRA: 1 as trained, 0 off. A full fine-tune knows no strength.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="file"),
                io.String.Output(display_name="trigger", tooltip="The word to put into prompts."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, job: str, strength: float = 1.0) -> io.NodeOutput:
        found = jobs().get(job)
        result = found.result()
        if result is None:
            raise ValueError(f"job {job} has no result yet ({found.status().state}); wait for its first checkpoint")
        config = found.config()
        if config.lora is not None:
            model, told = apply_file(model, result, strength)
            return io.NodeOutput(model, str(result), config.data.trigger, ui=ui.PreviewText(told.line))
        trained = load_model(result, require_variant(model), None, named=True)
        return io.NodeOutput(trained, str(result), config.data.trigger, ui=ui.PreviewText(result.name))

    @classmethod
    def fingerprint_inputs(cls, model: Any, job: str | None, strength: float = 1.0) -> object:
        """Another result is another model; a linked id is not known yet."""
        if job is None:
            return float("nan")
        result = jobs().get(job).result()
        return None if result is None else (str(result), result.stat().st_mtime_ns)
