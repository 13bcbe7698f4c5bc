"""`kandinsky5-train domains`: material into one table for each domain, to train one part of a soup on each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .config import DataConfig, SourceConfig


def add_domains(commands: argparse._SubParsersAction) -> None:
    """The command's options."""
    parser = commands.add_parser("domains", help="split material into domains, a table for each")
    parser.add_argument("material", type=Path, nargs="+", help="folders or tables, as a job's sources")
    parser.add_argument("--out", type=Path, required=True, help="folder for <domain>.jsonl, which jobs take as sources")
    parser.add_argument("--how", choices=("folder", "column", "vlm"), default="folder",
                        help="first folder, column `domain`, or as Qwen2.5-VL sees them (default folder)")  # fmt: skip
    parser.add_argument("--classes", help="for vlm: names to choose from, with commas (default the report's ten)")
    parser.add_argument("--model", default="nano-image", help="for vlm: whose text encoder is asked; its DiT file")
    parser.add_argument("--text-encoder", type=Path, help="Qwen2.5-VL file or folder")
    parser.add_argument("--clip", type=Path, help="CLIP file or folder")
    parser.add_argument("--vae", type=Path, help="as for generating; not loaded")
    parser.add_argument("--tokenizers", type=Path, help="folder with the tokenizers, or of a ComfyUI")
    parser.add_argument("--variant", help="where one DiT file serves several")
    parser.add_argument("--device", default="cpu")
    parser.set_defaults(command=run_domains)


def run_domains(args: argparse.Namespace) -> int:
    """Read, split, write the tables, say what is in them."""
    from .data.domains import split_by_domain, write_tables
    from .data.sources import read_sources

    examples, problems = read_sources(DataConfig(sources=tuple(SourceConfig(path=str(path)) for path in args.material)))
    classes = {"classes": read_classes(args.classes)} if args.classes else {}
    ask = _asker(args, **classes) if args.how == "vlm" else None
    split = split_by_domain(examples, args.how, ask=ask, on_example=_tell, **classes)
    tables = write_tables(split, args.out)
    lines = [split.report(), *(f"{problem.path}: {problem.reason}" for problem in problems)]
    lines += [f"{name}: {path}" for name, path in tables.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def read_classes(text: str) -> tuple[str, ...]:
    """Names between commas, with 'other' among them.

    Raises:
        ValueError: no name.
    """
    names = tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not names:
        raise ValueError("--classes is empty; give names with commas, such as animals,people")
    return names if "other" in names else (*names, "other")


def _asker(args: argparse.Namespace, **classes: tuple[str, ...]) -> object:
    from kandinsky5_core.loading import check_device, find_files, load_text_of, resolve_dtype

    from .data.domains import asker
    from .data.frame import middle_frame

    device = check_device(args.device)
    files = find_files(
        args.model, text_encoder=args.text_encoder, clip=args.clip, vae=args.vae, tokenizers=args.tokenizers,
        variant_name=args.variant,
    )  # fmt: skip
    encoder = load_text_of(files, resolve_dtype(None, device), lm_head=True).to(device)
    return asker(encoder, middle_frame, **classes)


def _tell(done: int, total: int) -> None:
    sys.stderr.write(f"\r{done}/{total}" + ("\n" if done == total else ""))
