"""Which LoRA key format loads in which loader: found by loading, written into docs/lora-formats.md.

    python -m tests.nodes.make_lora_table

Needs a ComfyUI, diffusers and peft. Files of each form are made here, not by the code under test; a loader loads a form
if the weights change as the closed form says, within a hundredth.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kandinsky5_core.config import DiTConfig
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.weights import lora_tools
from tests.nodes.comfy_server import PACK, comfyui_path, comfyui_python

DOCS = PACK / "docs" / "lora-formats.md"
RANK = 4
MODULES = {
    "visual_transformer_blocks.1.self_attention.to_query": (1792, 1792),
    "text_transformer_blocks.0.feed_forward.in_layer": (256, 1792),
}
CONFIG = DiTConfig(
    model_dim=1792, ff_dim=256, time_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(16, 24, 24)
)
"""The least that ComfyUI takes for a Kandinsky 5."""
COLUMNS = {
    "core": "`kandinsky5 lora merge`",
    "node-ours": "Load Kandinsky 5 LoRA, our MODEL",
    "node-theirs": "Load Kandinsky 5 LoRA, ComfyUI's MODEL",
    "stock-ours": "LoraLoaderModelOnly, our MODEL",
    "stock-theirs": "LoraLoaderModelOnly, ComfyUI's MODEL",
    "diffusers": "diffusers `load_lora_weights`",
}


@dataclass(frozen=True)
class Form:
    """One way to write a LoRA."""

    name: str
    who: str
    keys: str
    """`{}` stands for the module, `A` and `B` for the two matrices."""
    flat: bool = False
    """Dots of the module become underscores."""
    ends: tuple[str, str] = ("A", "B")
    alpha: str = ""
    """Key of alpha 2 * rank, where the form has one."""
    metadata: dict[str, str] = field(default_factory=dict)
    beside: dict[str, object] = field(default_factory=dict)
    """config_lora.json beside it."""
    scale: float = 1.0
    dora: str = ""
    """Key of the magnitudes."""


TWICE = {"r": RANK, "lora_alpha": 2 * RANK}
FORMS = (
    Form("official", "official files, kandinsky-5-lora-train", "base_model.model.{}.lora_#.default.weight"),
    Form("official-alpha", "the same with alpha in `config_lora.json`", "base_model.model.{}.lora_#.default.weight",
         beside=TWICE, scale=2.0),
    Form("peft", "PEFT `save_pretrained`", "base_model.model.{}.lora_#.weight"),
    Form("diffusers", "diffusers, SimpleTuner", "transformer.{}.lora_#.weight"),
    Form("diffusers-alpha", "the same with alpha in `lora_adapter_metadata`", "transformer.{}.lora_#.weight", scale=2.0,
         metadata={"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in TWICE.items()}
                   | {"transformer.target_modules": list(MODULES)})}),
    Form("bare", "diffusers `save_lora_adapter`", "{}.lora_#.weight"),
    Form("comfyui", "ComfyUI style", "diffusion_model.{}.lora_#.weight", alpha="diffusion_model.{}.alpha", scale=2.0),
    Form("comfyui-train", "ComfyUI's Train LoRA", "diffusion_model.{}.lora_#.weight", ends=("down", "up"),
         alpha="diffusion_model.{}.alpha", scale=2.0),
    Form("kohya", "musubi-tuner (kohya)", "lora_unet_{}.lora_#.weight", flat=True, ends=("down", "up"),
         alpha="lora_unet_{}.alpha", scale=2.0),
    Form("lycoris", "LyCORIS LoCon", "lycoris_{}.lora_#.weight", flat=True, ends=("down", "up"),
         alpha="lycoris_{}.alpha", scale=2.0),
    Form("dora", "DoRA of PEFT", "transformer.{}.lora_#.weight", dora="transformer.{}.lora_magnitude_vector"),
)  # fmt: skip
_KEYS = {"official": FORMS[0].keys, "diffusers": FORMS[3].keys, "comfyui": FORMS[6].keys, "kohya": FORMS[8].keys}
WRITTEN = tuple(
    Form(f"convert-{layout}", f"`kandinsky5 lora convert --layout {layout}`", _KEYS[layout], scale=2.0,
         flat=layout == "kohya", ends=("down", "up") if layout == "kohya" else ("A", "B"))
    for layout in lora_tools.FORMATS
)  # fmt: skip


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up by module."""
    generator = torch.Generator().manual_seed(0)
    return {
        module: (torch.randn(RANK, inner, generator=generator) / 40, torch.randn(outer, RANK, generator=generator))
        for module, (outer, inner) in MODULES.items()
    }


