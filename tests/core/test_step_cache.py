"""MagCache: the rule against a literal second writing of it, states that keep apart, ratios, calibration."""

import gc
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kandinsky5_core import Models, Request, generate, load
from kandinsky5_core.cli import main
from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import VARIANTS, DiTConfig
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.dit.plan import plan_visual
from kandinsky5_core.nano.drawing import Trajectory, draw
from kandinsky5_core.nano.language import parse
from kandinsky5_core.nano.score import score_nano
from kandinsky5_core.sampling.cache_calibration import Calibration
from kandinsky5_core.sampling.guidance import guided_velocity
from kandinsky5_core.sampling.released_ratios import released_names, released_ratios
from kandinsky5_core.sampling.samplers import SAMPLERS
from kandinsky5_core.sampling.schedule import flow_schedule
from kandinsky5_core.sampling.step_cache import (
    CacheRatios,
    MagCache,
    MagSettings,
    SkipRule,
    predicted_counts,
)
from kandinsky5_core.weights.cache_ratios import find_ratios, ratios_path, read_ratios

PROMPT = "a big red circle moves left on a black background"
EMBEDDED = Path(__file__).parents[2] / "kandinsky5_core" / "nano"


@pytest.fixture(scope="module")
def nano() -> Models:
    return load("nano-video")


CONFIG = DiTConfig(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=6, time_dim=16, model_dim=32, ff_dim=64,
    num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
)  # fmt: skip


def tiny() -> DiffusionTransformer:
    torch.manual_seed(0)
    dit = DiffusionTransformer(CONFIG).eval().requires_grad_(False)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


def conditioning(seed: int, batch: int = 1) -> TextConditioning:
    generator = torch.Generator().manual_seed(seed)
    return TextConditioning(
        embeds=torch.randn(batch, 5, 8, generator=generator), pooled=torch.randn(batch, 6, generator=generator),
        mask=torch.ones(batch, 5, dtype=torch.bool),
    )  # fmt: skip


def random_ratios(seed: int, steps: int, *, both: bool = True) -> CacheRatios:
    rng = random.Random(seed)
    sides = [tuple(1 + rng.gauss(0, 0.03) for _ in range(steps - 1)) for _ in range(2)]
    return CacheRatios(variant="x", shift=5.0, conditional=sides[0], unconditional=sides[1] if both else None)


def literal_rule(ratios: CacheRatios, steps: int, settings: MagSettings, *, guided: bool) -> list[bool]:
    """The official rule as the facts sheet states it: one counter, lists by its parity, products step by step."""
    table = [1.0, 1.0]
    for pair in zip(ratios.conditional, ratios.unconditional or ratios.conditional, strict=True):
        table += pair
    error, taken, ratio, skips, counter = [0.0, 0.0], [0, 0], [1.0, 1.0], [], 0
    while counter < 2 * steps:
        branch, skip = counter % 2, False
        if counter >= int(2 * steps * settings.retain):
            ratio[branch] *= table[counter]
            taken[branch] += 1
            error[branch] += abs(1 - ratio[branch])
            skip = error[branch] < settings.threshold and taken[branch] <= settings.max_skip
            if not skip:
                error[branch], taken[branch], ratio[branch] = 0.0, 0, 1.0
        skips.append(skip)
        counter += 1 if guided else 2
    return skips


def ran_by_call(dit: DiffusionTransformer) -> list[bool]:
    """Whether the blocks ran, for each later call of the DiT."""
    ran: list[bool] = []
    dit.register_forward_pre_hook(lambda *_: ran.append(False))
    dit.visual_transformer_blocks[-1].register_forward_hook(lambda *_: ran.__setitem__(-1, True))
    return ran


