"""Stages of `benchmarks/gpu.py` about the DiT: steps, NABLA, engines, block swap, eight bits, pictures, Pro."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kandinsky5_core.attention.block_mask import kept_blocks, listed_by_sorting
from kandinsky5_core.attention.dense import dense_attention
from kandinsky5_core.attention.engines import ENGINE_NAMES, probe_engines
from kandinsky5_core.attention.flex import compiled_flex_attention, flex_mask
from kandinsky5_core.attention.nabla import NablaAttention
from kandinsky5_core.bench import rivals
from kandinsky5_core.bench.nabla import selection_error
from kandinsky5_core.bench.peak import peak_of
from kandinsky5_core.bench.run import relative_error
from kandinsky5_core.bench.sparsity import found_mass
from kandinsky5_core.bench.timing import alternate, timed
from kandinsky5_core.bench.work import attention_flops
from kandinsky5_core.config import NablaConfig, variant
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.memory import parameters
from kandinsky5_core.memory.apply import compile_blocks
from kandinsky5_core.memory.block_swap import BlockSwap
from kandinsky5_core.memory.options import AS_IS
from kandinsky5_core.memory.quantized import KINDS, quantize_blocks

from .notes import Notes
from .subject import (
    COMPILED,
    GIB,
    OURS,
    Given,
    Subject,
    clear,
    dit_planned,
    free_bytes,
    measure_steps,
    note_peak,
    size_of,
    subject_of,
)  # fmt: skip

TRAINED_WINDOW = NablaConfig(mass=0.9)
FLEX_TILES = {
    "64x64, 4 warps, 3 stages": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "64x64, 4 warps, 2 stages": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "64x64, 8 warps, 3 stages": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    "64x32, 4 warps, 3 stages": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
    "64x64, 4 warps, 3 stages, TMA": {
        "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "USE_TMA": True,
    },
}  # fmt: skip
"""The first is the only one of PyTorch's own choices whose sides divide a block of 64 tokens."""
COMPILING = 45
"""Seconds that compiling the blocks and timing them should not need more than."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """diffusers' DiT over the same tensors."""

    backend: str
    model: nn.Module
    step: Callable[[], Tensor]

    @property
    def name(self) -> str:
        return f"diffusers ({self.backend})"


def dit_stage(given: Given, notes: Notes) -> None:
    """A step of Video Lite at 512x768, 5 s, beside diffusers with its best engine; then both compiled."""
    work = subject_of(given, notes, given.sizes.video, given.sizes.short_size)
    notes.fact("size", size_of(given.sizes.short_size))
    beside_diffusers(given, notes, work)


def image_stage(given: Given, notes: Notes) -> None:
    """The same for a picture of 1024x1024."""
    work = subject_of(given, notes, given.sizes.image, given.sizes.image_size)
    notes.fact("size", size_of(given.sizes.image_size))
    beside_diffusers(given, notes, work, compiled=False)


def beside_diffusers(given: Given, notes: Notes, work: Subject, *, compiled: bool = True) -> None:
    """Time, peak and output of a step beside diffusers'."""
    notes.fact("engine", work.engine.told)
    ours = work.step()
    output = ours()  # Chooses kernels.
    note_peak(given, notes, "step", ours, dit_planned(given, work))
    theirs = None
    if notes.has("diffusers"):
        theirs = notes.attempt("diffusers", lambda: rival_of(given, notes, work, output))
    steps = {OURS: ours} | ({} if theirs is None else {theirs.name: theirs.step})
    seconds = measure_steps(given, notes, "step", steps, work)
    if theirs is not None:
        notes.fact("times_as_fast", seconds[theirs.name] / seconds[OURS])
    if compiled:
        eager = None if theirs is None else seconds[theirs.name]
        notes.attempt("compiled", lambda: compile_ours(given, notes, work, output, eager), needs=COMPILING)
        if theirs is not None:
            notes.attempt("diffusers, compiled", lambda: compile_both(given, notes, work, theirs), needs=COMPILING)


