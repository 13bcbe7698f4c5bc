"""Bytes of tensors that live at once, counted exactly and alike on every device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside it: `live` now, `peak` so far. What was there before does not count.

    Seen are the outputs of operations, not what a kernel takes for itself and gives back before it ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._see((args, kwargs), counted=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, counted=True)
        return result

    def _see(self, values: Any, *, counted: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage, storage.nbytes() if counted else 0)

    def _add(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.live -= num_bytes

        self._known[key] = weakref.ref(storage, gone)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


def live_peak(work: Callable[[], object]) -> int:
    """Most bytes that tensors made by `work` take at once."""
    with LiveBytes() as counter:
        work()
    return counter.peak
