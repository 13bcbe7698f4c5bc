"""Which memory options a run takes: what is kept in how many bits, and what waits where."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..vae.tile_plan import DEFAULT_BUDGET_BYTES

AS_IS = "as-is"
WEIGHTS = (AS_IS, "fp8", "int8")
TEXT_WEIGHTS = (AS_IS, "int8", "nf4")
OFFLOADS = ("stage", "none")
DEFAULT_VAE_GIB = DEFAULT_BUDGET_BYTES / 2**30
"""What the VAE's work may take where nothing is said."""
SWAP_SLOTS = 2
"""Blocks that the device has room for when blocks are swapped: one computes while the next one comes."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory settings of one set of `Models`; the defaults change no result.

    Raises:
        ValueError: an unknown word, or a negative number of blocks.
    """

    weights: str = AS_IS
    """The linear layers of the DiT's blocks: in the run's dtype, 'fp8' or 'int8'."""
    text_weights: str = AS_IS
    """Those of Qwen: in the run's dtype, 'int8' or 'nf4'."""
    swap_blocks: int = 0
    """Visual blocks, the last ones, whose weights stay in CPU memory and are brought in ahead of their turn."""
    offload: str = "stage"
    """'stage': each network waits on the CPU and is on the device for its own stage only; 'none': all stay there."""

    def __post_init__(self) -> None:
        check("weights", self.weights, WEIGHTS)
        check("text_weights", self.text_weights, TEXT_WEIGHTS)
        check("offload", self.offload, OFFLOADS)
        if self.swap_blocks < 0:
            raise ValueError(f"swap_blocks {self.swap_blocks} is negative; 0 keeps every block on the device")

    def told(self) -> dict[str, object]:
        """What differs from the defaults, for the settings of a result."""
        return {
            item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default
        }


def check(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a word that `name` does not know."""
    if value not in known:
        raise ValueError(f"{name} '{value}' is unknown; use one of {', '.join(known)}")
