"""LoRA files of every key format, their tools, and soups."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky5_core.cli import main
from kandinsky5_core.loading import NANO_FOLDER
from kandinsky5_core.weights import lora_tools
from kandinsky5_core.weights.lora import read_lora
from kandinsky5_core.weights.soup import Part, soup, soup_weights

DIT = NANO_FOLDER / "video" / "dit.safetensors"
MODULE = "visual_transformer_blocks.1.self_attention.to_query"
SHAPES = {MODULE: (192, 192)}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 192, generator=generator), torch.randn(192, 4, generator=generator)


def written(path, pair, layout, alpha=8.0):
    tensors = {f"{MODULE}.lora_A.weight": pair[0], f"{MODULE}.lora_B.weight": pair[1]}
    lora_tools.write_lora(path, tensors, layout, {"lora_alpha": str(alpha), "trigger": "k5"})
    return path


@pytest.mark.parametrize("layout", lora_tools.FORMATS)
def test_every_format_is_written_and_read_back(tmp_path, pair, layout):
    path = written(tmp_path / "a.safetensors", pair, layout)
    assert lora_tools.lora_format(path) == layout
    found = read_lora(path, SHAPES)
    down, up, scale = lora_tools.lora_deltas(found)[MODULE]
    # Alpha 8 at rank 4 is a scale of 2; layouts whose loaders know no alpha have it in the up matrix.
    folded = 1.0 if layout in lora_tools.WITH_ALPHA else 2.0
    assert torch.equal(down, pair[0]) and torch.equal(up, folded * pair[1]) and scale == 2.0 / folded
    assert found.trigger == "k5" and found.rank == 4 and not found.unmatched
    for other in lora_tools.FORMATS:
        target = tmp_path / f"{other}.safetensors"
        lora_tools.convert_lora(path, target, layout=other)
        again = lora_tools.lora_deltas(read_lora(target, SHAPES))[MODULE]
        torch.testing.assert_close(lora_tools.delta(*again), lora_tools.delta(down, up, scale))


def test_merge_then_extract_gives_the_lora_back(tmp_path, pair):
    lora = written(tmp_path / "a.safetensors", pair, "official")
    lora_tools.merge_lora(DIT, lora, tmp_path / "merged.safetensors", strength=0.5)
    base, merged = load_file(DIT), load_file(tmp_path / "merged.safetensors")
    assert base.keys() == merged.keys()
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert changed == [f"{MODULE}.weight"]
    expected = base[changed[0]].float() + pair[1] @ pair[0]
    torch.testing.assert_close(merged[changed[0]].float(), expected, atol=2e-2, rtol=2e-3)  # fp16 weights
    told = lora_tools.extract_lora(DIT, tmp_path / "merged.safetensors", tmp_path / "b.safetensors", rank=4)
    assert told["kept"] > 0.999
    again = lora_tools.delta(*lora_tools.lora_deltas(read_lora(tmp_path / "b.safetensors", SHAPES))[MODULE])
    torch.testing.assert_close(again, pair[1] @ pair[0], atol=5e-2, rtol=5e-2)


def test_resize_is_the_best_of_its_rank(tmp_path, pair):
    lora = written(tmp_path / "a.safetensors", pair, "diffusers")
    same = lora_tools.resize_lora(lora, tmp_path / "b.safetensors", rank=4)
    less = lora_tools.resize_lora(lora, tmp_path / "c.safetensors", rank=2, layout="kohya")
    assert same["kept"] == pytest.approx(1.0) and 0.3 < less["kept"] < 1
    full = lora_tools.delta(*lora_tools.lora_deltas(read_lora(lora, SHAPES))[MODULE])
    back = lora_tools.delta(*lora_tools.lora_deltas(read_lora(tmp_path / "b.safetensors", SHAPES))[MODULE])
    torch.testing.assert_close(back, full, atol=1e-3, rtol=1e-4)
    small = lora_tools.delta(*lora_tools.lora_deltas(read_lora(tmp_path / "c.safetensors", SHAPES))[MODULE])
    assert torch.linalg.matrix_rank(small) == 2
    assert float((small - full).square().sum() / full.square().sum()) == pytest.approx(1 - less["kept"], abs=1e-4)


def test_foreign_and_damaged_loras_are_refused(tmp_path, pair):
    save_file({"lora_unet_down.lora_down.weight": pair[0]}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="none of its 1 keys fits"):
        read_lora(tmp_path / "foreign.safetensors", SHAPES)
    save_file({f"transformer.{MODULE}.lora_A.weight": torch.zeros(4, 64)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="LoRA of another model"):
        read_lora(tmp_path / "other.safetensors", SHAPES)
    save_file({f"transformer.{MODULE}.lora_A.weight": pair[0]}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="no up matrix"):
        lora_tools.merge_lora(DIT, tmp_path / "half.safetensors", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_soup_is_the_weighted_mean_and_keeps_dtypes(tmp_path):
    base = load_file(DIT)
    for number in (1, 2):
        save_file({name: tensor + number for name, tensor in base.items()}, tmp_path / f"{number}.safetensors")
    parts = [Part(path=tmp_path / "1.safetensors", size=100), Part(path=tmp_path / "2.safetensors", size=900)]
    for weighting, mean in (("equal", 1.5), ("size", 1.9), ("sqrt", 1.75)):
        soup(parts, tmp_path / "soup.safetensors", weighting=weighting)
        made = load_file(tmp_path / "soup.safetensors")
        name = f"{MODULE}.weight"
        assert made[name].dtype == base[name].dtype
        torch.testing.assert_close(made[name].float(), base[name].float() + mean, atol=4e-3, rtol=2e-3)
    assert not list(tmp_path.glob(".*"))


def test_soup_weights():
    assert soup_weights([4, 1], "sqrt") == pytest.approx([2 / 3, 1 / 3])
    assert soup_weights([5, 1, 2], "equal") == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="must be positive"):
        soup_weights([1, 0], "size")


def test_only_siblings_make_a_soup(tmp_path):
    a = {"x.weight": torch.ones(2, 2)}
    save_file(a, tmp_path / "a.safetensors", metadata={"kandinsky5.base": "one"})
    save_file({**a, "y.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    save_file({"x.weight": torch.ones(2, 3)}, tmp_path / "c.safetensors")
    save_file(a, tmp_path / "d.safetensors", metadata={"kandinsky5.base": "two"})
    for other, message in (("b", "only one of them has y.weight"), ("c", r"x.weight is \(2, 2\) and \(2, 3\)"),
                           ("d", "different bases")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            soup([Part(path=tmp_path / "a.safetensors"), Part(path=tmp_path / f"{other}.safetensors")], tmp_path / "s")
        assert not (tmp_path / "s").exists()


def test_commands(tmp_path, pair, capsys):
    lora = written(tmp_path / "a.safetensors", pair, "official")
    assert main(["lora", "info", str(lora), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["rank"], told["trigger"], told["modules"]) == ("official", 4, "k5", 1)
    assert main(["lora", "merge", str(DIT), str(lora), str(tmp_path / "m.safetensors")]) == 0
    assert main(["soup", str(tmp_path / "s.safetensors"), f"{DIT}=10", f"{tmp_path / 'm.safetensors'}=30",
                 "--weighting", "sqrt", "--json"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["soup", str(tmp_path / "s.safetensors"), str(DIT), "--weighting", "sqrt"]) == 2
    assert "needs the samples of each part" in capsys.readouterr().err
