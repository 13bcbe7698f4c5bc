"""Teaching `nano-video` what it does not know, from 24 drawn clips each: `python -m train.recipes.nano_concepts`.

A shape and a colour become a LoRA each, and both LoRAs a soup. Every figure is of the files as they were written, on
prompts that nothing was trained on. `LORA` and `FIT` serve both concepts unchanged; they are a start for others.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5_core.conditioning import joined
from kandinsky5_core.inputs import encode_frames
from kandinsky5_core.loading import load
from kandinsky5_core.media import write_image
from kandinsky5_core.nano.drawing import draw, random_scene, random_trajectory
from kandinsky5_core.nano.language import Scene, varied_caption
from kandinsky5_core.nano.recognise import recognise
from kandinsky5_core.nano.score import generate_rows, score_nano
from kandinsky5_core.pipeline import Models
from kandinsky5_core.request import Request
from kandinsky5_core.sheet import contact_sheet, spread
from kandinsky5_core.vae.tiling import DEFAULT_BUDGET_BYTES
from kandinsky5_core.weights.lora import BASE_KEY, SAMPLES_KEY, read_lora
from kandinsky5_core.weights.lora_tools import write_lora
from kandinsky5_core.weights.low_rank import delta, lora_deltas
from kandinsky5_core.weights.soup import Part, soup

from ..config import FitConfig, LoraConfig
from ..data.recall import recall
from ..data.rows import RowBatches
from ..loop import fit
from ..objectives.flow_matching import FlowMatching
from ..objectives.preservation import Preserving
from ..objectives.strengths import AtStrengths
from ..trainable import WithLora, lora_tensors
from .drawn_data import NUM_SAMPLES, star, turquoise

LORA = LoraConfig(rank=64, alpha=64.0)
FIT = FitConfig(
    num_steps=600, learning_rate=6e-3, optimizer="muon", warmup_steps=20, ema_decay=0.99, checkpoint_every=200, seed=80
)
NEW_ROWS, OLD_ROWS = 12, 10
"""Of each step: clips of the concept, and of what the model knew before."""
KEEP = 1.5
"""Weight of staying with the old answers."""
NUM_RECALLED, RECALL_STEPS = 192, 10
"""Clips of the old language that the model makes for itself, and sampling steps for each."""
PLACES = 9
"""Copies of each clip with the shape elsewhere in the frame: 24 places alone are learned by heart."""
PLAIN = 0.1
"""RGB distance from the background, of sqrt(3), below which a pixel belongs to it."""
SCORE_BATCH = 10


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Something new, by the word that asks for it."""

    word: str
    kind: str
    """'shape' or 'color': what a recogniser has to call by the word."""
    make_scene: Callable[[random.Random], Scene]


CONCEPTS = (
    Concept(word="star", kind="shape", make_scene=star),
    Concept(word="turquoise", kind="color", make_scene=turquoise),
)


def drawn_clips(concept: Concept, seed: int, models: Models) -> list[tuple[str, Tensor]]:
    """The material: captions and clips (F, H, W, 3)."""
    rng, size = random.Random(seed), models.variant.resolutions[0]
    found = []
    for _ in range(NUM_SAMPLES):
        scene = concept.make_scene(rng)
        clip = draw(scene, random_trajectory(scene, rng, size), models.variant.num_frames, size)
        found.append((varied_caption(scene, rng), clip))
    return found


