"""Soups: averages of fine-tunes, one for each domain, in one level or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..kandinsky5_core.weights.lora import SAMPLES_KEY, is_lora
from ..kandinsky5_core.weights.soup import WEIGHTINGS, Part, Soup
from ..kandinsky5_core.weights.soup_tree import Group, check_outside, flat_shares, group_of_folder, nested_soup
from ..kandinsky5_core.weights.source import open_source
from .bridge.progress import TensorProgress
from .bridge.results import (
    NEW,
    NONE,
    FileName,
    Result,
    metadata_of,
    name_input,
    part_choices,
    part_path,
    result_file,
    stamp,
    tree_choices,
    tree_path,
)

CATEGORY = "Kandinsky 5/train"
SLOTS = 10
SHOWN = 3
WEIGHTING_TIP = (
    "equal: all the same. size: by their samples. sqrt: by the root of their samples; equal and sqrt were the best in the "
    "report."
)
RANK_TIP = "Of a soup of LoRAs. 0: their ranks added up, which is exact; less is the nearest by SVD."


def _outputs() -> list[io.Output]:
    return [
        FileName.Output(display_name="name", tooltip="Of the new file: for a loader, or as a part of another soup."),
        io.Int.Output(display_name="samples", tooltip="Of all parts together: the size of this soup as a part. 0: not known."),
        io.String.Output(display_name="report", tooltip="The share of each part."),
    ]


class K5Soup(io.ComfyNode):
    """One level."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        slots: list[io.Input] = []
        for number in range(1, SLOTS + 1):
            slots += [
                io.MultiType.Input(
                    io.Combo.Input(f"part_{number}", options=part_choices(), default=NONE),
                    types=[io.String],
                    optional=True,
                    advanced=number > SHOWN,
                    tooltip="A LoRA of models/loras or a model of models/diffusion_models; or the name of one from another "
                    "node. All of one kind, from one base.",
                ),
                io.Int.Input(
                    f"size_{number}",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    optional=True,
                    advanced=number > SHOWN,
                    tooltip="Training samples of its domain, for weighting by size. 0: as the file tells.",
                ),
            ]
        return io.Schema(
            node_id="K5Soup",
            display_name="Kandinsky 5 Soup",
            category=CATEGORY,
            is_output_node=True,
            description="Averages fine-tunes or LoRAs of one base, one for each domain, into a new file. Feed the soups of "
            "subdomains into another soup for two levels.",
            search_aliases=["model soup", "merge models", "average checkpoints", "merge loras"],
            inputs=[
                io.Combo.Input("weighting", options=list(WEIGHTINGS), default="equal", tooltip=WEIGHTING_TIP),
                *name_input("soup", "loras or models/diffusion_models"),
                *slots,
                io.Int.Input("rank", default=0, min=0, max=4096, optional=True, advanced=True, tooltip=RANK_TIP),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, weighting: str, name: str, existing: str = NEW, rank: int = 0, **slots: Any) -> io.NodeOutput:
        parts = []
        for number in range(1, SLOTS + 1):
            given = str(slots.get(f"part_{number}") or NONE)
            if given != NONE:
                parts.append(Part.of(part_path(given), slots.get(f"size_{number}") or None))
        if len(parts) < 2:
            raise ValueError(f"a soup needs at least two parts, and {len(parts)} are chosen; choose part_1 and part_2")
        return _cook(Group(name=name, parts=tuple(parts), weighting=weighting), name, existing, rank)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> object:
        """Runs again when a part was written anew."""
        found = []
        for number in range(1, SLOTS + 1):
            given = inputs.get(f"part_{number}")
            if isinstance(given, str) and given != NONE:
                try:
                    found += stamp(part_path(given))
                except ValueError:
                    continue
        return tuple(found)


class K5SoupFolder(io.ComfyNode):
    """Two levels, from a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5SoupFolder",
            display_name="Kandinsky 5 Soup of a Folder",
            category=CATEGORY,
            is_output_node=True,
            description="Averages the fine-tunes of a folder in two levels: the files of each subfolder (a domain) among "
            "themselves, then the domains. Files beside the subfolders are domains of their own.",
            search_aliases=["model soup", "hierarchical soup", "domains"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=tree_choices(),
                    tooltip="A folder below models/loras or models/diffusion_models: domain/subdomain.safetensors.",
                ),
                io.Combo.Input(
                    "weighting", options=list(WEIGHTINGS), default="equal", tooltip=f"Of the domains. {WEIGHTING_TIP}"
                ),
                io.Combo.Input(
                    "within",
                    options=list(WEIGHTINGS),
                    default="sqrt",
                    tooltip="The same for the files of each domain; the report takes sqrt. Sizes are read from the files.",
                ),
                *name_input("soup", "loras or models/diffusion_models"),
                io.Int.Input("rank", default=0, min=0, max=4096, optional=True, advanced=True, tooltip=RANK_TIP),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, folder: str, weighting: str, within: str, name: str, existing: str = NEW, rank: int = 0
    ) -> io.NodeOutput:
        path = tree_path(folder)
        return _cook(group_of_folder(path, weighting=weighting, within=within), name, existing, rank, outside=path)

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", **rest: Any) -> object:
        """Runs again when a file of the folder was written anew, came or went."""
        try:
            return stamp(*sorted(tree_path(folder).rglob("*.safetensors")))
        except ValueError:
            return ()


def _cook(group: Group, name: str, existing: str, rank: int, *, outside: Path | None = None) -> io.NodeOutput:
    """Write the soup where its kind belongs, but not into the folder of its parts."""
    first = flat_shares(group)[0][0].path
    folder = "loras" if is_lora(open_source(first)) else "diffusion_models"
    result = result_file(folder, name, existing)
    if outside is not None:
        check_outside(result.path, outside)
    if result.kept:
        samples = metadata_of(result.path).get(SAMPLES_KEY, "0")
        report = f"{result.name} was there and stays as it is; nothing was made"
        return io.NodeOutput(result.name, round(float(samples)), report, ui=ui.PreviewText(report))
    made = nested_soup(group, result.path, rank=rank or None, on_tensor=TensorProgress())
    report = _report(result, made)
    return io.NodeOutput(result.name, round(made.size or 0), report, ui=ui.PreviewText(report))


def _report(result: Result, made: Soup) -> str:
    lines = [f"{share:7.2%}  {Path(path).name}" for path, share in made.shares.items()]
    if made.kind == "lora":
        kept = "" if made.kept > 0.99999 else f", which keeps {made.kept:.1%} of the average"
        lines.append(f"rank {made.rank}{kept}")
    return "\n".join([f"{result.name}:", *lines])
