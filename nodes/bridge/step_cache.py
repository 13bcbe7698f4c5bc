"""MagCache as a MODEL patch, on our models and on ComfyUI's own Kandinsky 5 class.

Each sampling run makes its own state, so nothing outlives a run, a cancel or an error. Ours lets the core's cache stand
around its visual blocks. ComfyUI's class calls its blocks one by one: there the first one's replacement runs them all,
or none, and the others pass on what they get; patches that other nodes put on blocks stay in force.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.patcher_extension
import torch
from torch import Tensor

from ...kandinsky5_core.config import Variant, variant, variant_for_size
from ...kandinsky5_core.dit.model import AroundBlocks
from ...kandinsky5_core.sampling.cache_calibration import Calibration, check_calibration
from ...kandinsky5_core.sampling.released_ratios import released_ratios
from ...kandinsky5_core.sampling.schedule import flow_schedule
from ...kandinsky5_core.sampling.step_cache import (
    NEGATIVE,
    CacheCounts,
    CacheRatios,
    MagCache,
    MagSettings,
    StepCache,
    predicted_counts,
    why_off,
)
from ...kandinsky5_core.weights.cache_ratios import check_writable, find_ratios, ratios_path, write_ratios
from ...kandinsky5_core.weights.hashing import model_hash
from .dit import AROUND_OPTION, ComfyDiT
from .folders import AUTO, doubt, pick_variant
from .model import variant_of, weights_of
from .sampling import model_shift

log = logging.getLogger(__name__)

MODES = ("magcache", "calibrate", "off")
_KEY = "k5_step_cache"
"""Of our wrappers, and of the run's state in `transformer_options`."""
_Wrappers = comfy.patcher_extension.WrappersMP


@dataclass(frozen=True, kw_only=True)
class CachePatch:
    """What a MODEL's runs are to do."""

    mode: str
    settings: MagSettings
    row: Variant
    """Which checkpoint the MODEL is."""
    ratios_name: str
    """A released row whose ratios are used, or 'auto'."""
    weights: Path | None
    named: bool
    tell: Callable[[str], None]

    def row_for(self, latent_shape: Sequence[int]) -> Variant:
        """The row of the checkpoint for latents of that size: SD or HD."""
        if self.named:
            return self.row
        return variant_for_size(self.row, 8 * latent_shape[-2], 8 * latent_shape[-1])

    def ratios_for(self, row: Variant) -> CacheRatios | None:
        if self.ratios_name == AUTO:
            return find_ratios(row, self.weights)
        return released_ratios(self.ratios_name)


@dataclass
class Run:
    """The state of one sampling run."""

    patch: CachePatch
    row: Variant
    sigmas: list[float]
    replaced: dict[Any, int]
    """Patches on blocks as the run began, by identity."""
    cache: StepCache
    counts: CacheCounts = field(default_factory=CacheCounts)
    calibration: Calibration | None = None

    def told(self) -> str:
        """What became of it, when it ends."""
        share = f"{self.counts.skipped} of {self.counts.evaluations} block evaluations ({100 * self.counts.share:.0f} %)"
        return f"MagCache skipped {share} in {len(self.sigmas) - 1} steps"

    def save(self) -> str:
        """Writes the measured ratios beside the model's file; the picture stays where that cannot be."""
        path = ratios_path(self.patch.weights)
        try:
            ratios = self.calibration.ratios(self.row)
        except ValueError as error:
            return f"not calibrated: {error}"
        write_ratios(path, ratios, self.patch.weights, model_hash=model_hash(self.patch.weights, want="dit"))
        return f"calibrated over {ratios.steps} steps; saved {path}"


