"""A card for machines without one: tensors that know their shape and device alone, and refuse to meet another device.

It shows that a network whose weights lie in two places brings everything together where it computes; what comes out has
no values.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

NAME = "card"
CARD = f"{NAME}:0"


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


class _Module:
    """What PyTorch asks of a kind of device."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


def plug_in() -> torch.device:
    """The card; once a process."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module)
    torch._C._acc.register_python_privateuseone_device_guard(_Guard())
    return torch.device(CARD)


def _apply(self, fn, recurse=True):
    # PyTorch's own swaps such tensors in place, which their weak references forbid.
    for child in self.children() if recurse else ():
        child._apply(fn, recurse)
    for holder in (self._parameters, self._buffers):
        for key, tensor in holder.items():
            if tensor is not None:
                made = fn(tensor.detach())
                holder[key] = torch.nn.Parameter(made, requires_grad=False) if holder is self._parameters else made
    return self


@contextmanager
def without_values(network: torch.nn.Module):
    """Within it the weights of `network` have no values, and may lie on the card."""
    kept, torch.nn.Module._apply = torch.nn.Module._apply, _apply
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            network._apply(mode.from_tensor)
            yield mode
    finally:
        torch.nn.Module._apply = kept
