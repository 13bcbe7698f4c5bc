"""Sampling with the variant's own settings."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .bridge.frames import require_variant
from .bridge.sampling import SAMPLER_NAMES, SCHEDULES, SampleSettings, run_sampler, schedule, with_shift

CATEGORY = "Kandinsky 5/sample"
ZERO = "0: the variant's own."


class K5Sample(io.ComfyNode):
    """One node that takes everything from the variant."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5Sample",
            display_name="Kandinsky 5 Sample",
            category=CATEGORY,
            description="Samples with the steps, guidance and shift that the checkpoint was made for, and shows what it "
            "took. Row i of a batch has the noise of seed + i.",
            search_aliases=["ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="From a Kandinsky 5 loader, with any patches."),
                io.Conditioning.Input("positive", tooltip="What should be seen."),
                io.Conditioning.Input("negative", tooltip="What should not be seen; unused at guidance 1."),
                io.Latent.Input("latent", tooltip="Empty, held, or masked; from the latent and edit nodes."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="The same seed gives the same result.",
                ),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip=f"Sampling steps. {ZERO}"),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=50.0,
                    step=0.1,
                    tooltip=f"How strongly the prompt rules (CFG). 1 is off, for Flash models. {ZERO}",
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip=f"Warp of the noise schedule: more steps at high noise. {ZERO}",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 sampling starts from the latent: 0.4 keeps much, 0.8 little.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLER_NAMES),
                    default="euler",
                    optional=True,
                    advanced=True,
                    tooltip="euler is what the models are sampled with.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULES),
                    default="simple",
                    optional=True,
                    advanced=True,
                    tooltip="simple is the official schedule.",
                ),
            ],
            outputs=[io.Latent.Output(), io.String.Output(display_name="settings", tooltip="What was used.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int = 0,
        guidance: float = 0.0,
        shift: float = 0.0,
        denoise: float = 1.0,
        sampler_name: str = "euler",
        scheduler: str = "simple",
    ) -> io.NodeOutput:
        settings = SampleSettings.of(
            require_variant(model),
            model,
            steps=steps,
            guidance=guidance,
            shift=shift,
            denoise=denoise,
            seed=seed,
            sampler_name=sampler_name,
            scheduler=scheduler,
        )
        made = run_sampler(model, positive, negative, latent, settings)
        return io.NodeOutput(made, settings.told, ui=ui.PreviewText(settings.told))


class K5Schedule(io.ComfyNode):
    """The official sigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5Schedule",
            display_name="Kandinsky 5 Schedule",
            category=CATEGORY,
            description="The official noise schedule as SIGMAS, for the custom sampler nodes.",
            search_aliases=["sigmas", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="Gives steps and shift."),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip=f"Sampling steps. {ZERO}"),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="0: that of the model, with any shift node before it.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 for sampling that starts from a latent.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: Any, steps: int = 0, shift: float = 0.0, denoise: float = 1.0) -> io.NodeOutput:
        return io.NodeOutput(schedule(require_variant(model), model, steps, shift, denoise))


class K5Shift(io.ComfyNode):
    """Another warp of the schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5Shift",
            display_name="Kandinsky 5 Shift",
            category=CATEGORY,
            description="Changes the warp of the noise schedule: 5 for 5 seconds, 10 for 10 seconds, 3 for images.",
            search_aliases=["model sampling", "scheduler scale"],
            inputs=[
                io.Model.Input("model", tooltip="From a Kandinsky 5 loader."),
                io.Float.Input(
                    "shift", default=5.0, min=0.01, max=100.0, step=0.1, tooltip="Higher: more steps at high noise."
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, shift: float) -> io.NodeOutput:
        require_variant(model)
        return io.NodeOutput(with_shift(model, shift))
