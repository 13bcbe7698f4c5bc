"""Soups in levels, soups of LoRAs, and what LoRA files say of their scale."""

import json
import math
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kandinsky5_core.cli import main
from kandinsky5_core.loading import NANO_FOLDER
from kandinsky5_core.weights import lora_tools
from kandinsky5_core.weights import soup as soup_module
from kandinsky5_core.weights.lora import read_lora
from kandinsky5_core.weights.low_rank import truncated, truncated_product
from kandinsky5_core.weights.soup import Part, soup, soup_weights
from kandinsky5_core.weights.soup_tree import Group, flat_shares, group_of_folder, nested_soup, read_recipe

DIT = NANO_FOLDER / "video" / "dit.safetensors"
MODULES = ("visual_transformer_blocks.0.self_attention.to_query", "visual_transformer_blocks.2.feed_forward.in_layer")
SIZES = {MODULES[0]: (192, 192), MODULES[1]: (768, 192)}


def model(path, seed, samples=None, dtype=torch.float32, **metadata):
    """A small 'fine-tune' at path; its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in {"b.weight": (5, 3), "a.weight": (4, 4), "bias": (7,)}.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples is not None:
        metadata["kandinsky5.samples"] = str(samples)
    save_file(tensors, path, metadata=metadata or None)
    return tensors


def lora(path, seed, layout="comfyui", rank=4, alpha=4.0, **metadata):
    """A LoRA on two layers of nano-video."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (outer, inner) in SIZES.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) / 14
        tensors[f"{module}.lora_B.weight"] = torch.randn(outer, rank, generator=generator) / 4
    lora_tools.write_lora(path, tensors, layout, {"lora_alpha": str(alpha), **metadata})
    scale = alpha / rank
    return {m: scale * tensors[f"{m}.lora_B.weight"].double() @ tensors[f"{m}.lora_A.weight"].double() for m in MODULES}


def deltas(path):
    return {m: lora_tools.delta(*pair) for m, pair in lora_tools.lora_deltas(read_lora(path, SIZES)).items()}


@pytest.fixture
def domains(tmp_path):
    """Two domains of subdomains with sizes, and one without; (folder, tensors by path)."""
    folder = tmp_path / "domains"
    sizes = {"animals/cats": 900, "animals/dogs": 100, "people/crowds": 400, "people/faces": 25, "nature": 16}
    return folder, {
        name: (samples, model(folder / f"{name}.safetensors", seed, samples))
        for seed, (name, samples) in enumerate(sizes.items())
    }


def expected(parts, shares):
    return {
        name: sum(share * parts[key][1][name].double() for key, share in shares.items()) for name in ("a.weight", "bias")
    }


def test_two_levels_are_one_with_product_shares(domains, tmp_path):
    folder, parts = domains
    nested_soup(group_of_folder(folder), tmp_path / "soup.safetensors")
    # The report: root of the size within a domain, equal between domains.
    shares = {
        "animals/cats": 30 / 40 / 3, "animals/dogs": 10 / 40 / 3, "people/crowds": 20 / 25 / 3,
        "people/faces": 5 / 25 / 3, "nature": 1 / 3,
    }  # fmt: skip
    made = load_file(tmp_path / "soup.safetensors")
    for name, tensor in expected(parts, shares).items():
        torch.testing.assert_close(made[name].double(), tensor, rtol=1e-6, atol=1e-6)
    told = flat_shares(group_of_folder(folder))
    assert {str(part.path.relative_to(folder).with_suffix("")): share for part, share in told} == pytest.approx(shares)


def test_two_levels_equal_soups_of_soups(domains, tmp_path):
    folder, _ = domains
    made = []
    for domain in ("animals", "people"):
        files = sorted((folder / domain).glob("*.safetensors"))
        made.append(soup([Part.of(file) for file in files], tmp_path / f"{domain}.safetensors", weighting="sqrt"))
    assert [one.size for one in made] == [1000, 425]
    # The size of a soup travels in its file.
    last = [Part.of(tmp_path / "animals.safetensors"), Part.of(folder / "nature.safetensors"),
            Part.of(tmp_path / "people.safetensors")]  # fmt: skip
    assert [part.size for part in last] == [1000, 16, 425]
    soup(last, tmp_path / "chained.safetensors", weighting="size")
    nested_soup(group_of_folder(folder, weighting="size"), tmp_path / "nested.safetensors")
    chained, nested = load_file(tmp_path / "chained.safetensors"), load_file(tmp_path / "nested.safetensors")
    for name in ("a.weight", "b.weight", "bias"):
        torch.testing.assert_close(chained[name], nested[name], rtol=1e-5, atol=1e-6)


