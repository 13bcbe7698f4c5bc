"""Stages of `benchmarks/gpu.py` beside the DiT: the VAE within a budget, loading a file, the text encoder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky5_core.bench import rivals, subjects
from kandinsky5_core.bench.peak import peak_of
from kandinsky5_core.bench.stages import load_and_touch, read_into, write_dit
from kandinsky5_core.bench.timing import alternate, timed
from kandinsky5_core.config import variant
from kandinsky5_core.loading import find_files, load_text_of
from kandinsky5_core.memory import activations, parameters
from kandinsky5_core.shapes import VideoShape
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE
from kandinsky5_core.vae.pass_plan import plan_bytes
from kandinsky5_core.vae.tile_plan import TilePlan
from kandinsky5_core.vae.within import decode_within, encode_within

from .notes import Notes
from .subject import GIB, Given, free_bytes, note_peak

VAE_SECONDS = 20
"""That one way of one direction should not need more than."""
PROMPT = "a big red circle moves left on a black background"


def vae_stage(given: Given, notes: Notes) -> None:
    """Decoding and encoding within budgets, beside diffusers' tiles and the untiled pass where that fits."""
    frames, height, width = given.sizes.vae_size
    row = variant(given.sizes.video)
    vae = subjects.random_vae(row.vae, given.device, given.dtype)
    theirs = notes.attempt("diffusers", lambda: rivals.diffusers_vae(vae)) if notes.has("diffusers") else None
    shape = VideoShape(1, frames, height, width)
    for direction in ("decode", "encode"):
        wanted = shape.latent_shape(row.vae) if direction == "decode" else (1, 3, frames, height, width)
        numbers = subjects.random_latents(wanted, given.device, given.dtype)
        numbers = numbers if direction == "decode" else numbers.clamp(-1, 1)
        one_direction(given, notes, vae, theirs, direction, numbers)


def one_direction(
    given: Given, notes: Notes, vae: HunyuanVAE, theirs: nn.Module | None, direction: str, numbers: Tensor
) -> None:
    """All ways of a direction; the PSNR is to the untiled pass, or where that does not fit to the first budget's."""
    outputs: dict[str, Tensor] = {}
    shape = VideoShape(1, *given.sizes.vae_size).latent_shape(vae.config)
    whole = TilePlan(frames=shape.frames, height=shape.height, width=shape.width)
    needed = plan_bytes(whole, shape, vae.config, direction=direction, bytes_per_element=given.dtype.itemsize)
    run_way = partial(one_way, given, notes, direction, numbers, outputs)
    free = free_bytes(given.device)
    if free is not None and needed > free:
        notes.skip(f"{direction}, untiled", f"takes about {needed / GIB:.0f} GiB, and {free / GIB:.0f} GiB are free")
    else:
        notes.attempt(f"{direction}, untiled", lambda: run_way("untiled", getattr(vae, direction)), needs=VAE_SECONDS)
    within = decode_within if direction == "decode" else encode_within
    for budget in given.sizes.vae_budgets:
        told: dict[str, object] = {}
        run = partial(within, vae, budget_bytes=int(budget * GIB), told=told)
        name = f"{direction}, {budget:g} GiB"
        notes.attempt(name, lambda: run_way(f"ours, {budget:g} GiB", run, budget, told), needs=VAE_SECONDS)  # noqa: B023
    if theirs is not None:
        call = theirs.decode if direction == "decode" else theirs.encode
        notes.attempt(f"{direction}, diffusers", lambda: run_way("diffusers, its tiles", call), needs=VAE_SECONDS)