def rival_of(given: Given, notes: Notes, work: Subject, output: Tensor) -> Rival:
    """diffusers' DiT with its fastest exact attention backend; its output is compared with ours."""
    theirs = rivals.diffusers_dit(work.dit)
    step = rivals.diffusers_step(theirs, work.latents, work.timestep, work.text, work.grid, work.row.rope_scale)
    best, backends = rivals.best_backend(theirs, step, given.device)
    for name, took in backends.items():
        notes.row(f"attention backends of diffusers, {rivals.PROBED_BLOCKS} blocks", {"backend": name, "seconds": took})
    notes.fact("error", relative_error(output, step()))
    if given.device.type == "cuda":
        notes.fact("diffusers_peak_gib", peak_of(step, given.device)["added_bytes"] / GIB)
    return Rival(backend=best, model=theirs, step=step)


def compile_ours(given: Given, notes: Notes, work: Subject, output: Tensor, eager: float | None) -> None:
    """Our blocks compiled, in place, beside `eager`, the seconds of diffusers as it is."""
    compile_blocks(work.dit, backend=given.sizes.backend)
    ours = work.step()
    notes.fact("compile_seconds", timed(ours, given.device)[0])
    notes.fact("compiled_error", relative_error(ours(), output))
    note_peak(given, notes, "step, compiled", ours, dit_planned(given, work))
    seconds = measure_steps(given, notes, "step", {COMPILED: ours}, work)
    if eager is not None:
        notes.fact("times_as_fast_compiled_to_eager", eager / seconds[COMPILED])


def compile_both(given: Given, notes: Notes, work: Subject, theirs: Rival) -> None:
    """Their blocks compiled too, by their own means, in turns with ours."""
    theirs.model.compile_repeated_blocks(backend=given.sizes.backend)
    notes.fact("diffusers_compile_seconds", timed(theirs.step, given.device)[0])
    name = f"diffusers ({theirs.backend}, compiled)"
    seconds = measure_steps(given, notes, "step, both compiled", {COMPILED: work.step(), name: theirs.step}, work)
    notes.fact("times_as_fast_compiled", seconds[name] / seconds[COMPILED])


def nabla_stage(given: Given, notes: Notes) -> None:
    """A step of Video Lite at 512x768, 10 s, under NABLA at a sparsity, beside dense; then its attention alone."""
    work = subject_of(given, notes, given.sizes.long, given.sizes.long_size)
    trained = work.row.nabla or TRAINED_WINDOW
    notes.fact("size", size_of(given.sizes.long_size))
    notes.fact("engine", work.engine.told)
    sparse_plan = plan_visual(work.config, work.grid, work.row.rope_scale, trained, given.device)
    took = []

    def with_nabla(nabla: NablaAttention) -> Callable[[], Tensor]:
        return work.step(plan=replace(sparse_plan, nabla=nabla))

    def evaluate(nabla: NablaAttention) -> None:
        took.append(timed(with_nabla(nabla), given.device)[0])

    found = found_mass(evaluate, trained, given.sizes.sparsity, work.grid, given.device, work.engine.attend)
    notes.fact("search_seconds", [round(seconds, 2) for seconds in took])
    for name, value in found.facts().items():
        notes.fact(name, value)
    nabla = NablaAttention(found.config, work.grid, device=given.device)
    sparse, dense = with_nabla(nabla), work.step()
    sparse()
    note_peak(given, notes, "step", sparse, dit_planned(given, work, nabla=True))
    names = {"nabla": f"NABLA, {found.mean:.0%} dropped", "dense": f"dense {work.engine.name}"}
    kept = {names["nabla"]: 1 - found.mean}
    seconds = measure_steps(given, notes, "step", {names["nabla"]: sparse, names["dense"]: dense}, work, kept,
                            given.sizes.long_repeats)  # fmt: skip
    notes.fact("times_as_fast", seconds[names["dense"]] / seconds[names["nabla"]])
    notes.attempt("compiled", lambda: nabla_compiled(given, notes, work, sparse, dense, kept, names), needs=COMPILING)
    notes.attempt("attention alone", lambda: attention_alone(given, notes, work, nabla, with_nabla), needs=10)


def nabla_compiled(
    given: Given, notes: Notes, work: Subject, sparse: Callable[[], Tensor], dense: Callable[[], Tensor],
    kept: dict[str, float], names: dict[str, str],
) -> None:  # fmt: skip
    """Both steps with compiled blocks."""
    compile_blocks(work.dit, backend=given.sizes.backend)
    sparse()
    dense()
    steps = {names["nabla"]: sparse, names["dense"]: dense}
    seconds = measure_steps(given, notes, "step, blocks compiled", steps, work, kept, given.sizes.long_repeats)
    notes.fact("times_as_fast_compiled", seconds[names["dense"]] / seconds[names["nabla"]])


