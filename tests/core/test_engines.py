"""Attention engines: probed on a device, chosen by name, refused with the package; masks; batched guidance; compile."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from kandinsky5_core import Request, generate, load
from kandinsky5_core.attention import engines
from kandinsky5_core.attention.dense import dense_attention
from kandinsky5_core.attention.engines import ENGINE_NAMES, ENGINES, Engines, masks_by_sdpa, probe_engines
from kandinsky5_core.cli import main
from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import DiTConfig, NablaConfig
from kandinsky5_core.dit import layers
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.dit.rope import apply_rope, rope_table, visual_angles
from kandinsky5_core.memory.apply import compile_blocks
from kandinsky5_core.request import resolve, settings
from kandinsky5_core.sampling import guidance_batch
from kandinsky5_core.sampling.guidance import guided_velocity
from kandinsky5_core.sampling.guidance_batch import activation_bytes, batches_guidance
from kandinsky5_core.sampling.step_cache import NEGATIVE, POSITIVE

TINY = DiTConfig(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=6, time_dim=16, model_dim=32, ff_dim=64,
    num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
)  # fmt: skip
CUDA = torch.device("cuda")


def random_dit(seed: int, config: DiTConfig = TINY) -> DiffusionTransformer:
    torch.manual_seed(seed)
    model = DiffusionTransformer(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    return model.requires_grad_(False)


def random_text(length: int, batch: int = 1) -> TextConditioning:
    return TextConditioning(
        embeds=torch.randn(batch, length, 8), pooled=torch.randn(batch, 6),
        mask=torch.ones(batch, length, dtype=torch.bool),
    )


def with_kernels(*names: str, capability: int = 9) -> Engines:
    """As probed on a machine that has these."""

    def doubled(q, k, v):
        return 2 * dense_attention(q, k, v)

    return Engines(
        device=CUDA, kernels=MappingProxyType(dict.fromkeys(names, doubled)), capability=capability,
        problems=MappingProxyType({name: "not installed" for name in ENGINES if name not in names}),
    )


# --- probing and choosing


def test_cpu_has_sdpa_and_says_why_not_the_others(monkeypatch):
    monkeypatch.setattr(engines, "compiled_dense_flex", lambda *args: pytest.fail("compiled unasked"))
    probed = probe_engines("cpu")
    assert not probed.kernels
    assert set(probed.problems) == set(ENGINES) - {"flex"} == set(ENGINE_NAMES) - {"auto", "sdpa", "flex"}
    chosen = probed.choose("auto", head_dim=64, dtype=torch.bfloat16)
    assert chosen.name == "sdpa" and chosen.attend is dense_attention
    assert chosen.told == (
        "sdpa (flash3: needs CUDA, not cpu; cudnn: needs CUDA, not cpu; flash: needs CUDA, not cpu)"
    )
    assert probed.choose("sdpa", head_dim=64, dtype=torch.float32).told == "sdpa"


@pytest.mark.parametrize("name", ["flash", "flash3", "sage", "cudnn", "flex"])
def test_a_missing_engine_is_refused_with_its_package(name):
    with pytest.raises(ValueError, match=rf"'{name}' cannot be used: not installed \(package: {ENGINES[name].package[:9]}"):
        with_kernels().choose(name, head_dim=64, dtype=torch.bfloat16)


def test_unknown_engines_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'warp' is unknown; use one of auto, sdpa, flash3, cudnn, flash, sage, flex"):
        with_kernels().choose("warp", head_dim=64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("have", "capability", "taken", "told"),
    [
        (("flash3", "cudnn", "flash", "sage", "flex"), 9, "flash3", "flash3"),
        (("cudnn", "flash", "sage", "flex"), 9, "cudnn", "cudnn (flash3: not installed)"),
        (("cudnn", "flash"), 12, "cudnn", "cudnn (flash3: not installed)"),
        (("cudnn", "flash"), 8, "flash",
         "flash (flash3: not installed; cudnn: taken by itself from compute capability 9 on)"),
        (("flash", "sage"), 9, "flash", "flash (flash3: not installed; cudnn: not installed)"),
        (("sage", "flex"), 9, "sdpa", "sdpa (flash3: not installed; cudnn: not installed; flash: not installed)"),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest_exact_engine(have, capability, taken, told):
    chosen = with_kernels(*have, capability=capability).choose("auto", head_dim=64, dtype=torch.bfloat16)
    assert (chosen.name, chosen.told) == (taken, told)


def test_an_engine_that_auto_passes_over_can_be_named():
    assert with_kernels("cudnn", capability=8).choose("cudnn", head_dim=64, dtype=torch.float16).told == "cudnn"


def test_engines_are_refused_where_they_have_no_kernel():
    here = with_kernels("flash", "sage", "cudnn", "flex")
    with pytest.raises(ValueError, match="needs fp16 or bf16, not float32"):
        here.choose("flash", head_dim=64, dtype=torch.float32)
    with pytest.raises(ValueError, match="no kernel for heads of 32"):
        here.choose("sage", head_dim=32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no kernel for heads of 36"):
        here.choose("flash", head_dim=36, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no kernel for heads of 192"):
        here.choose("cudnn", head_dim=192, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs fp16, bf16 or fp32, not float64"):
        here.choose("flex", head_dim=64, dtype=torch.float64)
    assert here.choose("auto", head_dim=64, dtype=torch.float32).name == "sdpa"


def test_masked_keys_are_left_to_sdpa():
    attend = with_kernels("flash").choose("flash", head_dim=8, dtype=torch.bfloat16).attend
    q, k, v = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, True, False, False]])
    assert torch.equal(attend(q, k, v, mask), dense_attention(q, k, v, mask))
    assert torch.equal(attend(q, k, v), 2 * dense_attention(q, k, v))


def test_a_broken_package_is_probed_and_named(monkeypatch):
    """An installed package that fails or computes something else is not taken."""
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    # The few tokens of the probe stay on the CPU: the kernels here are PyTorch's.
    real = engines.probe_error
    monkeypatch.setattr(engines, "probe_error", lambda kernel, device, **sizes: real(kernel, "cpu", **sizes))

    def flash_attn_func(q, k, v):
        return dense_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2), "log-sum-exp"

    modules = {
        "flash_attn": SimpleNamespace(flash_attn_func=flash_attn_func),
        "sageattention": SimpleNamespace(sageattn=lambda q, k, v, tensor_layout, is_causal: torch.zeros_like(q)),
        "torch.nn.attention": torch.nn.attention,
    }

    def import_module(name):
        if name not in modules:
            raise ImportError("libcudart.so.12: cannot open shared object file\nmore lines")
        return modules[name]

    monkeypatch.setattr(engines.importlib, "import_module", import_module)
    probed = probe_engines("cuda")
    assert set(probed.kernels) == {"flash"}
    assert probed.problems["flash3"] == (
        "installed, but fails: ImportError: libcudart.so.12: cannot open shared object file"
    )
    assert "installed, but wrong by" in probed.problems["sage"]
    # On these tensors, which lie on the CPU, cuDNN is no choice of PyTorch's: it is refused, not replaced.
    assert probed.problems["cudnn"].startswith("installed, but fails: RuntimeError: No ")
    assert "flex" not in probed.problems and probed.capability == 9


def test_a_card_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert probe_engines("cuda").problems == dict.fromkeys(ENGINES, "not made for compute capability 6")


def test_cudnn_is_the_only_backend_that_its_engine_allows(monkeypatch):
    allowed = []

    @contextmanager
    def sdpa_kernel(backends):
        allowed.append(backends)
        yield

    module = SimpleNamespace(sdpa_kernel=sdpa_kernel, SDPBackend=torch.nn.attention.SDPBackend)
    attend = ENGINES["cudnn"].build(module)
    assert engines.probe_error(attend, "cpu") == 0
    assert allowed == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]


def test_flex_is_compiled_when_it_is_chosen_and_right_for_every_length():
    chosen = probe_engines("cpu").choose("flex", head_dim=32, dtype=torch.float32)
    assert (chosen.name, chosen.told) == ("flex", "flex")
    with torch.no_grad():
        for tokens in (13, 700):
            q, k, v = torch.randn(3, 1, tokens, 2, 32, generator=torch.Generator().manual_seed(tokens)).transpose(2, 3)
            torch.testing.assert_close(chosen.attend(q, k, v), dense_attention(q, k, v), atol=1e-5, rtol=1e-5)
        mask = torch.arange(tokens)[None] < 9
        assert torch.equal(chosen.attend(q, k, v, mask), dense_attention(q, k, v, mask))


def test_flex_that_does_not_compile_is_refused_with_the_reason(monkeypatch):
    def broken(q, k, v):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(engines, "compiled_dense_flex", broken)
    with pytest.raises(ValueError, match="'flex' cannot be used: installed, but fails: RuntimeError: no working C"):
        probe_engines("cpu").choose("flex", head_dim=64, dtype=torch.float32)


def test_probing_sees_a_wrong_kernel():
    assert engines.probe_error(dense_attention, "cpu") == 0
    assert engines.probe_error(lambda q, k, v: dense_attention(q, k.flip(2), v), "cpu") > engines.PROBE_ERROR


# --- from the request to the DiT


def test_the_plan_hands_the_engine_to_the_visual_tokens_alone():
    model, calls = random_dit(0), []

    def spy(q, k, v, key_mask=None):
        calls.append((q.shape[2], k.shape[2]))
        return dense_attention(q, k, v, key_mask)

    latents, text, timestep = torch.randn(1, 9, 3, 4, 4), random_text(5), torch.tensor([500.0])
    plain = model(latents, timestep, text, plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0)))
    plan = plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0), dense=masks_by_sdpa(spy))
    assert torch.equal(model(latents, timestep, text, plan), plain)
    assert calls == [(12, 12)] * 3


def test_generate_names_the_engine_and_refuses_a_missing_one():
    models = load("nano-video")
    request = Request(prompt="a red circle moves left", num_steps=1, num_frames=5)
    found = generate(models, request)
    assert found.settings["attention_engine"].startswith("sdpa (flash3: needs CUDA")
    assert found.settings["guidance_batched"] is False
    named = generate(models, replace(request, attention_engine="sdpa", batch_guidance="on"))
    assert named.settings["attention_engine"] == "sdpa" and named.settings["guidance_batched"] is True
    assert (named.frames - found.frames).abs().max() < 0.02
    sparse = generate(models, replace(request, attention="nabla"))
    assert sparse.settings["attention_engine"].startswith("nabla: ")
    with pytest.raises(ValueError, match="'flash' cannot be used: needs CUDA"):
        generate(models, replace(request, attention_engine="flash"))
    for wrong in ({"attention_engine": "warp"}, {"batch_guidance": "maybe"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} '{next(iter(wrong.values()))}' is not possible"):
            resolve(replace(request, **wrong), models.variant)
    assert json.loads(json.dumps(settings(resolve(request, models.variant), models.variant)))


def test_command_line_refuses_a_missing_engine_before_loading(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kandinsky5_core.commands.load_files", lambda *args, **kwargs: pytest.fail("loaded"))
    code = main(["generate", "--prompt", "a red circle", "--engine", "sage", "--out", str(tmp_path / "a.mp4")])
    assert code == 2
    assert "attention engine 'sage' cannot be used: needs CUDA, not cpu" in capsys.readouterr().err


# --- the arithmetic of the fast paths is that of the plain ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_norm_has_the_bits_of_pytorch(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.RMSNorm(64, eps=layers.RMS_EPS).to(dtype)
    norm.weight.data = torch.randn(64, generator=generator).to(dtype)
    x = (3 * torch.randn(2, 11, 3, 64, generator=generator)).to(dtype)
    expected = torch.nn.functional.rms_norm(x.float(), (64,), norm.weight.float(), norm.eps).to(dtype)
    assert torch.equal(layers.head_norm(norm, x), expected)


def test_rotation_has_the_bits_of_the_written_out_formula(monkeypatch):
    rope = rope_table(visual_angles((3, 4, 5), (16, 24, 24), (1.0, 2.0, 2.0)))
    x = torch.randn(2, 60, 3, 64, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, rope)
    monkeypatch.setattr("kandinsky5_core.dit.rope.COMPLEX_DEVICES", ())
    assert torch.equal(turned, apply_rope(x, rope))
    even, odd = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (part.double()[:, None] for part in (rope.cos, rope.sin))
    exact = torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)
    assert (turned - exact).abs().max() < 2**-7


def test_modulation_in_pieces_has_the_bits_of_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(32, 100).bfloat16()
    x = torch.randn(2, 32, generator=generator)
    expected = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    monkeypatch.setattr(layers, "CAST_NUMBERS", 32 * 7)
    torch.testing.assert_close(layers.in_fp32(layer, x), expected, atol=1e-6, rtol=1e-6)
    without = torch.nn.Linear(32, 100, bias=False).bfloat16()
    expected = torch.nn.functional.linear(x, without.weight.float())
    torch.testing.assert_close(layers.in_fp32(without, x), expected, atol=1e-6, rtol=1e-6)


def test_what_the_caller_holds_stays_as_it_is():
    """In-place arithmetic touches only what the block has made itself."""
    model, plan = random_dit(3), plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0))
    tokens, text, time = torch.randn(1, 12, 32), torch.randn(1, 5, 32), torch.randn(1, 16)
    held = [part.clone() for part in (tokens, text, time)]
    model.visual_blocks(tokens, text, time, plan, None)
    for part, before in zip((tokens, text, time), held, strict=True):
        assert torch.equal(part, before)


# --- both passes of guidance at once


@pytest.mark.parametrize("lengths", [(5, 5), (9, 3), (2, 7)])
@pytest.mark.parametrize("batch", [1, 2])
def test_batched_guidance_equals_two_passes(lengths, batch):
    model, plan = random_dit(1), plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0))
    positive, negative = (random_text(length, batch) for length in lengths)
    latents, sigma = torch.randn(batch, 4, 3, 4, 4), torch.tensor(0.7)
    apart = guided_velocity(model, positive, negative, 4.0, plan)(latents, sigma)
    at_once = guided_velocity(model, positive, negative, 4.0, plan, batched=True)(latents, sigma)
    assert (at_once - apart).norm() / apart.norm() < 1e-5
    assert (apart - guided_velocity(model, positive, None, 1.0, plan)(latents, sigma)).norm() > 0.01 * apart.norm()


def test_batched_guidance_asks_once_a_step_and_tells_the_cache_its_sides():
    model, plan, asked = random_dit(2), plan_visual(TINY, (3, 2, 2), (1.0, 1.0, 1.0)), []
    rows = []
    model.visual_transformer_blocks[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))

    class Cache:
        def around(self, sigma, sides=(POSITIVE,), keys=None):
            asked.append(tuple(sides))
            return lambda blocks, *args: blocks(*args)

    latents, sigma = torch.randn(1, 4, 3, 4, 4), torch.tensor(0.5)
    for guidance_scale in (3.0, 1.0):
        guided_velocity(
            model, random_text(4), random_text(2), guidance_scale, plan, cache=Cache(), batched=True
        )(latents, sigma)  # fmt: skip
    assert asked == [(POSITIVE, NEGATIVE), (POSITIVE,)]
    assert rows == [2, 1]


def test_guidance_is_batched_by_choice_size_and_memory(monkeypatch):
    def choose(choice, grid=(5, 16, 16), device="cuda"):
        return batches_guidance(
            choice, TINY, grid, batch=1, dtype=torch.bfloat16, device=torch.device(device)
        )

    need = activation_bytes(TINY, 5 * 16 * 16, torch.bfloat16, 2)
    monkeypatch.setattr(guidance_batch, "free_bytes", lambda device: 2 * need)
    assert choose("auto") and choose("on", device="cpu") and not choose("off")
    assert not choose("auto", grid=(31, 32, 48))
    monkeypatch.setattr(guidance_batch, "free_bytes", lambda device: need)
    assert not choose("auto")
    monkeypatch.undo()
    assert not choose("auto", device="cpu")
    with pytest.raises(ValueError, match="batch_guidance 'perhaps' is unknown; use one of auto, on, off"):
        choose("perhaps")


# --- compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def evaluate(model, grid, text_tokens, nabla=None):
    torch.manual_seed(sum(grid))
    latents = torch.randn(1, 9, grid[0], 2 * grid[1], 2 * grid[2])
    plan = plan_visual(TINY, grid, (1.0, 2.0, 2.0), nabla)
    if nabla is not None:
        plan.nabla.path = "gather"
    return model(latents, torch.tensor([500.0]), random_text(text_tokens), plan)


SIZES = [((3, 2, 2), 5), ((1, 8, 10), 3), ((5, 3, 8), 11), ((2, 16, 16), 7)]


def test_compiled_once_for_every_block_and_size(dynamo):
    model, compiled = random_dit(4), random_dit(4)
    keys = list(compiled.state_dict())
    compile_blocks(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == keys
    graphs = []
    for grid, text_tokens in SIZES:
        torch.testing.assert_close(
            evaluate(compiled, grid, text_tokens), evaluate(model, grid, text_tokens), atol=1e-4, rtol=1e-4
        )
        graphs.append(dynamo["stats"]["unique_graphs"])
    # Not one for each of three blocks and four sizes.
    assert graphs[0] <= 2 and graphs == [graphs[0]] * len(SIZES)


def test_static_compilation_does_count_more(dynamo):
    """The counter sees recompilation where there is some."""
    compiled = random_dit(4)
    compile_blocks(compiled, backend="aot_eager", dynamic=False)
    evaluate(compiled, *SIZES[0])
    first = dynamo["stats"]["unique_graphs"]
    evaluate(compiled, *SIZES[1])
    assert dynamo["stats"]["unique_graphs"] > first


def test_compiled_blocks_call_an_engine_outside_the_graph(dynamo):
    model, compiled = random_dit(8), random_dit(8)
    compile_blocks(compiled, backend="aot_eager")
    calls, graphs = [], []

    def kernel(q, k, v):
        calls.append(torch.compiler.is_compiling())
        return dense_attention(q, k, v)

    engine = masks_by_sdpa(kernel)
    text, timestep = random_text(4), torch.tensor([500.0])
    for grid in ((3, 2, 2), (1, 8, 10), (5, 3, 8), (2, 4, 4)):
        latents = torch.randn(1, 9, grid[0], 2 * grid[1], 2 * grid[2])
        plan = plan_visual(TINY, grid, (1.0, 1.0, 1.0), dense=engine)
        expected = model(latents, timestep, text, plan_visual(TINY, grid, (1.0, 1.0, 1.0)))
        torch.testing.assert_close(compiled(latents, timestep, text, plan), expected, atol=1e-4, rtol=1e-4)
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert calls == [False] * 12
    assert graphs[1:] == [graphs[1]] * 3 and graphs[1] <= 6


def test_compiled_nabla_stays_outside_the_graph(dynamo):
    nabla = NablaConfig(mass=0.6, window=(1, 1, 1))
    model, compiled = random_dit(5), random_dit(5)
    compile_blocks(compiled, backend="aot_eager")
    graphs = []
    for grid in ((2, 8, 16), (3, 16, 16), (2, 9, 17), (5, 8, 24)):
        torch.testing.assert_close(
            evaluate(compiled, grid, 4, nabla), evaluate(model, grid, 4, nabla), atol=1e-4, rtol=1e-4
        )
        graphs.append(dynamo["stats"]["unique_graphs"])
    # Before and after the attention, once for the first block and once for the others; a second size adds one.
    assert graphs[0] <= 4 and graphs[1:] == [graphs[1]] * 3 and graphs[1] <= 5


@pytest.mark.parametrize("how", ["merged", "hooked"])
def test_compiled_blocks_take_lora(dynamo, how):
    model, compiled = random_dit(6), random_dit(6)
    torch.manual_seed(7)
    down, up = 0.3 * torch.randn(2, 32), 0.3 * torch.randn(32, 2)
    plain = evaluate(model, (3, 2, 2), 5)

    def add(dit):
        for block in dit.visual_transformer_blocks:
            layer = block.self_attention.out_layer
            if how == "merged":
                layer.weight.data += up @ down
            else:
                layer.register_forward_hook(lambda module, args, out: out + args[0] @ down.T @ up.T)

    add(model)
    add(compiled)
    compile_blocks(compiled, backend="aot_eager")
    expected = evaluate(model, (3, 2, 2), 5)
    assert (expected - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(evaluate(compiled, (3, 2, 2), 5), expected, atol=1e-4, rtol=1e-4)
    # Weights that are merged after the first run count too: they are inputs of the graph, not part of it.
    graphs = dynamo["stats"]["unique_graphs"]
    for dit in (model, compiled):
        dit.visual_transformer_blocks[1].feed_forward.in_layer.weight.data *= 1.5
    torch.testing.assert_close(
        evaluate(compiled, (3, 2, 2), 5), evaluate(model, (3, 2, 2), 5), atol=1e-4, rtol=1e-4
    )
    assert dynamo["stats"]["unique_graphs"] == graphs
