"""Block swap against the same model without: equal bits, order of copies, cancel, LoRA, compile, quantised blocks."""

import gc
from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from torch._dynamo.utils import counters

from kandinsky5_core import Request, generate, load
from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import DiTConfig
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.memory.apply import compile_blocks
from kandinsky5_core.memory.block_swap import BlockSwap
from kandinsky5_core.memory.options import SWAP_SLOTS, MemoryOptions
from kandinsky5_core.memory.quantized import KINDS, quantize_blocks

BLOCKS = 5
TINY = DiTConfig(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=6, time_dim=16, model_dim=32, ff_dim=64,
    num_text_blocks=1, num_visual_blocks=BLOCKS, axes_dims=(4, 6, 6),
)  # fmt: skip


class Late:
    """A lane as unkind as streams may be: copies happen only when waited for, and what is released is spoilt."""

    def __init__(self):
        self.swap, self.waiting, self.log, self.computing = None, {}, [], set()

    def fetch(self, slot, copy):
        assert slot not in self.computing, "a copy into a slot that computes"
        self.log.append(("fetch", slot))
        self.waiting[slot] = copy

    def wait(self, slot):
        self.log.append(("wait", slot))
        if slot in self.waiting:
            self.waiting.pop(slot)()
            self.computing.add(slot)

    def release(self, slot):
        self.log.append(("release", slot))
        self.computing.discard(slot)
        for parameter in self.swap.slots[slot] if self.swap else ():
            if parameter.dtype.is_floating_point and type(parameter.data) is torch.Tensor:
                parameter.data.fill_(float("nan"))


def random_dit(seed: int = 0) -> DiffusionTransformer:
    torch.manual_seed(seed)
    model = DiffusionTransformer(TINY).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    return model.requires_grad_(False)


def inputs(seed: int, grid=(2, 3, 2), batch: int = 1):
    torch.manual_seed(seed)
    frames, height, width = grid
    text = TextConditioning(
        embeds=torch.randn(batch, 5, 8), pooled=torch.randn(batch, 6), mask=torch.ones(batch, 5, dtype=torch.bool)
    )
    latents = torch.randn(batch, TINY.input_channels, frames, 2 * height, 2 * width)
    return latents, torch.full((batch,), 700.0), text, plan_visual(TINY, grid, (1.0, 1.0, 1.0), None)


def late_swap(model: DiffusionTransformer, count: int) -> tuple[BlockSwap, Late]:
    lane = Late()
    swap = BlockSwap(model, count, "cpu", lane)
    lane.swap = swap
    return swap, lane


@pytest.mark.parametrize("count", range(1, BLOCKS + 1))
@torch.no_grad()
def test_swapped_blocks_give_the_same_bits(count):
    plain, model = random_dit(count), random_dit(count)
    names = list(model.state_dict())
    late_swap(model, count)
    for seed, grid, batch in ((1, (2, 3, 2), 1), (2, (1, 2, 2), 3), (3, (2, 3, 2), 1)):
        given = inputs(seed, grid, batch)
        assert torch.equal(model(*given), plain(*given))
    assert list(model.state_dict()) == names
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@torch.no_grad()
def test_the_next_block_is_fetched_while_one_computes_and_never_into_its_slot():
    model = random_dit()
    _, lane = late_swap(model, 4)
    lane.log.clear()
    model(*inputs(0))
    steps = [entry for entry in lane.log if entry[0] != "release"]
    assert steps == [
        ("fetch", 0), ("wait", 0), ("fetch", 1), ("wait", 1), ("fetch", 0), ("wait", 0), ("fetch", 1), ("wait", 1),
    ]  # fmt: skip
    for number, entry in enumerate(lane.log):
        if entry[0] == "fetch":
            before = [name for name, slot in lane.log[:number] if slot == entry[1] and name != "fetch"]
            assert before == [] or before[-1] == "release"


@torch.no_grad()
def test_only_two_blocks_of_room_are_taken_and_given_back():
    model = random_dit()
    swap = BlockSwap(model, BLOCKS, "cpu")
    model(*inputs(0))
    one = sum(parameter.numel() for parameter in model.visual_transformer_blocks[0].parameters())
    assert sum(parameter.numel() for slot in swap.slots for parameter in slot) == SWAP_SLOTS * one
    swap.to("meta")
    assert swap.slots == [[], []]


def test_the_rest_moves_and_swapped_blocks_stay():
    model = random_dit()
    BlockSwap(model, 2, "cpu").to("meta")
    where = [{parameter.device.type for parameter in block.parameters()} for block in model.visual_transformer_blocks]
    assert where == [{"meta"}] * (BLOCKS - 2) + [{"cpu"}] * 2
    for part in (model.time_embeddings, model.text_transformer_blocks, model.out_layer):
        assert all(parameter.is_meta for parameter in part.parameters())