SETTINGS = [
    MagSettings(), MagSettings(threshold=0.05), MagSettings(threshold=0.4, max_skip=5), MagSettings(retain=0.5),
    MagSettings(threshold=0.02, max_skip=1, retain=0.1), MagSettings(max_skip=0), MagSettings(threshold=0.0),
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("guided", [True, False])
def test_skips_what_the_rule_says_while_sampling(settings: MagSettings, guided: bool) -> None:
    dit, plan = tiny(), plan_visual(CONFIG, (2, 2, 2), (1.0, 1.0, 1.0))
    for steps, seed in ((20, 1), (18, 2), (31, 3)):
        ratios, sigmas = random_ratios(seed, steps), flow_schedule(steps, 5.0)
        ran, cache = ran_by_call(dit), MagCache(ratios, settings, sigmas.tolist())
        velocity = guided_velocity(dit, conditioning(1), conditioning(2), 4.0 if guided else 1.0, plan, cache=cache)
        with torch.no_grad():
            SAMPLERS["euler"](velocity, torch.randn(1, 4, 2, 4, 4), sigmas)
        expected = literal_rule(ratios, steps, settings, guided=guided)
        assert [not row for row in ran] == expected
        assert (cache.counts.evaluations, cache.counts.skipped) == (len(expected), sum(expected))
        assert predicted_counts(ratios, settings, sigmas.tolist(), guided=guided) == cache.counts
        if settings.threshold and settings.max_skip:
            assert any(expected)


@pytest.mark.parametrize("name", released_names())
def test_released_tables_under_the_literal_rule(name: str) -> None:
    ratios, row = released_ratios(name), VARIANTS[name]
    sigmas = flow_schedule(50, row.sampling.shift).tolist()
    for settings in SETTINGS:
        for guided in (True, False):
            rules = [SkipRule(ratios, settings, sigmas, side) for side in range(1 + guided)]
            skips = [rule.skips(sigma) for sigma in sigmas[:-1] for rule in rules]
            assert skips == literal_rule(ratios, 50, settings, guided=guided)


def test_released_tables_are_the_official_ones() -> None:
    assert len(released_names()) == 12
    lite = released_ratios("lite-t2v-5s-sft")
    assert lite.steps == 50
    assert lite.conditional[:2] == pytest.approx((0.91607, 0.95254)) and lite.conditional[-1] == pytest.approx(0.84336)
    assert lite.unconditional[:2] == pytest.approx((0.91507, 0.95349)) and lite.unconditional[-1] == pytest.approx(0.84193)
    assert released_ratios("pro-i2v-5s-sft-hd").unconditional[-1] == pytest.approx(0.81322)
    for name in ("lite-t2v-5s-nocfg", "lite-t2v-10s-nocfg"):
        assert released_ratios(name).unconditional is None
    # The sums of all official integers, a check of the copy.
    tables = json.loads((EMBEDDED.parent / "sampling" / "released_ratios.json").read_text())["tables"]
    assert sum(sum(values) for table in tables.values() for values in table.values()) == 108_016_131
    for name in ("lite-t2v-5s-pretrain", "lite-t2v-5s-flash", "image-lite-i2i-sft", "nano-video"):
        assert released_ratios(name) is None


def test_ratios_between_steps() -> None:
    ratios = released_ratios("lite-t2v-5s-sft")
    own = flow_schedule(50, 5.0).tolist()
    for side, table in enumerate((ratios.conditional, ratios.unconditional)):
        logs = [ratios.log_length(sigma, side) for sigma in own[:-1]]
        np.testing.assert_allclose(np.exp(np.diff(logs)), table, rtol=1e-6)
        # Half as many steps: each ratio is the product of two. Twice as many: its square root.
        half = [ratios.log_length(sigma, side) for sigma in flow_schedule(25, 5.0).tolist()[:-1]]
        np.testing.assert_allclose(np.exp(np.diff(half)), np.array(table[:48:2]) * np.array(table[1:48:2]), rtol=1e-6)
        twice = [ratios.log_length(sigma, side) for sigma in flow_schedule(100, 5.0).tolist()[:-2]]
        np.testing.assert_allclose(np.exp(np.diff(twice))[1::2] ** 2, table, rtol=1e-4)
        # Any other levels, by numpy: straight in the logarithm over the index at which the own schedule has the level.
        other = flow_schedule(37, 9.0, 0.8).tolist()[:-1]
        index = np.interp([-sigma for sigma in other], [-sigma for sigma in own], range(51))
        rounded = [50 * (1 - sigma / (5 - 4 * sigma)) for sigma in other]
        np.testing.assert_allclose(index, rounded, atol=0.05)
        inside = np.array(rounded) <= 49
        expected = np.interp(rounded, range(50), np.concatenate([[0], np.cumsum(np.log(table))]))
        found = np.array([ratios.log_length(sigma, side) for sigma in other])
        np.testing.assert_allclose(found[inside], expected[inside], atol=2e-5)
        assert (found[~inside] < expected[~inside]).all()  # goes on falling beyond the last measured step


def test_a_skipped_step_adds_the_residual_of_its_own_side() -> None:
    dit, plan = tiny(), plan_visual(CONFIG, (2, 2, 2), (1.0, 1.0, 1.0))
    ratios = CacheRatios(variant="x", shift=1.0, conditional=(1.0,) * 9, unconditional=(1.0,) * 9)
    cache = MagCache(ratios, MagSettings(retain=0.1), flow_schedule(10, 1.0).tolist())
    texts = [conditioning(1), conditioning(2)]
    generator, residuals = torch.Generator().manual_seed(5), []
    for step, sigma in enumerate((1.0, 0.9)):
        x = torch.randn(1, 9, 2, 4, 4, generator=generator)
        timestep = torch.tensor([1000 * sigma])
        for side, text in enumerate(texts):
            made = dit(x, timestep, text, plan, cache.around(sigma, (side,)))
            seen = {}

            def spy(blocks, tokens, text, time_embed, *rest, seen=seen):
                seen.update(tokens=tokens, after=blocks(tokens, text, time_embed, *rest), time_embed=time_embed)
                return seen["after"]

            full = dit(x, timestep, text, plan, spy)
            if step == 0:
                residuals.append(seen["after"] - seen["tokens"])
            assert torch.equal(made, full) == (step == 0)
            expected = dit.out_layer(seen["tokens"] + residuals[side], seen["time_embed"], plan.grid)
            torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-5)
    assert (cache.counts.evaluations, cache.counts.skipped) == (4, 2)
    assert not torch.allclose(residuals[0], residuals[1])


