"""Inside ComfyUI's Python (see in_comfyui.py): what each LoRA loader does to the weights, for the table of the docs."""

import dataclasses
import importlib
import json

import torch
from safetensors.torch import save_file


def check_lora_table(name, folder):
    """Writes `<loader>/<form>.safetensors` with the changes of the weights, or `<form>.json` with the error.

    The folder holds `base.safetensors`, `modules.json`, and `loras/` with the forms.
    """
    import folder_paths

    import nodes

    folder_paths.add_model_folder_path("loras", str(folder / "loras"), is_default=True)
    folder_paths.add_model_folder_path("diffusion_models", str(folder), is_default=True)
    modules = json.loads((folder / "modules.json").read_text())
    (theirs,) = nodes.UNETLoader().load_unet("base.safetensors", "default")
    models = {"ours": our_model(name, folder / "base.safetensors"), "theirs": theirs}
    assert type(theirs.model).__module__ == "comfy.model_base", "ComfyUI's own class"
    stock, node = nodes.LoraLoaderModelOnly, nodes.NODE_CLASS_MAPPINGS["K5LoadLora"]

    def with_stock(model, lora):
        # A new one for each file: it keeps the last that it read.
        return stock().load_lora_model_only(model, lora, 1.0)[0]

    def with_node(model, lora):
        return node.execute(model, lora_1=lora, strength_1=1.0).args[0]

    loaders = {"node": with_node, "stock": with_stock}
    for lora in sorted((folder / "loras").rglob("*.safetensors")):
        path = lora.relative_to(folder / "loras")
        form = path.parts[0].removesuffix(".safetensors")
        for which, model in models.items():
            for how, load in loaders.items():
                target = folder / f"{how}-{which}"
                target.mkdir(exist_ok=True)
                try:
                    patched = load(model, str(path))
                except ValueError as error:
                    (target / f"{form}.json").write_text(json.dumps(str(error)))
                    continue
                save_file(changes(patched, modules), target / f"{form}.safetensors")


def our_model(name, path):
    """A MODEL of our class with the weights at `path`, whose sizes are those of no released checkpoint."""
    detect = importlib.import_module(f"{name}.kandinsky5_core.weights.detect")
    config = importlib.import_module(f"{name}.kandinsky5_core.config")
    row = dataclasses.replace(next(iter(config.VARIANTS.values())), dit=detect.inspect_file(path, want="dit").config)
    return importlib.import_module(f"{name}.nodes.bridge.model").load_model(path, row, torch.float32)


def changes(model, modules):
    """What the patches add to each layer, and to all others together."""
    keys = {module: f"diffusion_model.{module}.weight" for module in modules}
    found = {"others": torch.tensor(float(len(set(model.patches) - set(keys.values()))))}
    before = {module: model.model.state_dict()[key].float().clone() for module, key in keys.items()}
    model.patch_model()
    after = model.model.state_dict()
    for module, key in keys.items():
        found[module] = after[key].float() - before[module]
    model.unpatch_model()
    assert all(torch.equal(model.model.state_dict()[key].float(), before[module]) for module, key in keys.items())
    return found