def one_way(
    given: Given, notes: Notes, direction: str, numbers: Tensor, outputs: dict[str, Tensor], name: str,
    run: Callable[[Tensor], object], budget: float | None = None, told: dict[str, object] | None = None,
) -> None:  # fmt: skip
    """Time of the second run, peak of the first, PSNR to the reference."""
    made: list[object] = []
    peak = peak_of(lambda: made.append(run(numbers)), given.device)
    seconds, _ = timed(lambda: run(numbers), given.device)
    found = tensor_of(made.pop()).float()
    reference = next(iter(outputs), None)
    outputs[name] = found
    added = peak["added_bytes"]
    row = {
        "what": name, "seconds": seconds, "peak GiB": None if added is None else added / GIB,
        "PSNR": None if reference is None else psnr(found, outputs[reference]), "to": reference,
        "way": (told or {}).get(f"vae_{direction}"),
    }  # fmt: skip
    notes.row(direction, row)
    notes.fact(f"{direction}, {name}", seconds)
    if budget is not None and given.device.type == "cuda":
        # The result, in fp32, is not of the budget.
        share = (added - found.nbytes) / (budget * GIB)
        largest = notes.found["facts"].get("largest_share_of_budget", 0.0)
        notes.fact("largest_share_of_budget", max(largest, share))


def tensor_of(output: object) -> Tensor:
    """Pixels, or the mean of latents, of what a VAE gave."""
    if isinstance(output, Tensor):
        return output
    return output.latent_dist.mode() if hasattr(output, "latent_dist") else output.sample


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Of the range of `wanted`, in dB."""
    span = wanted.max() - wanted.min()
    return float(20 * torch.log10(span) - 10 * torch.log10((found - wanted).square().mean()))


def load_stage(given: Given, notes: Notes) -> None:
    """A whole DiT from a file to the device, with the file in the page cache, beside reading its bytes."""
    row = variant(given.sizes.video)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dit.safetensors"
        # Made where random numbers are quick, and then brought to the CPU.
        write_dit(subjects.random_dit(row.dit, given.device, given.dtype).to("cpu"), path)
        buffer = bytearray(path.stat().st_size)
        load = partial(load_and_touch, path, _Where(given.device, given.dtype))
        first, _ = timed(load, given.device)
        samples = alternate(
            {"load": load, "read": partial(read_into, [path], buffer)}, given.device, repeats=given.sizes.repeats
        )
        del buffer
        peak = peak_of(load, torch.device("cpu"))
        size = path.stat().st_size
    for name in ("load", "read"):
        seconds = samples[name].median
        what = f"file to {given.device.type}" if name == "load" else "read its bytes"
        notes.row("loading", {"what": what, "GiB": size / GIB, "seconds": seconds, "GiB/s": size / GIB / seconds})
    notes.fact("first_load_seconds", first)
    notes.fact("cpu_peak_added_gib", None if peak["added_bytes"] is None else peak["added_bytes"] / GIB)
    notes.fact("cpu_peak_is", "of the process, the mapped file's pages included")


class _Where:
    """What `load_and_touch` asks a plan for."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype


def text_stage(given: Given, notes: Notes) -> None:
    """Qwen2.5-VL 7B's language model reading one prompt; in a rehearsal the embedded encoder."""
    if given.tiny:
        encoder = load_text_of(find_files(given.sizes.video), given.dtype)
        read: Callable[[], object] = partial(encoder.encode, [PROMPT], task="t2v", max_tokens=32)
        tokens, layers = int(read().mask.sum()), 0
    else:
        tokens, layers = variant(given.sizes.video).max_text_tokens, given.sizes.text_layers
        qwen = subjects.random_qwen(layers, given.device, given.dtype)
        words = torch.arange(tokens, device=given.device)[None]
        read = lambda: qwen(input_ids=words, use_cache=False).last_hidden_state  # noqa: E731
        read()
        note_peak(given, notes, "text", read, activations.text_bytes(
            parameters.TextSizes(), tokens, given.dtype.itemsize))  # fmt: skip
    seconds = alternate({"text": read}, given.device, repeats=given.sizes.repeats)["text"].median
    what = "the embedded encoder" if given.tiny else f"Qwen2.5-VL 7B, {layers} layers"
    notes.row("reading a prompt", {"what": what, "tokens": tokens, "seconds": seconds, "tokens/s": tokens / seconds})