class Caught(NablaAttention):
    """NABLA that keeps its first queries, keys and values."""

    first: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """As `NablaAttention`."""
        self.first = self.first or (q, k, v)
        return super().__call__(q, k, v, key_mask)


def attention_alone(
    given: Given, notes: Notes, work: Subject, nabla: NablaAttention,
    with_nabla: Callable[[NablaAttention], Callable[[], Tensor]],
) -> None:  # fmt: skip
    """NABLA's attention of the first block, and the making of its mask, beside dense attention of the same tokens."""
    caught = Caught(nabla.config, work.grid, device=given.device)
    with_nabla(caught)()
    q, k, v = caught.first
    mask = nabla.block_mask(q, k)
    dropped = 1 - float(mask.mean(dtype=torch.float32))
    dense = f"dense {work.engine.name}"
    samples = alternate(
        {"NABLA": lambda: nabla(q, k, v), "of that, its mask": lambda: nabla.block_mask(q, k),
         "of that, lists of blocks": lambda: kept_blocks(mask),
         "the lists by sorting instead": lambda: listed_by_sorting(mask.flatten(0, 1)),
         dense: lambda: work.engine.attend(q, k, v)},
        given.device, repeats=3 * given.sizes.repeats,
    )  # fmt: skip
    flops = attention_flops(q.shape[2], q.shape[1], q.shape[3])
    for name, sample in samples.items():
        notes.row(f"attention of the first block, {dropped:.0%} dropped", {
            "what": name, "milliseconds": 1e3 * sample.median,
            "dense takes times": samples[dense].median / sample.median,
        })  # fmt: skip
    notes.fact("dense_tflops", flops / samples[dense].median / 1e12)
    notes.fact("attention_times_as_fast", samples[dense].median / samples["NABLA"].median)
    if nabla.token_mask is None:
        notes.fact("attention_error", selection_error(nabla, q, k, v))
    else:
        notes.skip("error of NABLA's attention", "its check knows no padding")
    if given.device.type != "cuda":
        notes.skip("tiles of FlexAttention", "they are of CUDA kernels")
        return
    for name, options in FLEX_TILES.items():
        notes.attempt(f"tiles {name}", lambda: flex_tiles(given, notes, (q, k, v), mask, name, options), needs=20)  # noqa: B023


def flex_tiles(
    given: Given, notes: Notes, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor, name: str, options: dict[str, object]
) -> None:
    """FlexAttention over this mask, compiled for this very size with given tiles: what NABLA's path could gain."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: object) -> Tensor:
        return flex_attention(q, k, v, block_mask=block_mask, kernel_options=options)

    blocks, compiled = flex_mask(mask), torch.compile(attend, dynamic=False, fullgraph=True)
    run = partial(compiled, *qkv, blocks)
    first, _ = timed(run, given.device)
    seconds = alternate({name: run}, given.device, repeats=5)[name].median
    expected = compiled_flex_attention(*qkv, mask)
    notes.row("FlexAttention alone, mask given, by tiles", {
        "tiles": name, "milliseconds": 1e3 * seconds, "first call, seconds": first,
        "error to the path that NABLA takes": relative_error(run(), expected),
    })  # fmt: skip


def engines_stage(given: Given, notes: Notes) -> None:
    """Every dense engine on the same tokens, which lie as the DiT's do."""
    heads, tokens, dim = given.sizes.attention
    engines = probe_engines(given.device)
    notes.fact("auto", engines.choose("auto", head_dim=dim, dtype=given.dtype).told)
    generator = torch.Generator(given.device).manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, generator=generator, device=given.device).to(given.dtype).transpose(1, 2)
        for _ in range(3)
    )
    part = min(tokens, 1024)
    expected = dense_attention(q[:, :, :part].float(), k.float(), v.float())
    for name in ENGINE_NAMES[1:]:
        if given.tiny and name == "flex":
            notes.skip("flex", "compiling it takes longer than the rest of this rehearsal")
        elif name in engines.problems:
            notes.skip(name, engines.problems[name])
        else:
            notes.attempt(name, lambda name=name: one_engine(given, notes, name, (q, k, v), expected))


