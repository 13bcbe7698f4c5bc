"""Writes `docs/memory.md`, whose tables are the planner's.

python -m benchmarks.memory_page
"""

from __future__ import annotations

from pathlib import Path

from kandinsky5_core.config import variant
from kandinsky5_core.memory.choose import RESERVE_BYTES, RESERVE_SHARE
from kandinsky5_core.memory.estimate import Settings, default_job, estimate
from kandinsky5_core.memory.told import GIB, budgets_text, job_text, markdown
from kandinsky5_core.memory.training import TrainingJob, report_bytes, training_need

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
SHOWN = (
    "lite-t2v-5s-sft", "lite-t2v-10s-sft", "lite-i2v-5s", "pro-t2v-5s-sft", "pro-t2v-10s-sft", "pro-t2v-5s-sft-hd",
    "pro-t2v-10s-sft-hd", "image-lite-t2i-sft", "image-lite-i2i-sft",
)  # fmt: skip
PUBLISHED = {
    "lite-t2v-5s-sft": 21, "image-lite-t2i-sft": 17, "pro-t2v-5s-sft": 47, "pro-t2v-10s-sft": 51,
    "pro-t2v-5s-sft-hd": 53, "pro-t2v-10s-sft-hd": 68,
}  # fmt: skip
"""Report, table 5, in 10^9 bytes: one H100 with offload, 5 and 10 seconds."""
TRAINED = ("lite-t2v-5s-sft", "pro-t2v-5s-sft", "image-lite-t2i-sft")


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for name in SHOWN:
        job = default_job(variant(name))
        parts += [f"## {name}\n\n{job_text(job)}", budgets_text(job)]
    parts += [_CHECKED, published(), _TRAINING, trained(), _END]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def published() -> str:
    """The report's table beside the plain plan with offload."""
    rows = []
    for name, told in PUBLISHED.items():
        need = max(estimate(default_job(variant(name)), Settings()), key=lambda stage: stage.device)
        rows.append((name, f"{told}", f"{need.device / 1e9:.1f}", need.stage))
    return markdown(("variant", "report", "planned", "stage"), rows)


def trained() -> str:
    """Steps of one clip or picture of the variant's size, with gradient checkpointing."""
    rows = []
    for name in TRAINED:
        row = variant(name)
        num_tokens = default_job(row).num_tokens
        for rank, base, optimizer in ((32, "int8", "adamw"), (32, "as-is", "adamw"), (0, "as-is", "adamw8bit"),
                                      (0, "as-is", "adamw")):  # fmt: skip
            job = TrainingJob(
                config=row.dit, num_tokens=num_tokens, rank=rank, base_weights=base, optimizer=optimizer,
                checkpointing=True,
            )  # fmt: skip
            what = f"LoRA of rank {rank}, base {base}" if rank else f"all weights, {optimizer}"
            report = "" if rank else f"{report_bytes(row.dit, num_tokens) / GIB:.1f}"
            rows.append((name, what, f"{training_need(job).total / GIB:.1f}", report))
    return markdown(("variant", "what moves", "GiB", "report's formula (2)"), rows)


_NODES = markdown(
    ("here", "in ComfyUI"),
    (
        ("`--weights fp8`, `int8`", "*weight_dtype* `fp8_e4m3fn`, `int8` of Load Kandinsky 5 Model and of (all)"),
        ("`--text-weights int8`, `nf4`", "*text_weights* of Load Kandinsky 5 Text Encoders and of (all)"),
        ("`--swap-blocks N`", "*blocks* of Kandinsky 5 Block Swap"),
        ("`--vae-budget N`", "*tile_budget* of Kandinsky 5 Decode Video"),
        ("`--offload`", "ComfyUI's own; `--reserve-vram` and `--lowvram` steer it"),
        ("`--batch-guidance`", "ComfyUI's own"),
    ),
)
_HEAD = """
# Memory: which setting for which card

The tables are the planner's for the sizes that the models were made for, in bf16, with a caption of the longest kind.
For your own size, or with little CPU memory, ask it (it loads nothing):

    kandinsky5 plan --variant lite-t2v-5s-sft --height 512 --width 768 --frames 121 --budget 12
    kandinsky5 plan --variant pro-t2v-5s-sft --budget 24 --cpu-memory 32
    kandinsky5 plan --variant pro-t2v-5s-sft --budget 24 --cache --compile
    kandinsky5 plan --train job.json
    kandinsky5 generate --device cuda --budget auto ...

In ComfyUI the node *Kandinsky 5 Memory Plan* says the same, and ComfyUI's own memory management moves the networks. It
counts more for sampling: where ComfyUI brings in or casts weights at every call, the feed-forward takes all tokens at
once. There the settings are inputs of nodes:

NODES

What they save and cost there is in `benchmarks/README.md` under "In ComfyUI".

It changes as little as it can, in this order, and only in the stages that are too large: networks wait on the CPU,
guidance in two passes, a smaller VAE budget (these change no result but for rounding and the VAE's tiles), the text
encoder in int8, then NF4, blocks swapped from CPU memory (slower, the same result), the DiT in fp8.

"device" and "CPU" are the largest need of any stage. Of each card RESERVED stay free, for the driver, libraries and
what the allocator cannot use in one piece; of a desktop's card less is free than its name says: give `--budget` what
is.
""".replace("NODES", _NODES).replace("RESERVED", f"{RESERVE_BYTES / GIB:g} GiB and {100 * RESERVE_SHARE:g} %")
_CHECKED = """
## How far to trust it

`benchmarks/README.md` has the prediction beside the count of live tensors, at these very sizes too: within 10 %, mostly
3 %. What kernels take for themselves on a GPU is not in that count; the VAE's quarter for it and the reserve above are
meant to cover it, and were not measured on a GPU yet. The report's table 5 (H100 with offload) beside the plan without
its reserve, in GB (10^9 bytes); ours keeps no copies of a whole clip in fp32, nor its feed-forward's hidden numbers:
"""
_TRAINING = """
## Training

A step of one clip or picture, with gradient checkpointing and a moving average of the weights:
"""
_END = """
The report's formula (2) is for full training and counts the blocks alone; ours keeps weights that move, their
gradients, AdamW's two states and the moving average in fp32. Smaller frames, fewer of them and pictures alone take far
less: `kandinsky5 plan --train job.json` reads `data.area` and `data.max_frames`.

This page is made by `python -m benchmarks.memory_page`.
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