def patch_step_cache(
    model: Any, mode: str, settings: MagSettings, ratios_name: str, tell: Callable[[str], None] = log.info
) -> tuple[Any, str]:
    """A clone of the MODEL with the cache, and what to expect of it, in words.

    Args:
        tell: Gets a line when a run ends.

    Raises:
        ValueError: the MODEL is no Kandinsky 5, or it cannot be calibrated.
    """
    if mode not in MODES:
        raise ValueError(f"mode '{mode}' is unknown; use one of {', '.join(MODES)}")
    if not isinstance(model.model, comfy.model_base.Kandinsky5):
        raise ValueError("model is no Kandinsky 5; load one with Load Kandinsky 5 Model or Load Diffusion Model")
    patched = model.clone()
    for kind in (_Wrappers.OUTER_SAMPLE, _Wrappers.DIFFUSION_MODEL):
        patched.remove_wrappers_with_key(kind, _KEY)
    if mode == "off":
        return patched, "off"
    patch, guessed = _patch_of(model, mode, settings, ratios_name, tell)
    if mode == "calibrate":
        _check_calibration(patch)
        told = f"calibrate: the next sampling run computes every step and writes {ratios_path(patch.weights).name}"
    else:
        ratios = patch.ratios_for(patch.row)
        off = why_off(patch.row, ratios)
        if off is not None:
            log.warning("Kandinsky 5: the step cache is off: %s", off)
            return patched, f"off: {off}"
        told = _expected(patch, ratios, model_shift(model))
    patched.add_wrapper_with_key(_Wrappers.OUTER_SAMPLE, _KEY, SampleWrapper(patch))
    patched.add_wrapper_with_key(_Wrappers.DIFFUSION_MODEL, _KEY, cached_blocks)
    return patched, "\n".join(filter(None, (told, guessed)))


def _patch_of(
    model: Any, mode: str, settings: MagSettings, ratios_name: str, tell: Callable[[str], None]
) -> tuple[CachePatch, str]:
    """The patch, and what the user should know where the checkpoint was guessed."""
    row, weights, guessed = variant_of(model), weights_of(model), ""
    named = row is not None and model.model.diffusion_model.named
    if row is None and ratios_name != AUTO:
        row = variant(ratios_name)
    elif row is None:
        if weights is None:
            raise ValueError("which checkpoint the model is cannot be told from it; choose its ratios under 'ratios'")
        row, guessed = pick_variant(weights, AUTO), doubt(weights, AUTO).replace("'variant'", "'ratios'")
    elif ratios_name != AUTO and variant(ratios_name).dit != row.dit:
        raise ValueError(f"ratios '{ratios_name}' are of another size of model than {row.name}; use auto")
    patch = CachePatch(
        mode=mode, settings=settings, row=row, ratios_name=ratios_name, weights=weights, named=named, tell=tell
    )
    return patch, guessed


def _check_calibration(patch: CachePatch) -> None:
    check_calibration(patch.row, num_steps=patch.row.sampling.num_steps, denoise=1.0, sampler="euler")
    if patch.weights is None:
        raise ValueError("calibrate: the model's file is not known, so ratios cannot be saved beside it; load it with "
                         "Load Kandinsky 5 Model")  # fmt: skip
    check_writable(ratios_path(patch.weights))


def _expected(patch: CachePatch, ratios: CacheRatios, shift: float) -> str:
    sampling = patch.row.sampling
    sigmas = flow_schedule(sampling.num_steps, shift).tolist()
    counts = predicted_counts(ratios, patch.settings, sigmas, guided=sampling.guidance_scale != 1)
    return (
        f"MagCache, {ratios.source} ratios of {ratios.variant} ({ratios.steps} steps): in {sampling.num_steps} steps it "
        f"will skip {counts.skipped} of {counts.evaluations} block evaluations ({100 * counts.share:.0f} %)"
    )


@dataclass(frozen=True)
class SampleWrapper:
    """Around one sampling run: makes its state, and says what became of it."""

    patch: CachePatch

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        # ComfyUI's guider works on a copy of the options made for this run.
        options = guider.model_options.setdefault("transformer_options", {})
        run = self._start(guider.model_patcher, options, args[0].shape, args[3].tolist())
        if run is None:
            return executor(*args, **kwargs)
        options[_KEY] = run
        try:
            made = executor(*args, **kwargs)
        finally:
            options.pop(_KEY, None)
        if run.calibration is not None:
            self.patch.tell(run.save())
        else:
            self.patch.tell(run.told())
        return made

    def _start(
        self, model: Any, options: dict[str, Any], shape: Sequence[int], sigmas: list[float]
    ) -> Run | None:
        row = self.patch.row_for(shape)
        if self.patch.mode == "calibrate":
            calibration = Calibration(model_shift(model))
            return Run(self.patch, row, sigmas, _replaced(options), calibration.start(sigmas), calibration=calibration)
        ratios = self.patch.ratios_for(row)
        off = why_off(row, ratios)
        if off is not None:
            self.patch.tell(f"the step cache is off: {off}")
            return None
        cache = MagCache(ratios, self.patch.settings, sigmas)
        return Run(self.patch, row, sigmas, _replaced(options), cache, cache.counts)


