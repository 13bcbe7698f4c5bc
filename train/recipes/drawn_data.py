"""Small drawn folders to train on, as users would lay out theirs: `python -m train.recipes.drawn_data FOLDER`.

The training workflows use them, so that they run without anybody's footage; `workflows/datasets` holds their output.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kandinsky5_core.config import VARIANTS
from kandinsky5_core.media import write_image, write_video
from kandinsky5_core.nano.drawing import draw, random_scene, random_trajectory
from kandinsky5_core.nano.language import Scene, varied_caption

NUM_SAMPLES = 24
SEED = 70


def star(rng: random.Random) -> Scene:
    """A shape that the Nano models do not know."""
    return replace(random_scene(rng), shape="star", size="big")


def turquoise(rng: random.Random) -> Scene:
    """A colour that they do not know."""
    return replace(random_scene(rng), color="turquoise", size="big")


def write_clips(folder: Path, make_scene: Callable[[random.Random], Scene], seed: int) -> None:
    """Clips with captions beside them."""
    rng, variant = random.Random(seed), VARIANTS["nano-video"]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_SAMPLES):
        scene = make_scene(rng)
        trajectory = random_trajectory(scene, rng, variant.resolutions[0])
        frames = draw(scene, trajectory, variant.num_frames, variant.resolutions[0])
        write_video(folder / f"{number:02d}.mp4", frames, variant.fps)
        (folder / f"{number:02d}.txt").write_text(varied_caption(scene, rng) + "\n", encoding="utf-8")


def write_edits(folder: Path, seed: int) -> None:
    """Pictures before and after an edit that the models do not know, with its instruction."""
    rng, size = random.Random(seed), VARIANTS["nano-edit"].resolutions[0]
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(NUM_SAMPLES):
        before = replace(random_scene(rng), direction=None, size="big")
        after = replace(before, shape="star")
        trajectory = random_trajectory(after, rng, size)
        for name, scene in (("source", before), ("target", after)):
            write_image(folder / name / f"{number:02d}.png", draw(scene, trajectory, 1, size)[0])
        text = f"turn the {before.shape} into a star\n"
        (folder / "target" / f"{number:02d}.txt").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    write_clips(args.folder / "star", star, SEED)
    write_clips(args.folder / "turquoise", turquoise, SEED + 1)
    write_edits(args.folder / "star-edits", SEED + 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