def test_recipes_of_any_depth(domains, tmp_path):
    folder, parts = domains
    recipe = {"weighting": "size", "parts": [
        {"name": "living", "weighting": "equal", "parts": [
            {"name": "animals", "weighting": "sqrt", "parts": [
                {"file": "animals/cats.safetensors", "size": 4}, {"file": "animals/dogs.safetensors", "size": 1}]},
            {"file": "people/faces.safetensors"}]},
        {"file": "nature.safetensors", "size": 10}]}  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert main(["soup", str(tmp_path / "s.safetensors"), "--recipe", str(folder / "recipe.json")]) == 0
    # 4 + 1 + 25 samples against 10: three quarters, half of it animals, two thirds of that cats.
    shares = {"animals/cats": 0.75 / 2 * 2 / 3, "animals/dogs": 0.75 / 2 / 3, "people/faces": 0.75 / 2, "nature": 0.25}
    made = load_file(tmp_path / "s.safetensors")
    for name, tensor in expected(parts, shares).items():
        torch.testing.assert_close(made[name].double(), tensor, rtol=1e-6, atol=1e-6)


WRONG_RECIPES = {
    "no parts": ({}, "expected an object with a list of parts"),
    "empty": ({"parts": []}, "expected an object with a list of parts"),
    "unknown key": ({"parts": [{"file": "nature.safetensors", "samples": 3}]}, "part 1: 'samples' is unknown"),
    "unknown weighting": ({"weighting": "root", "parts": [{"file": "nature.safetensors"}]}, "'root' is unknown"),
    "no file": ({"parts": ["nature.safetensors"]}, "part 1: expected"),
    "size of words": ({"parts": [{"file": "nature.safetensors", "size": "many"}]}, "is no number of samples"),
    "negative": ({"weighting": "sqrt", "parts": [{"file": "nature.safetensors", "size": -1}]}, "must be positive"),
    "twice": ({"parts": [{"file": "nature.safetensors"}, {"file": "nature.safetensors"}]}, "given twice"),
    "missing": ({"parts": [{"file": "gone.safetensors"}]}, "no such file"),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_wrong_recipes_say_where(domains, tmp_path, case):
    folder, _ = domains
    recipe, message = WRONG_RECIPES[case]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=message):
        nested_soup(read_recipe(folder / "recipe.json"), tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


def test_sizes_that_nobody_knows_are_not_invented(tmp_path):
    model(tmp_path / "d" / "x" / "one.safetensors", 1)
    model(tmp_path / "d" / "x" / "two.safetensors", 2, samples=40)
    with pytest.raises(ValueError, match=r"needs the samples of each part, and one.safetensors does not tell"):
        nested_soup(group_of_folder(tmp_path / "d"), tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="needs the samples of each part, and x does not tell"):
        nested_soup(group_of_folder(tmp_path / "d", weighting="size", within="equal"), tmp_path / "s.safetensors")
    made = nested_soup(group_of_folder(tmp_path / "d", within="equal"), tmp_path / "s.safetensors")
    assert made.size is None and Part.of(tmp_path / "s.safetensors").size is None
    with pytest.raises(ValueError, match="holds no"):
        group_of_folder(tmp_path / "d" / "x" / "..", within="equal") and group_of_folder(_empty(tmp_path))
    with pytest.raises(ValueError, match="'none' holds no model"):
        flat_shares(Group(name="none", parts=()))


def _empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def test_command_takes_one_kind_of_parts(domains, tmp_path, capsys):
    folder, _ = domains
    target = str(tmp_path / "s.safetensors")
    assert main(["soup", target, "--tree", str(folder), "--weighting", "sqrt", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 1441 and told["target"] == target
    root = {"animals": math.sqrt(1000), "people": math.sqrt(425), "nature": 4.0}
    assert told[str(folder / "nature.safetensors")] == pytest.approx(4 / sum(root.values()), abs=1e-6)
    for options in ([], [str(folder / "nature.safetensors"), "--tree", str(folder)],
                    [str(folder / "nature.safetensors"), "--within", "sqrt"]):  # fmt: skip
        assert main(["soup", target, *options]) == 2
    capsys.readouterr()
    assert main(["soup", str(folder / "soup.safetensors"), "--tree", str(folder)]) == 2
    assert "would lie in domains, as one more part" in capsys.readouterr().err


def test_memory_holds_one_tensor_of_each_input(domains, tmp_path, monkeypatch):
    folder, _ = domains
    alive, most = [], 0
    read = soup_module.read_tensors

    def counting(records):
        nonlocal most
        assert len(records) == 1
        found = read(records)
        alive.extend(weakref.ref(tensor) for tensor in found.values())
        most = max(most, sum(reference() is not None for reference in alive))
        return found

    monkeypatch.setattr(soup_module, "read_tensors", counting)
    nested_soup(group_of_folder(folder), tmp_path / "soup.safetensors")
    # The last average may still hold the tensors before, so twice the inputs at worst.
    assert len(alive) == 3 * 5 and most <= 2 * 5


def test_a_cancelled_soup_leaves_nothing(domains, tmp_path):
    folder, _ = domains
    (tmp_path / "out").mkdir()

    def cancel(done, total):
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nested_soup(group_of_folder(folder), tmp_path / "out" / "s.safetensors", on_tensor=cancel)
    assert not list((tmp_path / "out").iterdir())


def test_a_soup_never_writes_over_its_parts(domains):
    folder, parts = domains
    path = folder / "nature.safetensors"
    with pytest.raises(ValueError, match="write the result to another file"):
        soup([Part.of(path), Part.of(folder / "animals" / "cats.safetensors")], path)
    assert torch.equal(load_file(path)["bias"], parts["nature"][1]["bias"])


def test_metadata_of_a_soup(tmp_path):
    one = {"kandinsky5.base": "b", "trigger": "sks", "kandinsky5.steps": "10", "format": "pt"}
    model(tmp_path / "1.safetensors", 1, 30, **one)
    model(tmp_path / "2.safetensors", 2, 10, trigger="vrt", format="pt", **{"kandinsky5.steps": "20"})
    soup([Part.of(tmp_path / f"{n}.safetensors") for n in (1, 2)], tmp_path / "s.safetensors", weighting="size")
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata() == {
            "kandinsky5.base": "b", "trigger": "sks, vrt", "format": "pt", "kandinsky5.samples": "40",
            "kandinsky5.soup": "1.safetensors 0.7500, 2.safetensors 0.2500",
        }  # fmt: skip


@pytest.mark.parametrize("weighting", ["equal", "size", "sqrt"])
def test_a_soup_of_loras_is_the_mean_of_what_they_add(tmp_path, weighting):
    kinds = [("official", 4, 4.0), ("kohya", 8, 2.0), ("diffusers", 3, 6.0), ("comfyui", 4, 1.0)]
    made, parts = [], []
    for number, (layout, rank, alpha) in enumerate(kinds):
        path = tmp_path / f"{layout}.safetensors"
        made.append(lora(path, number, layout, rank, alpha))
        parts.append(Part(path=path, size=float(1 + number * number)))
    told = soup(parts, tmp_path / "soup.safetensors", weighting=weighting)
    shares = soup_weights([part.size for part in parts], weighting)
    assert (told.kind, told.rank, told.kept) == ("lora", 19, 1.0)
    found = deltas(tmp_path / "soup.safetensors")
    for module in MODULES:
        mean = sum(share * part[module] for share, part in zip(shares, made, strict=True))
        torch.testing.assert_close(found[module].double(), mean, rtol=1e-5, atol=1e-5)
    assert lora_tools.lora_format(tmp_path / "soup.safetensors") == "official"


def test_merging_a_soup_of_loras_is_the_soup_of_merged_models(tmp_path):
    base = tmp_path / "base.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(DIT).items()}, base)
    paths = []
    for number in (1, 2, 3):
        lora(tmp_path / f"l{number}.safetensors", number, rank=2 * number, alpha=1.0)
        lora_tools.merge_lora(base, tmp_path / f"l{number}.safetensors", tmp_path / f"m{number}.safetensors")
        paths.append((tmp_path / f"l{number}.safetensors", tmp_path / f"m{number}.safetensors"))
    for kind, name in ((0, "lora"), (1, "model")):
        group = Group(name="g", weighting="sqrt", parts=(
            Group(name="a", weighting="size", parts=(Part(path=paths[0][kind], size=3), Part(path=paths[1][kind], size=1))),
            Part(path=paths[2][kind], size=12)))  # fmt: skip
        assert nested_soup(group, tmp_path / f"{name}.safetensors").kind == name
    lora_tools.merge_lora(base, tmp_path / "lora.safetensors", tmp_path / "merged.safetensors")
    merged, souped = load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = [name for name, tensor in load_file(base).items() if not torch.equal(tensor, souped[name])]
    assert sorted(changed) == sorted(f"{module}.weight" for module in MODULES)
    for name, tensor in souped.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_rank_of_a_soup_is_the_best_of_its_size(tmp_path):
    parts = [lora(tmp_path / f"{number}.safetensors", number) for number in (1, 2, 3)]
    paths = [Part(path=tmp_path / f"{number}.safetensors") for number in (1, 2, 3)]
    told = soup(paths, tmp_path / "small.safetensors", rank=5)
    found = deltas(tmp_path / "small.safetensors")
    kept = whole = 0.0
    for module in MODULES:
        left, values, right = torch.linalg.svd(sum(part[module] for part in parts) / 3)
        best = left[:, :5] @ values[:5].diag() @ right[:5]
        torch.testing.assert_close(found[module].double(), best, rtol=1e-4, atol=1e-5)
        kept, whole = kept + float(values[:5].square().sum()), whole + float(values.square().sum())
    assert told.rank == 5 and told.kept == pytest.approx(kept / whole, abs=1e-5) and told.kept < 0.9


def test_loras_that_are_no_siblings(tmp_path):
    lora(tmp_path / "a.safetensors", 1, **{"kandinsky5.base": "one"})
    lora(tmp_path / "b.safetensors", 2, **{"kandinsky5.base": "two"})
    model(tmp_path / "m.safetensors", 3)
    half = load_file(tmp_path / "a.safetensors")
    save_file({name: tensor for name, tensor in half.items() if MODULES[0] in name}, tmp_path / "c.safetensors")
    odd = {name: torch.cat([tensor, tensor], 1) if "lora_A" in name else tensor for name, tensor in half.items()}
    save_file(odd, tmp_path / "d.safetensors")
    save_file({**half, "diffusion_model.norm.diff": torch.ones(2)}, tmp_path / "e.safetensors")
    for other, message in (
        ("b", "different bases"), ("m", "a.safetensors is a LoRA and m.safetensors a whole model"),
        ("c", "only one of them has visual_transformer_blocks.2"), ("d", r"is \(192, 192\) and \(192, 384\)"),
        ("e", "1 tensors that are no part of a LoRA"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            soup([Part(path=tmp_path / "a.safetensors"), Part(path=tmp_path / f"{other}.safetensors")], tmp_path / "s")
        assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="rank is for soups of LoRAs"):
        soup([Part(path=tmp_path / "m.safetensors")], tmp_path / "s", rank=4)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (16, 16)])
def test_truncation_is_the_svd(shape):
    generator = torch.Generator().manual_seed(5)
    change = torch.randn(shape, generator=generator, dtype=torch.float64)
    change[:, 3] = 0
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    for rank in (1, 5, 16, 40):
        made = truncated(change, rank)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(made.up.double() @ made.down.double(), best, rtol=1e-5, atol=1e-5)
        assert made.kept == pytest.approx(float(values[:rank].square().sum()))
        assert made.whole == pytest.approx(float(change.square().sum()))
    nothing = truncated(torch.zeros(shape), 3)
    assert torch.isfinite(nothing.up).all() and not (nothing.up @ nothing.down).any()


@pytest.mark.parametrize("inner", [6, 30])
def test_truncated_product_is_the_same_without_the_product(inner):
    generator = torch.Generator().manual_seed(6)
    down, up = torch.randn(inner, 50, generator=generator), torch.randn(28, inner, generator=generator)
    one, other = truncated(up.double() @ down.double(), 4), truncated_product(down, up, 4)
    torch.testing.assert_close(other.up @ other.down, one.up @ one.down, rtol=1e-4, atol=1e-4)
    assert (other.kept, other.whole) == pytest.approx((one.kept, one.whole), rel=1e-5)


def plain(path, keys="transformer.{}.lora_{}.weight", rank=4, metadata=None):
    """A file as another program writes it; A and B."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(rank, 192, generator=generator), torch.randn(192, rank, generator=generator)
    named = dict(zip((keys.format(MODULES[0], end) for end in "AB"), pair, strict=True))
    path.parent.mkdir(exist_ok=True)
    save_file(named, path, metadata=metadata)
    return pair[1] @ pair[0]


def scale_of(path, whole):
    found = deltas(path)[MODULES[0]]
    scale = float((found * whole).sum() / whole.square().sum())
    torch.testing.assert_close(found, scale * whole)
    return scale


def test_alpha_is_found_wherever_its_program_put_it(tmp_path):
    told = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": False}
    whole = plain(tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    assert scale_of(tmp_path / "d.safetensors", whole) == pytest.approx(2.0)
    told |= {"transformer.use_rslora": True}
    plain(tmp_path / "r.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    assert scale_of(tmp_path / "r.safetensors", whole) == pytest.approx(4.0)  # 8 / sqrt(4)
    told |= {"transformer.use_rslora": False, "transformer.alpha_pattern": {"to_query": 16, "other": 1}}
    plain(tmp_path / "p.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    assert scale_of(tmp_path / "p.safetensors", whole) == pytest.approx(4.0)
    official = "base_model.model.{}.lora_{}.default.weight"
    plain(tmp_path / "official" / "lora.safetensors", official)
    (tmp_path / "official" / "config_lora.json").write_text('{"r": 4, "lora_alpha": 2}')
    assert scale_of(tmp_path / "official" / "lora.safetensors", whole) == pytest.approx(0.5)
    # Beside it in the same folder lies another one, whose settings these are not.
    plain(tmp_path / "official" / "mine.safetensors", official)
    assert scale_of(tmp_path / "official" / "mine.safetensors", whole) == pytest.approx(1.0)
    assert scale_of(tmp_path / "official" / "lora.safetensors", whole) == pytest.approx(0.5)


def test_converted_files_mean_the_same_without_metadata(tmp_path):
    told = {"transformer.r": 4, "transformer.lora_alpha": 8}
    whole = plain(tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    for layout in lora_tools.FORMATS:
        lora_tools.convert_lora(tmp_path / "a.safetensors", tmp_path / f"{layout}.safetensors", layout=layout)
        save_file(load_file(tmp_path / f"{layout}.safetensors"), tmp_path / "bare.safetensors")
        for name in (layout, "bare"):
            assert scale_of(tmp_path / f"{name}.safetensors", whole) == pytest.approx(2.0)


@pytest.mark.parametrize("end", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_dora_is_refused(tmp_path, end):
    plain(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({**tensors, f"transformer.{MODULES[0]}.{end}": torch.ones(192)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=r"d.safetensors is a DoRA"):
        read_lora(tmp_path / "d.safetensors", SIZES)


def test_extract_tells_what_a_lora_cannot_hold(tmp_path):
    tensors = {name: tensor.float() for name, tensor in load_file(DIT).items()}
    save_file(tensors, tmp_path / "base.safetensors")
    bias = f"{MODULES[1].replace('feed_forward.in_layer', 'visual_modulation.out_layer')}.bias"
    change = {f"{MODULES[0]}.weight": 0.5 * torch.eye(192), bias: torch.full_like(tensors[bias], 0.25)}
    save_file({**tensors, **{name: tensors[name] + value for name, value in change.items()}}, tmp_path / "t.safetensors")
    told = lora_tools.extract_lora(
        tmp_path / "base.safetensors", tmp_path / "t.safetensors", tmp_path / "l.safetensors", rank=48
    )
    energy = {name: float(value.square().sum()) for name, value in change.items()}
    assert told["kept"] == pytest.approx(0.25, abs=1e-3)
    assert told["outside"] == pytest.approx(energy[bias] / sum(energy.values()), abs=1e-3)
    with pytest.raises(ValueError, match="the same weights"):
        lora_tools.extract_lora(tmp_path / "base.safetensors", tmp_path / "base.safetensors", tmp_path / "n", rank=4)