def one_engine(given: Given, notes: Notes, name: str, qkv: tuple[Tensor, Tensor, Tensor], expected: Tensor) -> None:
    """Time, rate and error of an engine; the error is of the first queries, to attention in fp32."""
    q, k, v = qkv
    engine = probe_engines(given.device).choose(name, head_dim=q.shape[-1], dtype=given.dtype)
    first, _ = timed(lambda: engine.attend(q, k, v), given.device)
    error = relative_error(engine.attend(q, k, v)[:, :, : expected.shape[2]], expected)
    seconds = alternate({name: lambda: engine.attend(q, k, v)}, given.device, repeats=5)[name].median
    flops = attention_flops(q.shape[2], q.shape[1], q.shape[3])
    notes.row("dense attention", {
        "engine": name, "milliseconds": 1e3 * seconds, "TFLOP/s": flops / seconds / 1e12, "error": error,
        "first call, seconds": first,
    })  # fmt: skip
    notes.fact(f"ms_{name}", 1e3 * seconds)


def swap_stage(given: Given, notes: Notes) -> None:
    """A step with blocks that wait in CPU memory: what it costs, what it frees, and that the result is the same."""
    work = subject_of(given, notes, given.sizes.video, given.sizes.short_size)
    notes.fact("engine", work.engine.told)
    step, expected, plain = work.step(), None, None
    for count in given.sizes.swaps:
        swap = BlockSwap(work.dit, count, given.device) if count else None
        if swap is not None:
            swap.to(given.device)
        clear(given.device)
        output = step()
        seconds = alternate({"step": step}, given.device, repeats=given.sizes.repeats)["step"].median
        peak = peak_of(step, given.device)
        expected, plain = (output, seconds) if expected is None else (expected, plain)
        notes.row("block swap", {
            "blocks swapped": count, "seconds": seconds, "times as long": seconds / plain,
            "all on the card GiB": peak["peak_bytes"] / GIB if given.device.type == "cuda" else None,
            "same bits": torch.equal(output, expected),
        })  # fmt: skip
        notes.fact("same_bits", torch.equal(output, expected) and notes.found["facts"].get("same_bits", True))
        notes.fact(f"times_as_long_{count}", seconds / plain)
        if swap is not None:
            swap.remove()
            work.dit.to(given.device)


def quant_stage(given: Given, notes: Notes) -> None:
    """A step with the blocks' weights in eight bits."""
    for kind in (AS_IS, *KINDS) if notes.has("torchao") else (AS_IS,):
        notes.attempt(kind, lambda kind=kind: one_kind(given, notes, kind))
        clear(given.device)


def one_kind(given: Given, notes: Notes, kind: str) -> None:
    """Time, memory and error of weights kept in one way; bf16 is made anew to compare with."""
    work = subject_of(given, notes, given.sizes.video, given.sizes.short_size)
    step = work.step()
    expected = step()
    if kind != AS_IS:
        quantize_blocks(work.dit, kind)
        clear(given.device)
    output = step()
    seconds = alternate({"step": step}, given.device, repeats=given.sizes.repeats)["step"].median
    peak = peak_of(step, given.device)
    block = parameters.dit(work.config).num_bytes(kind, given.dtype.itemsize)
    notes.row("weights", {
        "weights": kind, "seconds": seconds, "weights, planned GiB": block / GIB,
        "all on the card GiB": peak["peak_bytes"] / GIB if given.device.type == "cuda" else None,
        "error": relative_error(output, expected),
    })  # fmt: skip


def pro_stage(given: Given, notes: Notes) -> None:
    """One step of the 19B model at 512x768, 5 s, if the card holds it."""
    row = variant(given.sizes.pro)
    if given.tiny:
        notes.skip("the 19B model", "a rehearsal takes the embedded model")
    weights = parameters.dit(row.dit).num_bytes(AS_IS, given.dtype.itemsize)
    free = free_bytes(given.device)
    notes.fact("weights_gib", weights / GIB)
    if free is not None and weights * 1.2 > free:
        notes.skip("a step", f"weights of {weights / GIB:.0f} GiB do not fit the {free / GIB:.0f} GiB that are free")
        return
    work = subject_of(given, notes, given.sizes.pro, given.sizes.short_size)
    notes.fact("engine", work.engine.told)
    step = work.step()
    step()
    note_peak(given, notes, "step", step, dit_planned(given, work))
    measure_steps(given, notes, "step", {f"{row.name}, {size_of(given.sizes.short_size)}": step}, work, repeats=1)
