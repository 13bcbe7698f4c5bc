"""The LoRA toolbox, soups and contact sheets as nodes, in a running ComfyUI."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kandinsky5_core.loading import NANO_FOLDER
from kandinsky5_core.weights import lora_tools
from kandinsky5_core.weights.lora import read_lora
from tests.nodes.comfy_server import NodeError
from tests.nodes.workflow_tools import filled

DIT = NANO_FOLDER / "video" / "dit.safetensors"
BASE = "built-in: nano-video"
MODULE = "visual_transformer_blocks.1.feed_forward.in_layer"
SHAPE = {MODULE: (768, 192)}


def make_lora(path, seed=0, layout="official", rank=4, scale=0.05, **metadata):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 192, generator=generator), scale * torch.randn(768, rank, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{MODULE}.lora_A.weight": down, f"{MODULE}.lora_B.weight": up}
    lora_tools.write_lora(path, tensors, layout, {key.replace("__", "."): value for key, value in metadata.items()})
    return up @ down


def delta_of(path):
    return lora_tools.delta(*lora_tools.lora_deltas(read_lora(path, SHAPE))[MODULE])


@pytest.fixture(scope="module")
def models(comfy):
    return comfy.base / "models"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def shown(run, number):
    return run.outputs[number]["text"][0]


def test_bake_extract_resize_convert_in_one_graph(comfy, info, models):
    expected = make_lora(models / "loras" / "k5t" / "one.safetensors", trigger="sks")
    flow = {
        "1": node("K5MergeLora", base=BASE, lora="k5t/one.safetensors", strength=0.5, name="k5t/baked"),
        "2": node("K5ExtractLora", base=BASE, tuned=["1", 0], rank=4, name="k5t/back", layout="kohya", trigger="abc"),
        "3": node("K5ResizeLora", lora=["2", 0], rank=2, name="k5t/small"),
        "4": node("K5ConvertLora", lora=["3", 0], layout="diffusers", name="k5t/renamed.safetensors"),
        "5": node("K5LoraInfo", lora=["4", 0]),
        "6": node("PreviewAny", source=["5", 1]),
        "7": node("PreviewAny", source=["4", 0]),
    }
    run = comfy.run(filled(flow, info))
    assert "merged: 1\nunmatched: 0\nstrength: 0.5" in shown(run, "1")
    baked = load_file(models / "diffusion_models" / "k5t" / "baked.safetensors")
    change = baked[f"{MODULE}.weight"].float() - load_file(DIT)[f"{MODULE}.weight"].float()
    torch.testing.assert_close(change, 0.5 * expected, atol=2e-3, rtol=1e-2)  # fp16 weights
    torch.testing.assert_close(delta_of(models / "loras" / "k5t" / "back.safetensors"), change, atol=2e-3, rtol=1e-2)
    assert torch.linalg.matrix_rank(delta_of(models / "loras" / "k5t" / "small.safetensors")) == 2
    names = list(load_file(models / "loras" / "k5t" / "renamed.safetensors"))
    assert names == [f"transformer.{m}.lora_{end}.weight" for m in _modules(names) for end in "AB"]
    assert "format: diffusers" in shown(run, "5") and "rank: 2" in shown(run, "5")
    assert shown(run, "6") == "abc" and shown(run, "7") == "k5t/renamed.safetensors"
    assert [value for number, value, total in run.progress if number == "1" and value == total]


def _modules(names):
    return list(dict.fromkeys(name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in names))


def test_files_are_never_lost(comfy, info, models):
    make_lora(models / "loras" / "k5t" / "two.safetensors", seed=1)
    target = models / "loras" / "k5t" / "kept.safetensors"
    target.write_bytes(b"mine")

    def convert(layout, **inputs):
        flow = {"1": node("K5ConvertLora", lora="k5t/two.safetensors", layout=layout, name="k5t/kept", **inputs)}
        return shown(comfy.run(filled(flow, info)), "1")

    assert convert("kohya").startswith("file: k5t/kept-2.safetensors")
    assert convert("diffusers").startswith("file: k5t/kept-3.safetensors")
    assert target.read_bytes() == b"mine"
    assert "stays as it is" in convert("kohya", existing="keep") and target.read_bytes() == b"mine"
    assert convert("kohya", existing="replace").startswith("file: k5t/kept.safetensors")
    assert lora_tools.lora_format(target) == "kohya"
    flow = {"1": node("K5ConvertLora", lora="k5t/two.safetensors", layout="kohya", name="k5t/two", existing="replace")}
    with pytest.raises(NodeError, match=r"two.safetensors is also read; write the result to another file"):
        comfy.run(filled(flow, info))


WRONG = {
    "out": ("../../outside", "is no name for a file"),
    "absolute": ("/tmp/outside", "is no name for a file"),
    "drive": ("C:\\outside", "is no name for a file"),
    "hidden": (".hidden", "is no name for a file"),
    "hidden folder": ("a/.b/c", "is no name for a file"),
    "empty": ("  ", "is no name for a file"),
    "line": ("a\nb", "is no name for a file"),
    "link": ("k5t/link/x", "leads out of ComfyUI's models/loras"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_stay_in_their_folder(comfy, info, models, tmp_path, case):
    make_lora(models / "loras" / "k5t" / "three.safetensors", seed=2)
    if case == "link":
        (models / "loras" / "k5t" / "link").symlink_to(tmp_path)
    name, message = WRONG[case]
    before = sorted(models.rglob("*"))
    flow = {"1": node("K5ConvertLora", lora="k5t/three.safetensors", layout="kohya", name=name)}
    with pytest.raises(NodeError, match=message):
        comfy.run(filled(flow, info))
    assert sorted(models.rglob("*")) == before and not list(tmp_path.iterdir())


def test_only_files_of_the_folders_are_read(comfy, info, models, tmp_path):
    make_lora(tmp_path / "secret.safetensors")
    flow = {"1": node("K5LoraInfo", lora="../../../secret.safetensors")}
    with pytest.raises(NodeError, match="Value not in list"):
        comfy.run(flow)
    # A link could carry any text past ComfyUI's check of the drop-down.
    for text in (str(tmp_path / "secret.safetensors"), "../secret.safetensors", "gone.safetensors"):
        flow = {"1": node("PrimitiveString", value=text), "2": node("K5LoraInfo", lora=["1", 0])}
        with pytest.raises(NodeError, match=r"mismatch|is not in ComfyUI's models/loras"):
            comfy.run(flow)
    make_lora(models / "loras" / "k5r.safetensors")
    for text, message in ((str(tmp_path / "secret.safetensors"), "no .safetensors file in ComfyUI's model or output folders"),
                          ("loras/../../../secret.safetensors", "is not in ComfyUI's models/loras"),
                          ("gone.safetensors", "neither in ComfyUI's models/loras nor")):  # fmt: skip
        with pytest.raises(NodeError, match=message):
            comfy.run(filled(soup_flow(["loras/k5r.safetensors", text]), info))


def test_cancel_between_tensors_leaves_nothing(comfy, info, models):
    make_lora(models / "loras" / "k5t" / "four.safetensors", seed=3)
    flow = {"1": node("K5MergeLora", base=BASE, lora="k5t/four.safetensors", name="k5t/never")}
    # The request takes its way while tensors are written, so it is sent before the first is.
    run = comfy.run(filled(flow, info), interrupt_in="1")
    if not run.interrupted:
        pytest.skip("the file was written before the cancel came")
    assert not list((models / "diffusion_models" / "k5t").glob("*never*"))


def test_parts_named_by_a_text_or_a_whole_path(comfy, info, models):
    """As the nodes of training jobs name their results."""
    made = make_lora(models / "loras" / "k5p.safetensors", 1), make_lora(comfy.base / "output" / "job" / "r.safetensors", 2)
    flow = {
        "1": node("PrimitiveString", value="k5p.safetensors"),
        "2": node("PrimitiveString", value=str(comfy.base / "output" / "job" / "r.safetensors")),
        "3": node("K5Soup", part_1=["1", 0], part_2=["2", 0], name="k5p-soup"),
    }
    comfy.run(filled(flow, comfy.object_info()))
    torch.testing.assert_close(delta_of(models / "loras" / "k5p-soup.safetensors"), (made[0] + made[1]) / 2)


def soup_flow(parts, **inputs):
    given = {f"part_{number}": part for number, part in enumerate(parts, 1)}
    return {"1": node("K5Soup", **given, **inputs)}


def test_soups_chain_and_load_by_their_names(comfy, info, models):
    folder = models / "loras" / "k5s"
    made = [make_lora(folder / f"{n}.safetensors", n, kandinsky5__samples=str(100 * n)) for n in (1, 2, 3)]
    flow = {
        "1": node("K5Soup", part_1="loras/k5s/1.safetensors", part_2="loras/k5s/2.safetensors", weighting="size", name="k5s/sub"),
        "2": node("K5Soup", part_1=["1", 0], size_1=["1", 1], part_2="loras/k5s/3.safetensors", weighting="equal", name="k5s/all"),
        "3": node("K5LoadAll", model_name=BASE),
        "4": node("K5LoadLora", model=["3", 0], lora_1=["2", 0]),
        "5": node("LoraLoaderModelOnly", model=["3", 0], lora_name=["2", 0], strength_model=1.0),
        "6": node("PreviewAny", source=["4", 2]),
        "7": node("ModelSave", model=["5", 0], filename_prefix="k5s/stock"),
    }  # fmt: skip
    run = comfy.run(filled(flow, info))
    assert " 33.33%  1.safetensors" in shown(run, "1") and " 66.67%  2.safetensors" in shown(run, "1")
    assert " 50.00%  sub.safetensors" in shown(run, "2") and "rank 12" in shown(run, "2")
    found = delta_of(folder / "all.safetensors")
    torch.testing.assert_close(found, (made[0] / 3 + made[1] * 2 / 3) / 2 + made[2] / 2, rtol=1e-4, atol=1e-5)
    assert "all.safetensors: 1 layers at strength 1, rank 12" in shown(run, "6")
    with safe_open(folder / "all.safetensors", "pt") as file:
        assert file.metadata()["kandinsky5.samples"] == "600"


def test_soup_of_models_and_of_a_folder(comfy, info, models):
    base = load_file(DIT)
    folder = models / "diffusion_models" / "k5d"
    for number, (name, samples) in enumerate({"animals/cats": 9, "animals/dogs": 1, "people": 5}.items(), 1):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        moved = {key: value + number * (key == f"{MODULE}.weight") for key, value in base.items()}
        save_file(moved, path, metadata={"kandinsky5.samples": str(samples)})
    flow = {
        "1": node("K5SoupFolder", folder="diffusion_models/k5d", weighting="equal", within="sqrt", name="k5d-nested"),
        "2": node("K5Soup", part_1="diffusion_models/k5d/people.safetensors", name="k5d-flat", weighting="size",
                  part_2="diffusion_models/k5d/animals/dogs.safetensors", size_2=5),
        "3": node("PreviewAny", source=["1", 1]),
        "4": node("K5LoadModel", model_name=["1", 0]),
        "5": node("PreviewAny", source=["4", 1]),
    }  # fmt: skip
    # Folders are offered as they are when the page is loaded.
    run = comfy.run(filled(flow, comfy.object_info()))
    assert " 37.50%  cats.safetensors" in shown(run, "1") and shown(run, "3") == "15" and "nano-video" in shown(run, "5")
    for name, mean in (("nested", (1 * 0.75 + 2 * 0.25) / 2 + 3 / 2), ("flat", 2.5)):
        made = load_file(models / "diffusion_models" / f"k5d-{name}.safetensors")
        assert torch.equal(made["out_layer.out_layer.bias"], base["out_layer.out_layer.bias"])
        change = made[f"{MODULE}.weight"].float() - base[f"{MODULE}.weight"].float()
        torch.testing.assert_close(change, torch.full_like(change, mean), atol=4e-3, rtol=2e-3)
    flow = {"1": {**flow["1"], "inputs": {**flow["1"]["inputs"], "name": "k5d/again"}}}
    with pytest.raises(NodeError, match="would lie in k5d, as one more part"):
        comfy.run(filled(flow, comfy.object_info()))


def test_soups_that_cannot_be_say_why(comfy, info, models):
    make_lora(models / "loras" / "k5w" / "a.safetensors", 1)
    make_lora(models / "loras" / "k5w" / "b.safetensors", 2)
    save_file({"x": torch.ones(1)}, models / "diffusion_models" / "k5w.safetensors")
    a, b, other = "loras/k5w/a.safetensors", "loras/k5w/b.safetensors", "diffusion_models/k5w.safetensors"
    for flow, message in (
        (soup_flow([a]), "at least two parts, and 1 are chosen"),
        (soup_flow([a, a]), "given twice"),
        (soup_flow([a, b], weighting="sqrt"), "needs the samples of each part"),
        (soup_flow([a, other]), "is a LoRA and k5w.safetensors a whole model"),
        (soup_flow([a, b], name="../x"), "is no name for a file"),
    ):
        with pytest.raises(NodeError, match=message):
            comfy.run(filled(flow, comfy.object_info()))
    assert not list((models / "loras").glob("soup*"))


def test_a_part_that_was_trained_again_makes_a_new_soup(comfy, info, models):
    folder = models / "loras" / "k5a"
    first, other = (make_lora(folder / f"{n}.safetensors", n) for n in (1, 2))
    flow = filled(soup_flow(["loras/k5a/1.safetensors", "loras/k5a/2.safetensors"], name="k5a/soup", existing="replace"),
                  comfy.object_info())  # fmt: skip
    comfy.run(flow)
    torch.testing.assert_close(delta_of(folder / "soup.safetensors"), (first + other) / 2)
    before = (folder / "soup.safetensors").stat().st_mtime_ns
    comfy.run(flow)
    assert (folder / "soup.safetensors").stat().st_mtime_ns == before
    again = make_lora(folder / "1.safetensors", 9)
    comfy.run(flow)
    torch.testing.assert_close(delta_of(folder / "soup.safetensors"), (again + other) / 2)


def test_parts_and_soup_on_the_same_seed_in_one_sheet(comfy, info, models):
    for number in (1, 2):
        make_lora(models / "loras" / "k5c" / f"{number}.safetensors", number, scale=0.3)
    flow = {
        "1": node("K5LoadAll", model_name=BASE),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a big red circle moves left on a black background"),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("K5EmptyLatent", model=["1", 0]),
        "5": node("K5Soup", part_1="loras/k5c/1.safetensors", part_2="loras/k5c/2.safetensors", name="k5c/soup"),
        "9": node("K5ContactSheet", labels="first part\nsecond part\nsoup", columns=4, height=64),
        "10": node("SaveImage", images=["9", 0]),
    }
    for row, name in enumerate(["k5c/1.safetensors", "k5c/2.safetensors", ["5", 0]], 1):
        at = 20 * row
        flow |= {
            str(at): node("K5LoadLora", model=["1", 0], lora_1=name),
            str(at + 1): node("K5Sample", model=[str(at), 0], positive=["2", 0], negative=["3", 0], latent=["4", 0], seed=4, steps=2),
            str(at + 2): node("VAEDecode", samples=[str(at + 1), 0], vae=["1", 2]),
        }  # fmt: skip
        flow["9"]["inputs"][f"images_{row}"] = [str(at + 2), 0]
    run = comfy.run(filled(flow, comfy.object_info()))
    sheet = np.asarray(Image.open(io.BytesIO(comfy.view(run.outputs["10"]["images"][0]))))
    assert sheet.shape == (3 * (64 + 18), 4 * 64 + 3 * 4, 3)
    rows = [sheet[n * 82 + 18 : (n + 1) * 82].astype(int) for n in range(3)]
    assert min(abs(rows[a] - rows[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))) > 1
    assert (sheet[:18] < 100).any() and (sheet[:18] == 255).any()


def test_sheet_says_what_is_missing(comfy, info):
    with pytest.raises(NodeError, match="Required input is missing: images_1"):
        comfy.run({"1": node("K5ContactSheet", labels="", columns=1, height=64), "2": node("PreviewImage", images=["1", 0])})
