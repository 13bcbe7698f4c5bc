"""Folders and single files: every layout gives the same weights, and what does not fit is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky5_core.text import tokenizers
from kandinsky5_core.text.clip import load_clip
from kandinsky5_core.text.encoder import load_text_encoder
from kandinsky5_core.text.qwen import load_qwen
from kandinsky5_core.text.tokenizers import load_tokenizer

PROMPTS = ["a big red circle", "x"]


def old_names(state):
    """The layout of the released weights and of ComfyUI's file."""
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in state.items()
    }


def qwen_state(tiny):
    return load_file(tiny.qwen / "model.safetensors")


def assert_same_qwen(model, tiny, *, head=True):
    expected = {name: tensor for name, tensor in qwen_state(tiny).items() if head or not name.startswith("lm_head")}
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not model.training


LAYOUTS = {
    "new": lambda state: state,
    "old": old_names,
    "prefixed": lambda state: {f"text_encoders.qwen25_7b.transformer.{k}": v for k, v in old_names(state).items()},
    "mixed": lambda state: {name.replace("language_model.", ""): tensor for name, tensor in state.items()},
    "bare": lambda state: {
        name.replace("model.language_model.", "").replace("model.", ""): tensor for name, tensor in state.items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_file_gives_the_model_of_the_folder(tiny, encoder, tmp_path, layout):
    file = tmp_path / "qwen_2.5_vl_7b.safetensors"
    save_file(LAYOUTS[layout](qwen_state(tiny)), file)
    model = load_qwen(file, lm_head=True)
    assert_same_qwen(model, tiny)
    known, deduced = tiny.qwen_model.config, model.config
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "rms_norm_eps"):
        assert getattr(deduced.text_config, name) == getattr(known.text_config, name), name
    for name in ("depth", "num_heads", "fullatt_block_indexes", "window_size", "patch_size", "spatial_merge_size"):
        assert getattr(deduced.vision_config, name) == getattr(known.vision_config, name), name
    alone = load_text_encoder(file, tiny.clip, qwen_tokenizer=tiny.qwen, local_files_only=True)
    arguments = {"task": "i2i", "max_tokens": 64, "images": [torch.rand(112, 168, 3)] * 2}
    assert torch.equal(alone.encode(PROMPTS, **arguments).embeds, encoder.encode(PROMPTS, **arguments).embeds)


def test_the_head_is_left_out_unless_wanted(tiny):
    model = load_qwen(tiny.qwen)
    assert model.lm_head is None
    assert_same_qwen(model, tiny, head=False)


def test_sharded_folder(tiny, tmp_path):
    state = old_names(qwen_state(tiny))
    names = sorted(state)
    weight_map = {name: f"model-0000{1 + (index % 2)}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(tiny.qwen / "config.json", tmp_path)
    assert_same_qwen(load_qwen(tmp_path, lm_head=True), tiny)


def test_tied_head_is_the_embeddings(tiny, tmp_path):
    folder = copied(tiny.qwen, tmp_path / "tied")
    state = {name: tensor for name, tensor in qwen_state(tiny).items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no lm_head.weight"):
        load_qwen(folder, lm_head=True)
    change_config(folder, tie_word_embeddings=True)
    model = load_qwen(folder, lm_head=True)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert load_qwen(folder).lm_head is None
    ids = torch.tensor([[5, 6, 7]])
    hidden = model.model(input_ids=ids).last_hidden_state
    expected = hidden @ state["model.language_model.embed_tokens.weight"].T
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("in_folder", [True, False])
def test_without_a_vision_tower_text_works_and_images_are_refused(tiny, encoder, tmp_path, in_folder):
    folder = copied(tiny.qwen, tmp_path / "text_only")
    save_file({k: v for k, v in qwen_state(tiny).items() if "visual" not in k}, folder / "model.safetensors")
    if not in_folder:
        (folder / "config.json").unlink()
    alone = load_text_encoder(folder, tiny.clip, local_files_only=True)
    made = alone.encode(PROMPTS, task="t2v", max_tokens=32)
    assert torch.equal(made.embeds, encoder.encode(PROMPTS, task="t2v", max_tokens=32).embeds)
    with pytest.raises(ValueError, match="no vision tower"):
        alone.encode(["a"], task="i2i", max_tokens=32, images=[torch.zeros(56, 56, 3)])


def as_fp8(state, scale_end, per_row=False):
    """The file as ComfyUI scales it, and the weights it stands for."""
    made, meaning = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or "visual" in name or "embed_tokens" in name or "lm_head" in name:
            made[name] = meaning[name] = tensor.to(torch.bfloat16)
            continue
        scale = tensor.abs().amax(dim=1, keepdim=True) if per_row else tensor.abs().max()
        scale = scale / 448
        made[name] = (tensor / scale).to(torch.float8_e4m3fn)
        made[name.removesuffix(".weight") + scale_end] = scale
        made[name.removesuffix(".weight") + ".scale_input"] = torch.ones(())
        meaning[name] = made[name].float() * scale
    return made, meaning


@pytest.mark.parametrize("scale_end", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_scaled_file_is_dequantised(tiny, tmp_path, scale_end, dtype, per_row):
    made, meaning = as_fp8(qwen_state(tiny), scale_end, per_row)
    save_file(old_names(made), tmp_path / "qwen_2.5_vl_7b_fp8_scaled.safetensors")
    state = load_qwen(tmp_path / "qwen_2.5_vl_7b_fp8_scaled.safetensors", lm_head=True, dtype=dtype).state_dict()
    assert state.keys() == meaning.keys()
    for name, tensor in meaning.items():
        assert torch.equal(state[name], tensor.to(dtype or torch.bfloat16)), name
    original = qwen_state(tiny)["model.language_model.layers.0.mlp.up_proj.weight"]
    error = (state["model.language_model.layers.0.mlp.up_proj.weight"].float() - original).norm() / original.norm()
    assert error < 0.05


@pytest.mark.parametrize("quantised", [False, True])
def test_fp8_layers_may_be_kept_as_they_are_stored(tiny, tmp_path, quantised):
    made, meaning = as_fp8(qwen_state(tiny), ".scale_weight")
    save_file(made, tmp_path / "qwen.safetensors")
    kept = {}

    def keep(layer, weight, scale):
        assert weight.dtype == torch.float8_e4m3fn and weight.shape == (layer.out_features, layer.in_features)
        kept[len(kept)] = weight.float() * scale
        made = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.weight, made.bias = torch.nn.Parameter(kept[len(kept) - 1], requires_grad=False), layer.bias
        return made

    model = load_qwen(
        tmp_path / "qwen.safetensors", dtype=torch.float32, keep_stored=keep, quantise=(lambda layer: layer) if quantised else None
    )
    fp8 = [name for name, tensor in made.items() if tensor.dtype == torch.float8_e4m3fn and tensor.ndim == 2]
    # Where both are asked for, the layers of the language model are quantised anew, and here those are all.
    assert len(kept) == (0 if quantised else len(fp8)) and len(fp8) > 4
    assert all(torch.equal(model.state_dict()[name], meaning[name]) for name in fp8)
    assert not any(tensor.is_meta for tensor in model.parameters())


def comfy_mark(form):
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


def test_newer_quantisation_marks(tiny, tmp_path):
    made, meaning = as_fp8(qwen_state(tiny), ".weight_scale")
    key = "model.language_model.layers.0.mlp.up_proj"
    save_file({**made, f"{key}.comfy_quant": comfy_mark("float8_e4m3fn")}, tmp_path / "good.safetensors")
    state = load_qwen(tmp_path / "good.safetensors", dtype=torch.float32).state_dict()
    assert torch.equal(state[f"{key}.weight"], meaning[f"{key}.weight"])
    save_file({**made, f"{key}.comfy_quant": comfy_mark("nvfp4")}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="says the weights are nvfp4"):
        load_qwen(tmp_path / "other.safetensors")


def test_unreadable_quantisations_are_refused(tiny, tmp_path):
    name = "model.language_model.layers.0.mlp.up_proj"
    state = qwen_state(tiny)
    save_file({**state, f"{name}.weight": state[f"{name}.weight"].to(torch.int8)}, tmp_path / "int8.safetensors")
    with pytest.raises(ValueError, match="is I8"):
        load_qwen(tmp_path / "int8.safetensors")
    made, _ = as_fp8(state, ".weight_scale")
    save_file({**made, f"{name}.weight_scale": torch.ones(2, 3)}, tmp_path / "blocks.safetensors")
    with pytest.raises(ValueError, match=r"scale of shape \(2, 3\)"):
        load_qwen(tmp_path / "blocks.safetensors")
    save_file({**state, f"{name}.weight_scale": torch.ones(())}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="not an fp8 tensor"):
        load_qwen(tmp_path / "plain.safetensors")


def test_dtype_is_cast_on_request(tiny):
    model = load_qwen(tiny.qwen, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


CLIP_LAYOUTS = {
    "plain": lambda state: state,
    "text_model": lambda state: {f"text_model.{name}": tensor for name, tensor in state.items()},
    "prefixed": lambda state: {f"cond_stage_model.transformer.text_model.{k}": v for k, v in state.items()},
    "whole": lambda state: {
        **{f"text_model.{name}": tensor for name, tensor in state.items()},
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.class_embedding": torch.zeros(8),
        "text_projection.weight": torch.zeros(64, 64),
        "logit_scale": torch.ones(()),
    },
    "half": lambda state: {name: tensor.half() for name, tensor in state.items()},
}


@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
def test_clip_single_file(tiny, encoder, tmp_path, layout):
    state = {name.removeprefix("text_model."): t for name, t in load_file(tiny.clip / "model.safetensors").items()}
    save_file(CLIP_LAYOUTS[layout](state), tmp_path / "clip_l.safetensors")
    clip = load_clip(tmp_path / "clip_l.safetensors", eos_token_id=encoder.clip_tokenizer.eos_token_id)
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}
    ids = encoder.clip_tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    made, expected = clip(input_ids=ids).pooler_output, tiny.clip_model(input_ids=ids).pooler_output
    torch.testing.assert_close(made, expected, rtol=0, atol=3e-2 if layout == "half" else 1e-6)


def test_old_clip_configs_say_another_end(tiny, tmp_path, encoder):
    folder = copied(tiny.clip, tmp_path / "clip")
    change_config(folder, eos_token_id=2)
    made = load_text_encoder(tiny.qwen, folder, local_files_only=True)
    assert torch.equal(made.pooled(PROMPTS), encoder.pooled(PROMPTS))


def test_foreign_files_are_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"looks like a CLIP text encoder; expected a Qwen2.5-VL"):
        save_file(
            {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "c.safetensors"
        )
        load_qwen(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"looks like a Qwen2.5-VL text encoder; expected a CLIP"):
        load_clip(tiny.qwen, eos_token_id=1)
    folder = copied(tiny.qwen, tmp_path / "other")
    change_config(folder, model_type="qwen3")
    with pytest.raises(ValueError, match="model_type 'qwen3'; expected 'qwen2_5_vl'"):
        load_qwen(folder)
    folder = copied(tiny.clip, tmp_path / "other_clip")
    change_config(folder, model_type="siglip")
    with pytest.raises(ValueError, match="model_type 'siglip'; expected 'clip'"):
        load_clip(folder, eos_token_id=1)
    with pytest.raises(ValueError, match="no such file"):
        load_qwen(tmp_path / "none.safetensors")


def test_incomplete_files_are_refused(tiny, tmp_path):
    state = qwen_state(tiny)
    del state["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(ValueError, match="1 tensors are missing"):
        load_qwen(tmp_path / "hole.safetensors")
    del state["model.language_model.layers.0.self_attn.q_proj.weight"]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight' is missing"):
        load_qwen(tmp_path / "hole.safetensors")


def comfyui_copy(tiny, root):
    """An installed ComfyUI as far as tokenizers go: vocab.json and merges.txt."""
    for kind, source in ((tokenizers.QWEN, tiny.qwen), (tokenizers.CLIP, tiny.clip)):
        folder = root / kind.comfyui_folder
        folder.mkdir(parents=True)
        parts = json.loads((source / "tokenizer.json").read_text())["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["merges"]]
        if kind is tokenizers.CLIP:
            parts["vocab"], merges = clip_words()
        (folder / "vocab.json").write_text(json.dumps(parts["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        added = [token for token in parts["vocab"] if token.startswith("<|")]
        decoder = {str(parts["vocab"][token]): {"content": token, "special": True} for token in added}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return root


def clip_words():
    """Bytes, bytes that end a word, one merge, and the two marks, as in CLIP's vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "re", "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}, ["r e"]


def test_tokenizers_from_comfyui(tiny, tmp_path):
    root = comfyui_copy(tiny, tmp_path)
    qwen = load_tokenizer(tokenizers.QWEN, comfyui=root, local_files_only=True)
    reference = load_tokenizer(tokenizers.QWEN, folder=tiny.qwen)
    text = "<|im_start|>user\na big red circle<|im_end|>"
    assert qwen.decode(qwen(text)["input_ids"]) == text
    for token in tokenizers.QWEN_SPECIAL:
        assert qwen(token)["input_ids"] == reference(token)["input_ids"]
    clip = load_tokenizer(tokenizers.CLIP, comfyui=root, local_files_only=True)
    ids = clip("Red", padding="max_length", max_length=6)["input_ids"]
    expected = ["<|startoftext|>", "re", "d</w>", *["<|endoftext|>"] * 3]
    assert clip.convert_ids_to_tokens(ids) == expected


def test_a_named_folder_comes_first_and_the_weights_folder_second(tiny, tmp_path):
    root = comfyui_copy(tiny, tmp_path)
    other = tmp_path / "named"
    other.mkdir()
    words = json.loads((tiny.qwen / "tokenizer.json").read_text())
    words["added_tokens"].append(
        {**words["added_tokens"][0], "id": len(words["model"]["vocab"]), "content": "<|mine|>"}
    )
    (other / "tokenizer.json").write_text(json.dumps(words))
    named = load_tokenizer(tokenizers.QWEN, folder=other, beside=tiny.qwen, comfyui=root)
    assert "<|mine|>" in named.get_vocab()
    beside = load_tokenizer(tokenizers.QWEN, beside=tiny.qwen / "model.safetensors", comfyui=root)
    assert beside.get_vocab() == load_tokenizer(tokenizers.QWEN, folder=tiny.qwen).get_vocab()
    with pytest.raises(ValueError, match="name the model's own tokenizer with qwen_tokenizer"):
        load_text_encoder(tiny.qwen, tiny.clip, qwen_tokenizer=other)


def test_pipeline_folders_keep_tokenizers_next_door(tiny, tmp_path):
    for part, source, files in (
        ("text_encoder_2", tiny.clip, ["model.safetensors", "config.json"]),
        ("tokenizer_2", tiny.clip, ["tokenizer.json"]),
    ):
        (tmp_path / part).mkdir()
        for file in files:
            shutil.copy(source / file, tmp_path / part)
    made = load_tokenizer(tokenizers.CLIP, beside=tmp_path / "text_encoder_2", local_files_only=True)
    assert made.eos_token == "<|endoftext|>"


def test_missing_tokenizers_say_what_to_give(tiny, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    (tmp_path / "model").mkdir()
    for local in (True, False):
        with pytest.raises(ValueError, match="with qwen_tokenizer, or an installed ComfyUI with comfyui") as caught:
            load_tokenizer(tokenizers.QWEN, beside=tmp_path / "model", local_files_only=local)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"clip_tokenizer: .* has no tokenizer.json"):
        load_tokenizer(tokenizers.CLIP, folder=tmp_path)
    with pytest.raises(ValueError, match=r"comfyui: .* is not a folder"):
        load_tokenizer(tokenizers.CLIP, comfyui=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="do not open"):
        load_tokenizer(tokenizers.CLIP, folder=tmp_path)


def test_wrong_tokenizers_are_refused(tiny):
    with pytest.raises(ValueError, match=r"has no <\|im_start\|>"):
        load_text_encoder(tiny.qwen, tiny.clip, qwen_tokenizer=tiny.clip)
    words = load_tokenizer(tokenizers.QWEN, folder=tiny.qwen)
    with pytest.raises(ValueError, match=r"Qwen2.5's into 129"):
        tokenizers.check_qwen_tokenizer(words, 152_064)
    with pytest.raises(ValueError, match="name the model's own tokenizer with clip_tokenizer"):
        load_text_encoder(tiny.qwen, tiny.clip, clip_tokenizer=tiny.qwen)


def test_importing_the_text_package_imports_no_transformers():
    code = "import sys, kandinsky5_core.text.enhancer; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3]).returncode == 0


def copied(source, target):
    shutil.copytree(source, target)
    return target


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
