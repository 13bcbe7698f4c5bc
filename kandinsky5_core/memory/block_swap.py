"""Block swap: the last visual blocks of a DiT wait in CPU memory and come to the device just ahead of their turn.

The device holds two blocks of room (slots). While one block computes in its slot, the next one is copied into the
other on a side stream; events keep the two streams in order. Applied from outside: names, forward and results stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..dit.model import DiffusionTransformer
from .options import SWAP_SLOTS


class Lane(Protocol):
    """How copies and computation are kept in order; slots are numbered from 0."""

    def fetch(self, slot: int, copy: Callable[[], None]) -> None:
        """Start `copy` into the slot as soon as the slot was released."""

    def wait(self, slot: int) -> None:
        """Computation from here on waits for the copy into the slot."""

    def release(self, slot: int) -> None:
        """Copies into the slot wait for the computation up to here."""


class InOrder:
    """Copies where they are asked for: devices without streams."""

    def fetch(self, _slot: int, copy: Callable[[], None]) -> None:
        copy()

    def wait(self, slot: int) -> None:
        """Nothing: the copy is done."""

    def release(self, slot: int) -> None:
        """Nothing: the computation is done."""


class SideStream:
    """Copies on a CUDA stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.ready = [torch.cuda.Event() for _ in range(SWAP_SLOTS)]
        self.free = [torch.cuda.Event() for _ in range(SWAP_SLOTS)]

    def fetch(self, slot: int, copy: Callable[[], None]) -> None:
        self.stream.wait_event(self.free[slot])
        with torch.cuda.stream(self.stream):
            copy()
        self.ready[slot].record(self.stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.ready[slot])

    def release(self, slot: int) -> None:
        self.free[slot].record(torch.cuda.current_stream(self.device))


class Owned(NamedTuple):
    """One parameter and the place in a module that holds it."""

    holder: dict[str, nn.Parameter | None]
    name: str
    parameter: nn.Parameter


