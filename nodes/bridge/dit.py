"""The core's DiT with the forward that ComfyUI's model classes call.

Same layers, same names: only what comes in (separate tensors instead of one input) and the hooks that ComfyUI's
patches expect (wrappers, block replacement, attention override) are added.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...kandinsky5_core.attention.dense import AttentionFn, dense_attention
from ...kandinsky5_core.conditioning import ImageConditioning, TextConditioning
from ...kandinsky5_core.config import NablaConfig, Variant, variant_for_size
from ...kandinsky5_core.dit.model import AroundBlocks, DiffusionTransformer
from ...kandinsky5_core.dit.plan import VisualPlan, plan_visual
from ...kandinsky5_core.sampling.guidance import model_input

ATTENTION_OPTION = "k5_attention"
"""Key in `transformer_options`: a NablaConfig, or None for dense; absent: as the checkpoint was trained."""
AROUND_OPTION = "k5_around_blocks"
"""Key in `transformer_options`: what stands around the visual blocks in this call, such as a step cache."""


@dataclass(frozen=True, kw_only=True)
class PatchedPlan(VisualPlan):
    """A plan that also carries what ComfyUI's patches ask for in this call."""

    options: dict[str, Any] = field(default_factory=dict)

    @property
    def attention(self) -> AttentionFn:
        """NABLA, the core's dense attention, or ComfyUI's own where a patch or its command line chose one."""
        if self.nabla is not None:
            return self.nabla
        if "optimized_attention_override" not in self.options and not _chosen_at_start():
            return dense_attention

        def chosen(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None) -> Tensor:
            assert key_mask is None
            return optimized_attention(
                query,
                key,
                value,
                heads=query.shape[1],
                skip_reshape=True,
                skip_output_reshape=True,
                transformer_options=self.options,
            )

        return chosen


@torch.compiler.disable
def _around(options: dict[str, Any]) -> AroundBlocks | None:
    """What stands around the visual blocks in this call.

    Outside of compiled graphs: a compiled one that has once seen the key asks every later call for it.
    """
    return options.get(AROUND_OPTION)


def _chosen_at_start() -> bool:
    management = comfy.model_management
    return management.sage_attention_enabled() or management.flash_attention_enabled()


class ComfyDiT(DiffusionTransformer):
    """A `DiffusionTransformer` behind ComfyUI's calling convention."""

    def __init__(self, variant: Variant, *, ops: ModuleType, named: bool = True) -> None:
        """
        Args:
            named: The user chose the row; otherwise the size chooses among rows of one checkpoint (SD or HD).
        """
        super().__init__(variant.dit, ops=ops)
        self.variant, self.named = variant, named
        self.dtype = torch.float32
        self._plan: tuple[object, VisualPlan] | None = None

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        *,
        transformer_options: dict[str, Any] | None = None,
        **given: Tensor,
    ) -> Tensor:
        options = transformer_options if transformer_options is not None else {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self.velocity, self, wrappers)
        return executor.execute(x, timestep, context, y, transformer_options=options, **given)

    def velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor,
        *,
        transformer_options: dict[str, Any],
        attention_mask: Tensor | None = None,
        k5_source: Tensor | None = None,
        k5_clean: Tensor | None = None,
        k5_given: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """The velocity for latents (B, 16, H, W) or (B, 16, T, H, W).

        Args:
            context: (B, L, 3584) text, with `attention_mask` (B, L) where rows are padded.
            y: (B, 768) pooled text.
            k5_source: Latents for the source channels; editing.
            k5_clean, k5_given: Latents that are held wherever the mask (B, 1, T, 1 or H, 1 or W) is 1.
        """
        flat = x.ndim == 4
        latents = x.unsqueeze(2) if flat else x
        image = _image(k5_source, k5_clean, k5_given, flat=flat)
        mask = torch.ones(context.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask > 0
        text = TextConditioning(embeds=context, pooled=y, mask=mask.to(context.device))
        plan = PatchedPlan(**vars(self.plan_for(latents, transformer_options)), options=transformer_options)
        around = _around(transformer_options)
        result = super().forward(model_input(latents, image, self.config), timestep, text, plan, around)
        if image is not None and image.clean is not None:
            result = _towards_given(result, latents, image, timestep)
        return result.squeeze(2) if flat else result

    def plan_for(self, latents: Tensor, options: dict[str, Any]) -> VisualPlan:
        """Positions and attention of this size; the last one is kept for the steps of a run."""
        _, ph, pw = self.config.patch_size
        grid = (latents.shape[2], latents.shape[3] // ph, latents.shape[4] // pw)
        if latents.shape[3] % ph or latents.shape[4] % pw:
            size = f"{latents.shape[4] * 8}x{latents.shape[3] * 8}"
            raise ValueError(f"latents of {size} pixels do not fit; width and height must be multiples of {8 * pw}")
        if self.variant.vae.kind == "flux" and latents.shape[2] > 1:
            raise ValueError(
                f"the latent holds {latents.shape[2]} latent frames and {self.variant.name} makes pictures; use Kandinsky "
                "5 Empty Latent with this model, or load a video model"
            )
        row = self.row_for(8 * latents.shape[3], 8 * latents.shape[4])
        nabla: NablaConfig | None = options.get(ATTENTION_OPTION, row.nabla)
        scale = row.rope_scale
        key = (grid, nabla, scale, latents.device)
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, plan_visual(self.config, grid, scale, nabla, latents.device))
        return self._plan[1]

    def row_for(self, height: int, width: int) -> Variant:
        """The row of this checkpoint for frames of that many pixels."""
        return self.variant if self.named else variant_for_size(self.variant, height, width)

    def visual_blocks(
        self, tokens: Tensor, text: Tensor, time_embed: Tensor, plan: VisualPlan, text_mask: Tensor | None
    ) -> Tensor:
        """As in the core, with ComfyUI's block replacement patches."""
        options = plan.options if isinstance(plan, PatchedPlan) else {}
        replaced = options.get("patches_replace", {}).get("dit", {})
        options["total_blocks"] = len(self.visual_transformer_blocks)
        options["block_type"] = "double"
        for index, block in enumerate(self.visual_transformer_blocks):
            options["block_index"] = index

            def run(args: dict[str, Any], block: torch.nn.Module = block) -> dict[str, Tensor]:
                return {"x": block(args["x"], text, time_embed, plan.rope, plan.attention, text_mask)}

            patch = replaced.get(("double_block", index))
            if patch is None:
                tokens = block(tokens, text, time_embed, plan.rope, plan.attention, text_mask)
            else:
                args = {"x": tokens, "context": text, "transformer_options": options}
                tokens = patch(args, {"original_block": run})["x"]
        return tokens


def _towards_given(velocity: Tensor, latents: Tensor, image: ImageConditioning, timestep: Tensor) -> Tensor:
    """Where latents are given, the velocity that ends on them, so that any sampler returns them as they are."""
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1).clamp_min(1e-6)
    straight = (latents - image.clean) / sigma
    return torch.where(image.mask.to(latents) > 0, straight.to(velocity), velocity)


def _image(
    source: Tensor | None, clean: Tensor | None, given: Tensor | None, *, flat: bool
) -> ImageConditioning | None:
    if source is None and clean is None:
        return None
    if flat:
        source, clean, given = (
            part if part is None or part.ndim == 5 else part.unsqueeze(2) for part in (source, clean, given)
        )
    if source is not None:
        return ImageConditioning(source=source, mask=torch.ones_like(source[:, :1]))
    return replace(ImageConditioning(), clean=clean, mask=given)