def elsewhere(clip: Tensor, rng: random.Random) -> Tensor:
    """The clip (F, H, W, 3) moved as a whole, so far that all that stands before its plain background stays inside."""
    height, width = clip.shape[1:3]
    background = torch.cat([clip[:, 0].flatten(0, 1), clip[:, -1].flatten(0, 1)]).median(dim=0).values
    shown = ((clip - background).norm(dim=-1) > PLAIN).any(dim=0)
    rows, columns = shown.any(dim=1).nonzero().flatten().tolist(), shown.any(dim=0).nonzero().flatten().tolist()
    if not rows:
        return clip
    down = rng.randint(-rows[0], height - 1 - rows[-1])
    right = rng.randint(-columns[0], width - 1 - columns[-1])
    moved = background.expand_as(clip).clone()
    piece = clip[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = rows[0] + down, columns[0] + right
    moved[:, top : top + piece.shape[1], left : left + piece.shape[2]] = piece
    return moved


@torch.no_grad()
def material(models: Models, clips: Sequence[tuple[str, Tensor]], seed: int) -> RowBatches:
    """Clips and their copies elsewhere, encoded as a user's own footage would be."""
    rng = random.Random(seed)
    shown = [[clip, *(elsewhere(clip, rng) for _ in range(PLACES))] for _, clip in clips]
    latents = [encode_frames(models, frames, DEFAULT_BUDGET_BYTES) for copies in shown for frames in copies]
    encode, length = models.text_encoder.encode, models.variant.max_text_tokens
    texts = [encode([caption], task="t2v", max_tokens=length).trimmed() for caption, _ in clips]
    empty = encode([""], task="t2v", max_tokens=length).trimmed()
    conditioning = joined([*(text.repeat(1 + PLACES) for text in texts), empty])
    # Shown without captions, 24 clips alike would move what guidance pushes away from.
    return RowBatches(torch.cat(latents), conditioning, NEW_ROWS, caption_dropout=0.0)


def known_prompts(count: int, seed: int) -> list[str]:
    """Sentences of the language that the model knows."""
    rng = random.Random(seed)
    return [varied_caption(random_scene(rng), rng) for _ in range(count)]


def teach(models: Models, concept: Concept, file: Path, config: FitConfig = FIT) -> dict[str, float]:
    """Train a LoRA for the concept and write it to `file`; seconds by stage. The model is as before."""
    began = time.perf_counter()
    new = material(models, drawn_clips(concept, config.seed, models), config.seed)
    encoded = time.perf_counter()
    prompts = known_prompts(NUM_RECALLED, config.seed + 1)
    old = recall(models, prompts, num_steps=RECALL_STEPS, seed=config.seed + 1, batch_size=OLD_ROWS)
    recalled = time.perf_counter()
    variant = models.variant
    flow = FlowMatching(new, variant.rope_scale, shift=variant.sampling.shift)
    objective = AtStrengths(Preserving(flow, old, weight=KEEP), LORA.least_strength)
    adapted = WithLora(models.dit, LORA, torch.Generator().manual_seed(config.seed))
    run = file.parent / f"{file.stem}-run"
    try:
        average = fit(adapted, objective, config, run)
    finally:
        adapted.detach()
    metadata = {"lora_alpha": str(LORA.alpha), "trigger": concept.word, BASE_KEY: models.model_hash,
                SAMPLES_KEY: str(NUM_SAMPLES)}  # fmt: skip
    write_lora(file, lora_tensors(average.state_dict()), "comfyui", metadata)
    # It is for going on after an interruption: the next call begins anew.
    shutil.rmtree(run)
    ended = time.perf_counter()
    times = {"encoding": encoded - began, "recall": recalled - encoded, "training": ended - recalled,
             "in all": ended - began}  # fmt: skip
    return {name: round(seconds, 1) for name, seconds in times.items()}


def with_lora(models: Models, file: Path, strength: float = 1.0) -> Models:
    """The models with a LoRA file in a copy of the DiT."""
    dit = copy.deepcopy(models.dit)
    weights = dict(dit.named_parameters())
    shapes = {name.removesuffix(".weight"): tuple(w.shape) for name, w in weights.items() if name.endswith(".weight")}
    with torch.no_grad():
        for module, pair in lora_deltas(read_lora(file, shapes)).items():
            weights[f"{module}.weight"] += strength * delta(*pair)
    return replace(models, dit=dit)


def concept_score(models: Models, concept: Concept, count: int, seed: int) -> tuple[float, list[Tensor]]:
    """Share of clips of prompts with the word that show what it means, and the clips."""
    rng = random.Random(f"{concept.word}-{seed}")
    scenes = [concept.make_scene(rng) for _ in range(count)]
    requests = [Request(prompt=varied_caption(scene, rng), seed=seed * 1000 + row) for row, scene in enumerate(scenes)]
    starts = range(0, count, SCORE_BATCH)
    clips = [clip for start in starts for clip in generate_rows(models, requests[start : start + SCORE_BATCH])]
    right = [getattr(recognise(clip, taught=(concept.word,)), concept.kind) == concept.word for clip in clips]
    return sum(right) / count, clips


@dataclass
class Scores:
    """What is asked of every model: the concepts' prompts, their union, and the old language."""

    concepts: Sequence[Concept]
    count: int
    seed: int

    def of(self, models: Models, name: str, sheet: list[tuple[str, list[Tensor]]]) -> dict[str, float]:
        """Shares of right clips by concept, their mean `union`, and `old language`; pictures go to `sheet`."""
        found = {}
        for concept in self.concepts:
            found[concept.word], clips = concept_score(models, concept, self.count, self.seed)
            sheet += [(f"{name}: {concept.word} {number}", spread(clip, 5)) for number, clip in enumerate(clips[:3], 1)]
        old = score_nano(count=self.count, seed=self.seed, models=models)
        return {**union(found), "old language": float(old["all"])}


def union(shares: dict[str, float]) -> dict[str, float]:
    """Shares by concept with their mean: that of all prompts together, as every concept has the same number."""
    return {**shares, "union": sum(shares.values()) / len(shares)}


def demo_train(out: Path, concepts: Sequence[Concept], *, count: int, seed: int, config: FitConfig = FIT) -> dict:
    """Score, teach each concept, score again, and the same for the soup where there are several.

    Writes the LoRAs, `soup.safetensors`, `before-and-after.png` and `figures.json` into `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    models, scores = load("nano-video"), Scores(concepts, count, seed)
    sheet: list[tuple[str, list[Tensor]]] = []
    files = {concept.word: out / f"{concept.word}.safetensors" for concept in concepts}
    rows = {"before": scores.of(models, "before", sheet)}
    seconds = {}
    for concept in concepts:
        seconds[concept.word] = teach(models, concept, files[concept.word], config)
        name = f"{concept.word} LoRA"
        rows[name] = scores.of(with_lora(models, files[concept.word]), name, sheet)
    if len(concepts) > 1:
        soup([Part.of(file) for file in files.values()], out / "soup.safetensors")
        # Its average has each LoRA at its share; at the second strength each is whole again.
        for strength in (1.0, float(len(concepts))):
            name = f"soup at strength {strength:g}"
            rows[name] = scores.of(with_lora(models, out / "soup.safetensors", strength), name, sheet)
    write_image(out / "before-and-after.png", contact_sheet(sheet), {})
    figures = {"n": count, "seed": seed, "threads": torch.get_num_threads(), "scores": rows, "seconds": seconds}
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def table(figures: dict) -> str:
    """Scores and times as text."""
    columns = list(figures["scores"]["before"])
    lines = [f"{'':<22}" + "".join(f"{name:>14}" for name in columns)]
    lines += [f"{model:<22}" + "".join(f"{row[name]:>14.2f}" for name in columns)
              for model, row in figures["scores"].items()]  # fmt: skip
    for word, stages in figures["seconds"].items():
        lines.append(f"{word} LoRA: " + ", ".join(f"{name} {value:g} s" for name, value in stages.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo-train"))
    parser.add_argument("--star-only", action="store_true", help="the shape alone, without colour and soup")
    parser.add_argument("--n", type=int, default=40, help="clips for each score (default 40)")
    parser.add_argument("--seed", type=int, default=1, help="of the scored prompts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    concepts = CONCEPTS[:1] if args.star_only else CONCEPTS
    figures = demo_train(args.out, concepts, count=args.n, seed=args.seed)
    sys.stdout.write(f"{table(figures)}\nwritten to {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
