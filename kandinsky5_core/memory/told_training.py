"""What a training step needs, as text and as values, with the report's formulas beside it."""

from __future__ import annotations

from ..config import Variant
from ..shapes import VideoShape
from .choose import GIB
from .training import TrainingJob, report_bytes, report_step_time, training_need


def training_text(job: TrainingJob, variant: Variant, shape: VideoShape, latent_frames: int) -> str:
    """A line for each part, and the report's formulas."""
    need = training_need(job)
    what = f"LoRA of rank {job.rank}" if job.rank else "all weights"
    lines = [
        f"{variant.name}, {what}: {shape.width}x{shape.height}, {shape.frames} frames, {job.num_tokens} tokens; "
        f"{job.optimizer}, {'with' if job.checkpointing else 'without'} gradient checkpointing"
    ]
    parts = {**vars(need), "together": need.total}
    lines += [f"{name:<12}{size / GIB:>9.2f} GiB" for name, size in parts.items()]
    values = training_values(job, latent_frames * shape.height * shape.width)
    lines.append(
        f"report (1): step time {values['report_step']:.0f} in its units; (2): {values['report_bytes'] / GIB:.1f} GiB, "
        f"{values['report_bytes_offloaded'] / GIB:.1f} with activations offloaded; for full training, not for a LoRA"
    )
    return "\n".join(lines)


def training_values(job: TrainingJob, pixels: int) -> dict[str, object]:
    """For JSON, in bytes."""
    need = training_need(job)
    return {
        "moving": job.moving, "tokens": job.num_tokens, **vars(need), "total": need.total,
        "report_step": report_step_time(job.config, pixels, 1),
        "report_bytes": report_bytes(job.config, job.num_tokens),
        "report_bytes_offloaded": report_bytes(job.config, job.num_tokens, offloaded=True),
    }  # fmt: skip
