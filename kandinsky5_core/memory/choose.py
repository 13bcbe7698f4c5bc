"""Which settings fit a job into a card: the fewest changes, those that cost least first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..shapes import VideoShape
from .estimate import Job, Need, Settings, dit_work, estimate, network_bytes
from .options import MemoryOptions

GIB = 2**30
BUDGETS = (8, 12, 16, 24, 48, 80)
"""Device memory of cards people have, GiB."""
RESERVE_BYTES = 3 * GIB // 4
RESERVE_SHARE = 0.05
"""Kept free: the driver's context and libraries, and a share that the allocator cannot use in one piece."""
BUSY_TOKENS = 16_384
"""Of `sampling.guidance_batch`: clips of more tokens keep an accelerator busy alone."""
VAE_BUDGETS = (2 * GIB, GIB, GIB // 2, GIB // 4)
STAGE_NAMES = {"load": "loading", "text": "text encoding", "vae_encode": "VAE encoding", "dit": "sampling",
               "vae_decode": "VAE decoding"}  # fmt: skip


class DoesNotFitError(ValueError):
    """No settings fit the job into the memory that there is."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings for a budget."""

    job: Job
    settings: Settings
    needs: tuple[Need, ...]
    reasons: tuple[str, ...]
    """Why each setting differs from the plain ones, in the order they were taken; empty where all fits as it is."""
    budget_bytes: int
    reserve_bytes: int
    cpu_bytes: int | None

    @property
    def peak(self) -> Need:
        """The stage that needs most of the device."""
        return max(self.needs, key=lambda need: need.device)

    @property
    def cpu_peak(self) -> int:
        """Most that is needed beside the device."""
        return max(need.cpu for need in self.needs)


def reserve(budget_bytes: int) -> int:
    """What of a budget stays free."""
    return RESERVE_BYTES + round(RESERVE_SHARE * budget_bytes)


def plain_settings(job: Job) -> Settings:
    """Everything on the device as it is, with guidance in one batch where that is quicker."""
    settings = Settings(guidance_batched=job.guided and job.shape.batch * job.num_tokens <= BUSY_TOKENS)
    return replace(settings, memory=replace(settings.memory, offload="none"))


def choose(job: Job, *, budget_bytes: int, cpu_bytes: int | None = None) -> Choice:
    """The first settings that fit, changing one thing at a time: what changes no result first, then what is slower,
    then what is less exact; and only in the stages that are too large.

    Args:
        budget_bytes: Memory of the device, in all.
        cpu_bytes: Memory of the process beside it; None: not looked at.

    Raises:
        DoesNotFitError: no settings fit; says which stage is too large, what it needs, and what size would fit.
    """
    usable = budget_bytes - reserve(budget_bytes)
    settings, reasons = plain_settings(job), []
    needs = estimate(job, settings)
    for change, reason in _changes(job):
        over = _too_large(needs, usable, cpu_bytes)
        if not over:
            break
        changed = change(settings, over, usable)
        if changed != settings:
            told = f"{reason}: {_told(over, needs, usable)}"
            settings, needs = changed, estimate(job, changed)
            reasons.append(told)
    over = _too_large(needs, usable, cpu_bytes)
    if over:
        raise DoesNotFitError(_refusal(job, needs, over, budget_bytes, usable, cpu_bytes))
    return Choice(
        job=job, settings=settings, needs=needs, reasons=tuple(reasons), budget_bytes=budget_bytes,
        reserve_bytes=budget_bytes - usable, cpu_bytes=cpu_bytes,
    )  # fmt: skip


Change = Callable[[Settings, set[str], int], Settings]
"""Settings, the stages that are too large ('cpu' for memory beside the device) and usable bytes to new settings."""


def _changes(job: Job) -> Iterator[tuple[Change, str]]:
    """Every change in order, with what it does."""
    yield _for({"text", "vae_encode", "dit", "vae_decode"}, offload="stage"), "networks wait on the CPU"
    yield _one_guidance, "guidance in two passes"
    for size in VAE_BUDGETS:
        yield _vae_budget(size), f"VAE budget {size / GIB:g} GiB"
    yield _for({"text", "cpu"}, text_weights="int8"), "text encoder in int8"
    yield _for({"text", "cpu"}, text_weights="nf4"), "text encoder in NF4"
    yield _swap(job), "blocks swapped"
    # Swapping goes first because it changes no result; where even that is not enough, eight bits are swapped too.
    yield _fp8(job), "DiT in fp8"


def _for(stages: set[str], **options: str) -> Change:
    def change(settings: Settings, over: set[str], usable: int) -> Settings:  # noqa: ARG001
        return replace(settings, memory=replace(settings.memory, **options)) if over & stages else settings

    return change


def _one_guidance(settings: Settings, over: set[str], usable: int) -> Settings:  # noqa: ARG001
    return replace(settings, guidance_batched=False) if "dit" in over else settings


def _vae_budget(size: int) -> Change:
    def change(settings: Settings, over: set[str], usable: int) -> Settings:  # noqa: ARG001
        return replace(settings, vae_budget_bytes=size) if over & {"vae_encode", "vae_decode"} else settings

    return change


def _swap(job: Job) -> Change:
    """The fewest blocks with which sampling fits; all of them where it never does."""
    total = job.variant.dit.num_visual_blocks

    def change(settings: Settings, over: set[str], usable: int) -> Settings:
        if "dit" not in over:
            return settings
        left = usable - dit_work(job, settings)
        tried = [replace(settings, memory=replace(settings.memory, swap_blocks=count)) for count in range(total + 1)]
        return next((one for one in tried if network_bytes(job, one)["dit"] <= left), tried[-1])

    return change


def _fp8(job: Job) -> Change:
    """Half the weights, so fewer blocks need to be swapped."""

    def change(settings: Settings, over: set[str], usable: int) -> Settings:
        if not over & {"dit", "cpu"}:
            return settings
        smaller = replace(settings, memory=replace(settings.memory, weights="fp8"))
        return _swap(job)(smaller, {"dit"}, usable)

    return change


def _too_large(needs: tuple[Need, ...], usable: int, cpu_bytes: int | None) -> set[str]:
    over = {need.stage for need in needs if need.device > usable}
    if cpu_bytes is not None and max(need.cpu for need in needs) > cpu_bytes:
        over.add("cpu")
    return over


def _told(over: set[str], needs: tuple[Need, ...], usable: int) -> str:
    parts = [
        f"{STAGE_NAMES[need.stage]} would take {need.device / GIB:.1f} of {usable / GIB:.1f} GiB"
        for need in needs if need.stage in over
    ]  # fmt: skip
    if "cpu" in over:
        parts.append(f"CPU memory would be {max(need.cpu for need in needs) / GIB:.1f} GiB")
    return ", ".join(parts)


def _refusal(
    job: Job, needs: tuple[Need, ...], over: set[str], budget: int, usable: int, cpu_bytes: int | None
) -> str:  # fmt: skip
    height, width, frames = job.shape.height, job.shape.width, job.shape.frames
    where = f"{job.variant.name} at {width}x{height}, {frames} frames does not fit {budget / GIB:.4g} GiB"
    if over == {"cpu"}:
        need = max(need.cpu for need in needs)
        return f"{where} with {cpu_bytes / GIB:.4g} GiB of CPU memory: at least {need / GIB:.1f} GiB are needed"
    limit = max((need for need in needs if need.stage in over), key=lambda need: need.device)
    smaller = smaller_shape(job, budget, cpu_bytes)
    advice = (
        "no smaller size fits either" if smaller is None
        else f"{smaller.width}x{smaller.height}, {smaller.frames} frames would fit"
    )  # fmt: skip
    return (
        f"{where}: with every saving {STAGE_NAMES[limit.stage]} still takes {limit.device / GIB:.1f} GiB of the "
        f"{usable / GIB:.1f} GiB that can be used; {advice}"
    )


def smaller_shape(job: Job, budget_bytes: int, cpu_bytes: int | None = None) -> VideoShape | None:
    """The largest cut of the job that fits: one clip at a time, then fewer frames, then smaller frames."""
    for shape in _smaller(job):
        try:
            _check_fits(replace(job, shape=shape), budget_bytes, cpu_bytes)
        except DoesNotFitError:
            continue
        return shape
    return None


def _smaller(job: Job) -> Iterator[VideoShape]:
    batch, frames, height, width = job.shape
    multiple, ratio = 2 * job.variant.vae.spatial_ratio, job.variant.vae.temporal_ratio
    if batch > 1:
        yield job.shape._replace(batch=1)
    for parts in range(7, 0, -1):
        fewer = (frames - 1) * parts // 8 // ratio * ratio + 1
        if fewer < frames:
            yield VideoShape(1, fewer, height, width)
    for parts in range(7, 0, -1):
        sides = (max(multiple, side * parts // 8 // multiple * multiple) for side in (height, width))
        yield VideoShape(1, (frames - 1) // 2 // ratio * ratio + 1, *sides)


def _check_fits(job: Job, budget_bytes: int, cpu_bytes: int | None) -> None:
    """Raise DoesNotFitError where no settings fit, without looking for smaller sizes again."""
    usable = budget_bytes - reserve(budget_bytes)
    total = job.variant.dit.num_visual_blocks
    memory = MemoryOptions(weights="fp8", text_weights="nf4", swap_blocks=total, offload="stage")
    settings = Settings(memory=memory, vae_budget_bytes=VAE_BUDGETS[-1])
    if _too_large(estimate(job, settings), usable, cpu_bytes):
        raise DoesNotFitError("")
