"""The pack loads under any folder name, beside other packs, quickly, and a broken part hides only itself."""

import re

import pytest

from tests.nodes.comfy_server import PACK, ComfyServer

ALL = {
    "K5LoadModel", "K5LoadTextEncoders", "K5LoadVAE", "K5LoadAll", "K5ModelInfo", "K5EncodePrompts", "K5EnhancePrompt",
    "K5EmptyLatent", "K5ImageToVideo", "K5ExtendVideo", "K5JoinVideo", "K5EditConditioning", "K5Inpaint", "K5PasteBack",
    "K5Sample", "K5Schedule", "K5Shift", "K5DecodeVideo", "K5Attention", "K5LoadLora", "K5NanoPicture",
    "K5MergeLora", "K5ExtractLora", "K5ResizeLora", "K5ConvertLora", "K5LoraInfo", "K5Soup", "K5SoupFolder",
    "K5ContactSheet", "K5StepCache", "K5TrainingData", "K5CacheData", "K5TrainingSettings", "K5StartTraining",
    "K5WaitForTraining", "K5TrainingStatus", "K5LoadTrained", "K5Plan", "K5BlockSwap",
}  # fmt: skip
OTHER_PACK = {
    "__init__.py": "import sys\nfrom . import train\nsys.modules['train'] = train\nNODE_CLASS_MAPPINGS = {}\n",
    "train/__init__.py": "MINE = True\n",
}


def ours(server):
    return {name for name in server.object_info() if name.startswith("K5")}


def test_every_node_has_tooltips_a_category_and_is_in_the_list(comfy, info):
    assert ours(comfy) == ALL
    for name in ALL:
        node = info[name]
        assert node["category"].startswith("Kandinsky 5/") and node["description"]
        for group in ("required", "optional"):
            for input_name, spec in node["input"].get(group, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{name}.{input_name} has no tooltip"


def test_start_is_quiet(comfy):
    lines = [line for line in comfy.log().splitlines() if "Kandinsky" in line]
    assert re.search(r"[\d.]+ seconds: .*ComfyUI-Kandinsky-5.0", "\n".join(lines))
    assert not [line for line in lines if "IMPORT FAILED" in line or "are off" in line]


@pytest.mark.parametrize(
    ("folder", "parent", "beside"),
    [("k5 test", None, None), ("ComfyUI-Kandinsky-5.0", "a.path with.dots", OTHER_PACK)],
    ids=["a space", "dots and another train"],
)
def test_loads_from_odd_folders_and_beside_others(comfyui, folder, parent, beside):
    with ComfyServer(folder, parent=parent, beside=beside) as server:
        assert ours(server) == ALL
        picture = {
            "1": {"class_type": "K5NanoPicture", "inputs": {"sentence": "a red circle on a gray background",
                                                            "width": 64, "height": 64, "frames": 1}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }  # fmt: skip
        assert server.run(picture).outputs["2"]["images"]


def test_the_pack_has_what_the_loader_shows():
    text = (PACK / "nodes" / "__init__.py").read_text()
    assert all(f'"{name}"' in text for name in ALL)
