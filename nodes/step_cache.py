"""A MODEL that skips steps that change little."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..kandinsky5_core.sampling.released_ratios import released_names
from ..kandinsky5_core.sampling.step_cache import MagSettings
from .bridge.folders import AUTO
from .bridge.progress import tell_node
from .bridge.step_cache import MODES, patch_step_cache

log = logging.getLogger(__name__)

CATEGORY = "Kandinsky 5/optimize"


class K5StepCache(io.ComfyNode):
    """MagCache on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5StepCache",
            display_name="Kandinsky 5 Step Cache",
            category=CATEGORY,
            description="Skips the long part of steps that change little (MagCache): about twice as fast. Shows what it "
            "will skip, and after sampling what it did. Works on our MODEL and on Kandinsky 5 models of ComfyUI's own "
            "Load Diffusion Model, with any sampler and LoRAs before or after it. Off for distilled models.",
            search_aliases=["magcache", "teacache", "easycache", "speed"],
            inputs=[
                io.Model.Input("model", tooltip="A Kandinsky 5 MODEL."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="magcache",
                    tooltip="calibrate: the next run computes all steps, measures the model's ratios and saves them "
                    "beside its file, where they are found from then on.",
                ),
                io.Float.Input(
                    "threshold",
                    default=MagSettings.threshold,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Error that the skipped steps in a row may add up to. Higher is faster; 0 skips nothing.",
                ),
                io.Int.Input(
                    "max_skip",
                    default=MagSettings.max_skip,
                    min=0,
                    max=100,
                    tooltip="How many steps in a row may be skipped.",
                ),
                io.Float.Input(
                    "retain",
                    default=MagSettings.retain,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the run, from its beginning, that is always computed: composition and motion are "
                    "decided there.",
                ),
                io.Combo.Input(
                    "ratios",
                    options=[AUTO, *released_names()],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Whose ratios are used. auto: those calibrated for the file, else those of its checkpoint.",
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="report", tooltip="What it will skip.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        mode: str = "magcache",
        threshold: float = MagSettings.threshold,
        max_skip: int = MagSettings.max_skip,
        retain: float = MagSettings.retain,
        ratios: str = AUTO,
    ) -> io.NodeOutput:
        settings = MagSettings(threshold=threshold, max_skip=max_skip, retain=retain)
        node = cls.hidden.unique_id if cls.hidden is not None else None

        def tell(line: str) -> None:
            log.info("Kandinsky 5: %s", line)
            tell_node(line, node)

        patched, report = patch_step_cache(model, mode, settings, ratios, tell)
        return io.NodeOutput(patched, report, ui=ui.PreviewText(report))