class BlockSwap:
    """Swaps the last `count` visual blocks of a DiT, for inference; `to` moves the rest.

    Weights are read from the modules at every turn, so LoRAs may be merged at any time, or hooked on. Quantised
    blocks travel as they are. `compile_blocks` may come before or after. Not for several threads at once.
    """

    def __init__(
        self, dit: DiffusionTransformer, count: int, device: torch.device | str, lane: Lane | None = None
    ) -> None:
        """
        Args:
            count: Blocks to swap, 1 to all.
            device: Where the model computes. For CUDA the waiting weights are pinned.
            lane: Default a side stream on CUDA, else copies in order.

        Raises:
            ValueError: the model has fewer visual blocks, or none is to be swapped.
        """
        total = len(dit.visual_transformer_blocks)
        if not 1 <= count <= total:
            raise ValueError(f"swap_blocks {count} does not fit a model of {total} visual blocks; use 1 to {total}")
        self.dit, self.device = dit, torch.device(device)
        self.blocks = list(dit.visual_transformer_blocks)[-count:]
        self.lane = lane or (SideStream(self.device) if self.device.type == "cuda" else InOrder())
        self.slots: list[list[nn.Parameter]] = [[] for _ in range(SWAP_SLOTS)]
        self._fetched: list[int | None] = [None] * SWAP_SLOTS
        self._homes: dict[int, list[Owned]] = {}
        for block in self.blocks:
            assert next(block.buffers(), None) is None, "a buffer would stay behind"
            _bring_home(block, pin=self.device.type == "cuda")
        self._hooks = [dit.register_forward_pre_hook(self._begin)]
        for index, block in enumerate(self.blocks):
            self._hooks.append(block.register_forward_pre_hook(partial(self._enter, index)))
            self._hooks.append(block.register_forward_hook(partial(self._leave, index), always_call=True))

    def to(self, device: torch.device | str) -> BlockSwap:
        """All but the swapped blocks to `device`; away from the model's own device the slots are given back."""
        self._leave_all()
        for part in self.dit.children():
            for module in part if part is self.dit.visual_transformer_blocks else [part]:
                if not any(module is block for block in self.blocks):
                    module.to(device)
        if torch.device(device).type != self.device.type:
            self._drop_slots()
        return self

    def remove(self) -> None:
        """Stop swapping; the weights are left in CPU memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._leave_all()
        self._drop_slots()

    def _begin(self, _dit: nn.Module, _args: tuple[Any, ...]) -> None:
        self._leave_all()
        # What lies in the slots is of the last pass: weights may have been merged or loaded since.
        self._fetched = [None] * SWAP_SLOTS
        self._fetch(0)

    def _enter(self, index: int, block: nn.Module, _args: tuple[Any, ...]) -> None:
        slot = index % SWAP_SLOTS
        if self._fetched[slot] != index:
            self._fetch(index)
        self.lane.wait(slot)
        self._homes[index] = homes = list(_owned(block))
        for home, there in zip(homes, self.slots[slot], strict=True):
            home.holder[home.name] = there
        if index + 1 < len(self.blocks):
            self._fetch(index + 1)

    def _leave(self, index: int, *_: object) -> None:
        slot = index % SWAP_SLOTS
        for home in self._homes.pop(index, ()):
            home.holder[home.name] = home.parameter
        self.lane.release(slot)
        self._fetched[slot] = None

    def _leave_all(self) -> None:
        # Ctrl-C in a block skips its hook: torch calls hooks after an Exception only.
        for index in list(self._homes):
            self._leave(index)

    def _fetch(self, index: int) -> None:
        slot = index % SWAP_SLOTS
        parameters = [owned.parameter for owned in _owned(self.blocks[index])]
        if not _fits(self.slots[slot], parameters):
            self._make_slot(slot, parameters)
        self.lane.fetch(slot, partial(_copy_all, self.slots[slot], parameters))
        self._fetched[slot] = index

    def _make_slot(self, slot: int, like: list[nn.Parameter]) -> None:
        # ComfyUI and others run in inference mode; what is made there could not be written to outside of it.
        with torch.inference_mode(False):
            self.slots[slot] = [_moved(parameter, lambda leaf: _room(leaf, self.device)) for parameter in like]
        # The memory may have been another tensor's, whose last use is still to come on the device.
        self.lane.release(slot)

    def _drop_slots(self) -> None:
        for slot in range(SWAP_SLOTS):
            self.lane.wait(slot)
        self.slots = [[] for _ in range(SWAP_SLOTS)]
        self._fetched = [None] * SWAP_SLOTS


def _owned(block: nn.Module) -> Iterator[Owned]:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield Owned(module._parameters, name, parameter)


def _bring_home(block: nn.Module, *, pin: bool) -> None:
    """The block's weights in CPU memory, pinned so that copies from it run beside the computation."""
    for owned in list(_owned(block)):
        owned.holder[owned.name] = _moved(
            owned.parameter, lambda leaf: leaf.cpu().pin_memory() if pin else leaf.cpu()
        )


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that it is made of: several where it is quantised."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [leaf for name in names for leaf in _leaves(getattr(tensor, name))]


def _moved(parameter: Tensor, move: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """The parameter with each of its plain tensors replaced by what `move` makes of it."""
    return nn.Parameter(_rebuilt(parameter.detach(), move), requires_grad=False)


def _rebuilt(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    if not is_traceable_wrapper_subclass(tensor):
        return move(tensor)
    names, context = tensor.__tensor_flatten__()
    parts = {name: _rebuilt(getattr(tensor, name), move) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())


def _room(leaf: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(leaf, device=device)


def _fits(slot: list[nn.Parameter], parameters: list[nn.Parameter]) -> bool:
    return [_layout(there) for there in slot] == [_layout(parameter) for parameter in parameters]


def _layout(parameter: Tensor) -> list[tuple[torch.Size, torch.dtype]]:
    return [(leaf.shape, leaf.dtype) for leaf in _leaves(parameter)]


@torch.no_grad()
def _copy_all(slot: list[nn.Parameter], parameters: list[nn.Parameter]) -> None:
    for there, parameter in zip(slot, parameters, strict=True):
        for target, source in zip(_leaves(there), _leaves(parameter), strict=True):
            target.copy_(source, non_blocking=True)