def test_both_sides_in_one_batch_are_as_one_after_the_other() -> None:
    dit, plan = tiny(), plan_visual(CONFIG, (2, 2, 2), (1.0, 1.0, 1.0))
    # In step 2 only the second side may skip, in step 3 only the first, in step 4 both.
    sides = {"conditional": (1.5, 1.5, 1.0, 1.0, 1.5), "unconditional": (1.5, 1.0, 1.5, 1.0, 1.5)}
    ratios = CacheRatios(variant="x", shift=1.0, **sides)
    sigmas = flow_schedule(6, 1.0).tolist()
    texts = [replace(conditioning(side, 2), mask=torch.arange(5) < torch.tensor([[5 - side], [4]])) for side in (0, 1)]
    both = TextConditioning(
        embeds=torch.cat([text.embeds for text in texts]), pooled=torch.cat([text.pooled for text in texts]),
        mask=torch.cat([text.mask for text in texts]),
    )  # fmt: skip
    together, apart = (MagCache(ratios, MagSettings(retain=0.0), sigmas) for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    skipped = []
    for sigma in sigmas[:-1]:
        x = torch.randn(2, 9, 2, 4, 4, generator=generator)
        timestep = torch.full((4,), 1000 * sigma)
        one = dit(torch.cat([x, x]), timestep, both, plan, together.around(sigma, (0, 1)))
        two = [dit(x, timestep[:2], text, plan, apart.around(sigma, (side,))) for side, text in enumerate(texts)]
        torch.testing.assert_close(one, torch.cat(two), atol=2e-3, rtol=1e-2)
        assert together.counts == apart.counts
        skipped.append(together.counts.skipped)
    assert skipped == [0, 0, 1, 2, 4, 4]


def test_parts_with_names_and_other_sizes_keep_apart() -> None:
    dit = tiny()
    ratios = CacheRatios(variant="x", shift=1.0, conditional=(1.0,) * 9)
    cache = MagCache(ratios, MagSettings(retain=0.0, max_skip=9), flow_schedule(10, 1.0).tolist())
    text, timestep = conditioning(1), torch.tensor([900.0])

    def call(sigma: float, key: str, grid: tuple[int, int, int]) -> int:
        x = torch.randn(1, 9, grid[0], 2 * grid[1], 2 * grid[2])
        before = cache.counts.skipped
        dit(x, timestep, text, plan_visual(CONFIG, grid, (1.0, 1.0, 1.0)), cache.around(sigma, (0,), (key,)))
        return cache.counts.skipped - before

    assert [call(1.0, "left", (1, 2, 2)), call(1.0, "right", (1, 2, 2))] == [0, 0]
    assert [call(0.9, "left", (1, 2, 2)), call(0.9, "right", (1, 2, 2))] == [1, 1]
    assert len(cache.parts) == 2
    assert [call(0.8, "left", (1, 2, 3)), call(0.7, "left", (1, 2, 3)), call(0.7, "right", (1, 2, 2))] == [0, 1, 1]
    # Windows that move do not pile up, and what was not seen for long is computed.
    for number in range(5):
        call(0.6 - number / 10, f"window {number}", (1, 2, 2))
    assert set(cache.parts) == {"window 2", "window 3", "window 4"}
    assert call(0.1, "right", (1, 2, 2)) == 0


def first_frame() -> torch.Tensor:
    scene = parse(PROMPT)
    return draw(scene, Trajectory(start=(40.0, 30.0), end=(20.0, 30.0), radius=12.0), 17, (64, 64))[0]


REQUESTS = {
    "t2v": ("nano-video", {"task": "t2v"}),
    "unguided": ("nano-video", {"task": "t2v", "guidance_scale": 1.0}),
    "i2v": ("nano-video", {"task": "i2v", "image": first_frame()}),
    "nabla": ("nano-video", {"task": "t2v", "attention": "nabla"}),
    "heun": ("nano-video", {"task": "t2v", "sampler": "heun", "num_steps": 10}),
    "t2i": ("nano-image", {"task": "t2i", "batch": 2}),
    "i2i": ("nano-edit", {"task": "i2i", "image": first_frame(), "prompt": "make the circle blue"}),
    "inpaint": ("nano-image", {"task": "t2i", "image": first_frame(), "denoise": 0.7}),
    "loop": ("nano-video", {"task": "i2v", "image": first_frame(), "loop": True}),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_every_task_threshold_0_changes_no_bit_and_more_skips_and_stays_near(case: str) -> None:
    model, options = REQUESTS[case]
    models, request = load(model), Request(**{"prompt": PROMPT, "seed": 7, **options})
    plain = generate(models, request)
    zero = generate(models, replace(request, cache="magcache", cache_threshold=0.0))
    assert torch.equal(plain.frames, zero.frames)
    assert zero.cache["skipped"] == 0 and zero.cache["evaluations"] > 0 and plain.cache == {}
    cached = generate(models, replace(request, cache="magcache"))
    again = generate(models, replace(request, cache="magcache"))
    assert torch.equal(cached.frames, again.frames)
    assert not torch.equal(cached.frames, plain.frames)
    assert cached.cache["skipped_share"] > 0.25
    assert (cached.frames - plain.frames).abs().mean() < 0.05
    used = [cached.settings[name] for name in ("cache", "cache_threshold", "cache_max_skip", "cache_retain")]
    defaults = models.variant.sampling
    assert used == ["magcache", defaults.cache_threshold, 2, defaults.cache_retain]
    assert "cache" not in plain.settings


def test_a_cancelled_run_leaves_nothing_behind(nano: Models) -> None:
    request = Request(prompt=PROMPT, seed=7, cache="magcache", num_steps=12)
    first = generate(nano, request).frames

    def cancel(step: int, total: int, latents: torch.Tensor) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(nano, replace(request, seed=8), cancel)
    assert torch.equal(generate(nano, request).frames, first)
    gc.collect()
    assert not [item for item in gc.get_objects() if isinstance(item, MagCache)]


def test_changed_weights_are_used(nano: Models) -> None:
    """A LoRA merged between two runs acts in the second as in a fresh one."""
    request, models = Request(prompt=PROMPT, seed=7, cache="magcache", num_steps=12), load("nano-video")
    before = generate(models, request).frames
    weight = models.dit.visual_transformer_blocks[1].self_attention.to_query.weight
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight += 0.3 * torch.randn(192, 4, generator=generator) @ torch.randn(4, 192, generator=generator) / 14
    after = generate(models, request).frames
    fresh = load("nano-video")
    fresh.dit.visual_transformer_blocks[1].self_attention.to_query.weight.data.copy_(weight)
    assert torch.equal(after, generate(fresh, request).frames) and not torch.equal(after, before)


def test_batches_hold_single_runs(nano: Models) -> None:
    request = Request(prompt=PROMPT, seed=8, cache="magcache", num_steps=12)
    one, batch = generate(nano, request), generate(nano, replace(request, seed=7, batch=2))
    # As without a cache: last bits of bf16 rotary embeddings differ with the order of sums.
    assert (batch.frames[1:] - one.frames).abs().mean() < 2e-3
    assert batch.cache["skipped"] == one.cache["skipped"]


@pytest.mark.parametrize(
    ("row", "why"),
    [("lite-t2v-5s-flash", "distilled to 16 steps"), ("lite-t2v-5s-pretrain", "--calibrate-cache")],
)
def test_off_with_a_message(nano: Models, caplog: pytest.LogCaptureFixture, row: str, why: str) -> None:
    other = replace(VARIANTS[row], dit=nano.variant.dit, vae=nano.variant.vae, resolutions=nano.variant.resolutions)
    models = replace(nano, variant=other, weights=None)
    request = Request(prompt=PROMPT, num_frames=5, num_steps=4, guidance_scale=1.0)
    plain = generate(models, request)
    off = generate(models, replace(request, cache="magcache"))
    assert torch.equal(plain.frames, off.frames)
    assert why in off.cache["off"] and row in off.cache["off"] and why in caplog.text
    assert off.settings == plain.settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cache", "teacache", "cache 'teacache' is not possible; use one of off, magcache"),
        ("cache_threshold", -0.1, "cache_threshold must be at least 0, got -0.1"),
        ("cache_threshold", math.nan, "cache_threshold"),
        ("cache_max_skip", -1, "cache_max_skip must be at least 0, got -1"),
        ("cache_retain", 1.1, "cache_retain must be in 0 to 1, got 1.1"),
        ("cache_ratios", Path("/no/such.json"), "/no/such.json: no such file"),
    ],
)
def test_bad_settings_are_refused(nano: Models, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(nano, Request(**{"prompt": PROMPT, "cache": "magcache", field: value}))


def test_calibration_measures_known_ratios() -> None:
    """Blocks that add a vector of known length in each step: the ratios come back, for each side."""
    plan, steps, sigmas = plan_visual(CONFIG, (1, 2, 2), (1.0, 1.0, 1.0)), 9, flow_schedule(9, 5.0).tolist()
    rng = random.Random(3)
    sides = [[rng.uniform(0.7, 1.3) for _ in range(steps - 1)] for _ in range(2)]
    direction, calibration = torch.randn(2, 4, 32), Calibration(5.0)
    for _ in range(2):
        run, lengths = calibration.start(sigmas), [1.0, 1.0]
        for step, sigma in enumerate(sigmas[:-1]):
            for side in range(2):
                lengths[side] *= sides[side][step - 1] if step else 1.0
                tokens = torch.randn(2, 4, 32)
                blocks = lambda tokens, *_, length=lengths[side]: tokens + length * direction  # noqa: E731
                made = run.around(sigma, (side,))(blocks, tokens, None, None, plan, None)
                assert torch.equal(made, tokens + lengths[side] * direction)
    found = calibration.ratios(VARIANTS["nano-video"])
    np.testing.assert_allclose(found.conditional, sides[0], rtol=1e-4)
    np.testing.assert_allclose(found.unconditional, sides[1], rtol=1e-4)
    assert (found.variant, found.shift, found.steps) == ("nano-video", 5.0, 9)


def test_calibration_wants_whole_plain_runs(nano: Models) -> None:
    for sigmas in (flow_schedule(6, 3.0), flow_schedule(20, 3.0, 0.7), flow_schedule(20, 5.0), flow_schedule(20, 3.0)[:15]):
        with pytest.raises(ValueError, match="official schedule"):
            Calibration(3.0).start(sigmas.tolist())
    calibration = Calibration(3.0)
    generate(nano, Request(prompt=PROMPT, sampler="heun", num_steps=8), new_cache=calibration.start)
    with pytest.raises(ValueError, match="one evaluation in every step"):
        calibration.ratios(nano.variant)
    with pytest.raises(ValueError, match="one evaluation in every step"):
        Calibration(3.0).ratios(nano.variant)


def run_cli(tmp_path: Path, *options: str, model: str = "nano-video") -> int:
    parts = [] if model == "nano-video" else ["--text-encoder", str(EMBEDDED / "video/qwen"), "--clip",
             str(EMBEDDED / "video/clip"), "--vae", str(EMBEDDED / "video/vae.safetensors")]  # fmt: skip
    return main(["generate", "--model", model, *parts, "--prompt", PROMPT, "--frames", "5", "--out",
                 str(tmp_path / "clip.mp4"), "--json", *options])  # fmt: skip


def test_calibrate_and_use_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = str(shutil.copy(EMBEDDED / "video" / "dit.safetensors", tmp_path / "mine.safetensors"))
    assert run_cli(tmp_path, "--cache", "magcache", model=model) == 0
    assert "no ratios are known" in json.loads(capsys.readouterr().out)["cache"]["off"]
    assert run_cli(tmp_path, "--calibrate-cache", model=model) == 0
    told = json.loads(capsys.readouterr().out)
    file = ratios_path(Path(model))
    assert told["calibrated"] == str(file) == str(tmp_path / "mine.magcache.json")
    saved = json.loads(file.read_text())
    assert saved["model_hash"] == told["model_hash"] and (saved["variant"], saved["steps"]) == ("nano-video", 20)
    assert run_cli(tmp_path, "--cache", "magcache", model=model) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cache"]["ratios"] == "mine.magcache.json: nano-video, 20 steps" and told["cache"]["skipped"] > 10
    assert not list(tmp_path.glob("*.part"))
    # Other weights under the same name: said, and not used.
    data = bytearray(Path(model).read_bytes())
    data[-1_000_000:] = bytes(1_000_000)
    Path(model).write_bytes(data)
    assert run_cli(tmp_path, "--cache", "magcache", model=model) == 0
    assert "no ratios are known" in json.loads(capsys.readouterr().out)["cache"]["off"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate-cache", "--cache", "magcache"], "use it without --cache"),
        (["--calibrate-cache", "--steps", "5"], "at least 8 steps, got 5"),
        (["--calibrate-cache", "--sampler", "heun"], "not heun"),
        (["--calibrate-cache", "/no/folder/r.json"], "cannot write /no/folder/r.json"),
        (["--cache", "magcache", "--cache-ratios", "/no/such.json"], "no such file"),
        (["--cache", "fast"], "use one of off, magcache"),
        (["--cache-threshold", "-1"], "cache_threshold must be at least 0"),
    ],
)
def test_bad_options_end_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    assert run_cli(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "kandinsky5-magcache"}', "WRONG STEPS", "NEGATIVE", "TEXT"],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    good = json.loads((EMBEDDED / "video" / "dit.magcache.json").read_text())
    changes = {"WRONG STEPS": {"steps": 7}, "NEGATIVE": {"conditional": [-1.0] * 19}, "TEXT": {"conditional": ["a", "b"]}}
    file = tmp_path / "r.json"
    file.write_text(json.dumps({**good, **changes[text]}) if text in changes else text)
    with pytest.raises(ValueError, match=r"r\.json"):
        read_ratios(file)