@torch.no_grad()
def test_twenty_runs_keep_no_tensor():
    model, given = random_dit(), inputs(0)
    BlockSwap(model, 4, "cpu")
    counts = []
    for _ in range(20):
        model(*given)
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[1:] == counts[1:2] * 19


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_a_cancelled_pass_leaves_the_model_usable(error):
    plain, model, given = random_dit(), random_dit(), inputs(5)
    swap, _ = late_swap(model, 4)
    homes = [parameter for block in swap.blocks for parameter in block.parameters()]

    def stop(module, args):
        raise error

    hook = model.visual_transformer_blocks[3].self_attention.register_forward_pre_hook(stop)
    with suppress(error):
        model(*given)
    hook.remove()
    if error is KeyboardInterrupt:
        assert torch.equal(model(*given), plain(*given))
    assert all(a is b for a, b in zip(homes, (p for block in swap.blocks for p in block.parameters()), strict=True))
    assert torch.equal(model(*given), plain(*given))


@pytest.mark.parametrize("count", [1, 2, 5])
@torch.no_grad()
def test_weights_merged_between_passes_are_seen(count):
    plain, model, given = random_dit(), random_dit(), inputs(6)
    BlockSwap(model, count, "cpu")
    before = model(*given)
    for changed in (plain, model):
        torch.manual_seed(1)
        changed.visual_transformer_blocks[-1].feed_forward.in_layer.weight += torch.randn(64, 32)
        layer = changed.visual_transformer_blocks[-1].self_attention.to_key
        layer.weight = torch.nn.Parameter(torch.randn(32, 32), requires_grad=False)
    assert torch.equal(model(*given), plain(*given)) and not torch.equal(before, model(*given))


@torch.no_grad()
def test_hooked_lora_works():
    plain, model, given = random_dit(), random_dit(), inputs(7)
    torch.manual_seed(2)
    delta = torch.nn.Linear(32, 32)
    late_swap(model, 3)
    for changed in (plain, model):
        layer = changed.visual_transformer_blocks[-2].cross_attention.to_value
        layer.register_forward_hook(lambda module, args, output: output + delta(args[0]))
    assert torch.equal(model(*given), plain(*given))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_quantised_blocks_travel_as_they_are(kind):
    plain = random_dit()
    quantize_blocks(plain, kind)
    model, given = deepcopy(plain), inputs(8)
    swap = BlockSwap(model, 4, "cpu")
    assert torch.equal(model(*given), plain(*given))
    weight = next(p for p in swap.slots[0] if p.shape == (64, 32))
    assert type(weight.data) is type(plain.visual_transformer_blocks[0].feed_forward.in_layer.weight.data)


@pytest.mark.parametrize("compile_first", [True, False])
@torch.no_grad()
def test_compiled_blocks_swap_without_compiling_again(compile_first):
    torch._dynamo.reset()
    plain, model, given = random_dit(), random_dit(), inputs(9)
    if compile_first:
        compile_blocks(model, backend="aot_eager")
    BlockSwap(model, 3, "cpu")
    if not compile_first:
        compile_blocks(model, backend="aot_eager")
    first = model(*given)
    counters.clear()
    again = model(*given)
    assert counters["stats"].get("unique_graphs", 0) == 0
    torch.testing.assert_close(first, plain(*given), rtol=1e-4, atol=1e-5)
    assert torch.equal(first, again)


def test_removed_swap_leaves_the_plain_model():
    plain, model, given = random_dit(), random_dit(), inputs(10)
    swap = BlockSwap(model, 2, "cpu")
    with torch.inference_mode():
        model(*given)
    with torch.no_grad():
        assert torch.equal(model(*given), plain(*given))
        swap.remove()
        assert torch.equal(model(*given), plain(*given))
    assert not model._forward_pre_hooks and not model.visual_transformer_blocks[-1]._forward_hooks


@pytest.mark.parametrize("count", [0, -1, BLOCKS + 1])
def test_a_count_that_does_not_fit_is_refused(count):
    with pytest.raises(ValueError, match=f"swap_blocks {count} does not fit a model of {BLOCKS} visual blocks"):
        BlockSwap(random_dit(), count, "cpu")


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [("nano-video", "t2v", {"batch": 2}), ("nano-video", "i2v", {}), ("nano-image", "t2i", {}), ("nano-edit", "i2i", {})],
)
def test_every_task_is_equal_to_the_run_without(model, task, options):
    if task in ("i2v", "i2i"):
        options = {**options, "image": torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))}
    request = Request(prompt="a red circle", task=task, num_steps=2, seed=3, **options)
    plain = generate(load(model), request).frames
    assert torch.equal(generate(load(model, memory=MemoryOptions(swap_blocks=3)), request).frames, plain)