def write_form(form: Form, base: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The file of a form; what it adds to the weights."""
    tensors, expected = {}, {}
    for module, (down, up) in pairs().items():
        named = module.replace(".", "_") if form.flat else module
        key = form.keys.format(named)
        tensors |= {key.replace("#", form.ends[0]): down, key.replace("#", form.ends[1]): up}
        if form.alpha:
            tensors[form.alpha.format(named)] = torch.tensor(2.0 * RANK)
        expected[module] = form.scale * up @ down
        if form.dora:
            weight = base[f"{module}.weight"]
            moved = weight + expected[module]
            size = 1.5 * weight.norm(dim=1)
            tensors[form.dora.format(named)] = size
            expected[module] = moved * (size / moved.norm(dim=1))[:, None] - weight
    path = folder / f"{form.name}.safetensors"
    if form.beside:
        path = folder / form.name / "lora.safetensors"
        path.parent.mkdir()
        (path.parent / "config_lora.json").write_text(json.dumps(form.beside))
    save_file(tensors, path, metadata=form.metadata or None)
    return expected


def write_all(folder: Path) -> dict[str, dict[str, Tensor]]:
    """base.safetensors, modules.json and loras/; what each form should add."""
    generator = torch.Generator().manual_seed(3)
    dit = DiffusionTransformer(CONFIG)
    base = {name: torch.randn(tensor.shape, generator=generator) * 0.02 for name, tensor in dit.state_dict().items()}
    save_file(base, folder / "base.safetensors")
    (folder / "modules.json").write_text(json.dumps(list(MODULES)))
    loras = folder / "loras"
    loras.mkdir()
    expected = {form.name: write_form(form, base, loras) for form in FORMS}
    for form in WRITTEN:
        layout = form.name.removeprefix("convert-")
        lora_tools.convert_lora(loras / "comfyui-train.safetensors", loras / f"{form.name}.safetensors", layout=layout)
        expected[form.name] = expected["comfyui-train"]
    return expected


def path_of(form: str, folder: Path) -> Path:
    """The file of a form."""
    return next(path for path in (folder / f"{form}.safetensors", folder / form / "lora.safetensors") if path.exists())


def by_core(folder: Path) -> None:
    """`kandinsky5 lora merge` for each form, as files of changes."""
    base, target = load_file(folder / "base.safetensors"), folder / "core"
    target.mkdir()
    for form in (*FORMS, *WRITTEN):
        try:
            lora_tools.merge_lora(
                folder / "base.safetensors", path_of(form.name, folder / "loras"), folder / "merged.safetensors"
            )
        except ValueError as error:
            (target / f"{form.name}.json").write_text(json.dumps(str(error)))
            continue
        merged = load_file(folder / "merged.safetensors")
        moved = {name.removesuffix(".weight"): merged[name] - base[name] for name in base}
        others = sum(bool(tensor.any()) for name, tensor in moved.items() if name not in MODULES)
        found = {module: moved[module] for module in MODULES}
        save_file({**found, "others": torch.tensor(float(others))}, target / f"{form.name}.safetensors")


def by_diffusers(folder: Path) -> None:
    """diffusers' pipeline for each form, as files of changes."""
    from diffusers import Kandinsky5T2VPipeline

    target = folder / "diffusers"
    target.mkdir()
    transformer = diffusers_model(load_file(folder / "base.safetensors"))
    for form in (*FORMS, *WRITTEN):
        pipeline = Kandinsky5T2VPipeline(copy.deepcopy(transformer), *[None] * 6)
        try:
            pipeline.load_lora_weights(path_of(form.name, folder / "loras"))
        except Exception as error:  # whatever it is, the user's file did not load
            (target / f"{form.name}.json").write_text(json.dumps(str(error)))
            continue
        found = {module: added(pipeline.transformer.get_submodule(module)) for module in MODULES}
        save_file({**found, "others": torch.tensor(0.0)}, target / f"{form.name}.safetensors")


def diffusers_model(weights: dict[str, Tensor]) -> torch.nn.Module:
    """diffusers' transformer with given weights."""
    from diffusers import Kandinsky5Transformer3DModel

    fields = (
        "in_visual_dim", "out_visual_dim", "in_text_dim", "in_text_dim2", "time_dim", "patch_size", "model_dim",
        "ff_dim", "num_text_blocks", "num_visual_blocks", "axes_dims", "visual_cond",
    )  # fmt: skip
    model = Kandinsky5Transformer3DModel(**{name: getattr(CONFIG, name) for name in fields}).eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def added(layer: torch.nn.Module) -> Tensor:
    """(out, in): what a layer of PEFT adds to its own weight, seen from outside."""
    base = getattr(layer, "base_layer", layer)
    eye = torch.eye(base.in_features)
    return (layer(eye) - base(eye)).T.contiguous()


def verdict(form: str, expected: dict[str, Tensor], folder: Path) -> str:
    """What a loader did with a form, in a word or two."""
    path = folder / f"{form}.safetensors"
    if not path.exists():
        assert (folder / f"{form}.json").exists(), f"{folder.name} has nothing for {form}"
        return "refused"
    found = load_file(path)
    errors = [float((found[module] - change).norm() / change.norm()) for module, change in expected.items()]
    if max(errors) < 0.01 and not found["others"]:
        return "yes"
    if not any(found[module].any() for module in expected) and not found["others"]:
        return "no"
    factors = [float((found[module] * change).sum() / change.square().sum()) for module, change in expected.items()]
    plain = {module: up @ down for module, (down, up) in pairs().items()}
    if all(float((found[module] - change).norm() / change.norm()) < 0.01 for module, change in plain.items()):
        return "**only as a LoRA**" if form == "dora" else f"**at {factors[0]:.2g} of its strength**"
    straight = all(
        float((found[module] - factor * change).norm() / change.norm()) < 0.01
        for (module, change), factor in zip(expected.items(), factors, strict=True)
    )
    return f"**at {factors[0]:.2g} of its strength**" if straight else "**wrong**"


def find(folder: Path) -> dict[str, dict[str, str]]:
    """Form to column to verdict, by loading everything everywhere."""
    expected = write_all(folder)
    by_core(folder)
    by_diffusers(folder)
    comfyui = comfyui_path()
    script = Path(__file__).parent / "in_comfyui.py"
    done = subprocess.run(
        [comfyui_python(comfyui), str(script), str(comfyui), str(PACK), "lora_table_checks.lora_table", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        form: {column: verdict(form, changes, folder / column) for column in COLUMNS}
        for form, changes in expected.items()
    }


def table(found: dict[str, dict[str, str]], forms: tuple[Form, ...]) -> str:
    """Markdown."""
    lines = [["Written by", "Key of a layer's first matrix", *COLUMNS.values()]]
    lines += [["---"] * len(lines[0])]
    for form in forms:
        key = form.keys.replace("{}", "X_Y" if form.flat else "X.Y").replace("#", form.ends[0])
        extra = form.alpha or form.dora
        keys = f"`{key}`" + (f", `{extra.replace('{}', 'X_Y' if form.flat else 'X.Y')}`" if extra else "")
        lines.append([form.who, keys, *(found[form.name][column] for column in COLUMNS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str, found: dict[str, dict[str, str]]) -> str:
    """The docs page with its tables renewed."""
    for name, forms in (("read", FORMS), ("written", WRITTEN)):
        made = f"<!-- {name} -->\n{table(found, forms)}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


def main() -> None:
    """Renew the page."""
    with tempfile.TemporaryDirectory() as folder:
        found = find(Path(folder))
    DOCS.write_text(page(DOCS.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