@pytest.mark.parametrize(("folder", "name"), [("video", "nano-video"), ("image", "nano-image"), ("edit", "nano-edit")])
def test_embedded_models_have_their_ratios(folder: str, name: str) -> None:
    weights = EMBEDDED / folder / "dit.safetensors"
    ratios = find_ratios(VARIANTS[name], weights)
    assert ratios is not None and ratios.variant == name and ratios.steps == VARIANTS[name].sampling.num_steps
    assert read_ratios(ratios_path(weights), weights) == ratios


def test_which_ratios_are_found(tmp_path: Path) -> None:
    sd, hd, pretrain = (VARIANTS[name] for name in ("pro-t2v-5s-sft", "pro-t2v-5s-sft-hd", "pro-t2v-5s-pretrain"))
    weights = Path(shutil.copy(EMBEDDED / "video" / "dit.safetensors", tmp_path / "pro.safetensors"))
    assert find_ratios(sd, weights) == released_ratios(sd.name) and find_ratios(pretrain, weights) is None
    values = json.loads((EMBEDDED / "video" / "dit.magcache.json").read_text())
    ratios_path(weights).write_text(json.dumps({**values, "variant": sd.name}))
    assert find_ratios(sd, weights).source == "pro.magcache.json"
    assert find_ratios(hd, weights) == released_ratios(hd.name)
    assert find_ratios(pretrain, weights).source == "pro.magcache.json"
    named = tmp_path / "named.json"
    named.write_text(json.dumps({**values, "variant": "image-lite-t2i-sft"}))
    with pytest.raises(ValueError, match="has other sizes"):
        find_ratios(sd, weights, named)


def test_scores_take_a_cache(nano: Models) -> None:
    scored = score_nano(count=1, models=nano, options={"cache": "magcache"})
    assert scored["cache"] == "magcache" and scored["n"] == 1