def _replaced(options: dict[str, Any]) -> dict[Any, int]:
    return {key: id(patch) for key, patch in options.get("patches_replace", {}).get("dit", {}).items()}


def cached_blocks(
    executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Around one call of the diffusion model: puts the run's cache around its visual blocks."""
    options = kwargs.get("transformer_options") or {}
    run: Run | None = options.get(_KEY)
    # Some nodes evaluate a step again with blocks left out; that is no part of the run that is cached.
    if run is None or _replaced(options) != run.replaced:
        return executor(x, timestep, context, *args, **kwargs)
    sides = [min(index, NEGATIVE) for index in options["cond_or_uncond"]]
    around = run.cache.around(float(options["sigmas"][0]), sides, _keys(options, len(sides)))
    if isinstance(executor.class_obj, ComfyDiT):
        options = {**options, AROUND_OPTION: around}
    else:
        options = with_native_blocks(options, executor.class_obj, around)
    return executor(x, timestep, context, *args, **{**kwargs, "transformer_options": options})


def _keys(options: dict[str, Any], count: int) -> list[Hashable]:
    """A name for each part of the batch that stays the same from step to step: its conditioning and its window."""
    window = getattr(options.get("context_window"), "index_list", None)
    names = options.get("uuids") or range(count)
    return [(name, None if window is None else tuple(window)) for name in names]


def with_native_blocks(options: dict[str, Any], dit: torch.nn.Module, around: AroundBlocks) -> dict[str, Any]:
    """Options under which ComfyUI's own class runs its blocks inside `around`."""
    replaces = options.get("patches_replace", {})
    earlier = replaces.get("dit", {})
    ours = {("double_block", index): _pass_on for index in range(1, len(dit.visual_transformer_blocks))}
    ours["double_block", 0] = AllBlocks(dit, earlier, around)
    return {**options, "patches_replace": {**replaces, "dit": {**earlier, **ours}}}


def _pass_on(args: dict[str, Any], _: dict[str, Any]) -> dict[str, Tensor]:
    return {"x": args["x"]}


@dataclass(frozen=True)
class AllBlocks:
    """Stands for the first block of ComfyUI's class and runs them all."""

    dit: torch.nn.Module
    earlier: dict[Any, Any]
    """Other nodes' patches on blocks."""
    around: AroundBlocks

    def __call__(self, args: dict[str, Any], _: dict[str, Any]) -> dict[str, Tensor]:
        def blocks(x: Tensor, context: Tensor, time_embed: Tensor, *_: object) -> Tensor:
            given = {**args, "context": context, "time_embed": time_embed}
            for index, block in enumerate(self.dit.visual_transformer_blocks):
                x = self._block(index, block, {**given, "x": x})
            return x

        return {"x": self.around(blocks, args["x"], args["context"], args["time_embed"], None, None)}

    def _block(self, index: int, block: torch.nn.Module, given: dict[str, Any]) -> Tensor:
        given["transformer_options"]["block_index"] = index

        def original(args: dict[str, Any]) -> dict[str, Tensor]:
            wanted = ("x", "context", "time_embed", "freqs", "transformer_options")
            visual, text, time_embed, freqs, options = (args[name] for name in wanted)
            return {"x": block(visual, text, time_embed, freqs=freqs, transformer_options=options)}

        patch = self.earlier.get(("double_block", index))
        made = original(given) if patch is None else patch(given, {"original_block": original})
        return made["x"]
