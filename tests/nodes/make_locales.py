"""English names and tooltips from the nodes, and the tables of the help pages from the names and the variants.

    python -m tests.nodes.make_locales

Run it after a change of a node or of `kandinsky5_core.config`. It writes `locales/en/nodeDefs.json`, prints which
entries the other languages lack, and renews the parts of `web/docs/**.md` between `<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kandinsky5_core.config import VARIANTS, Variant

PACK = Path(__file__).parents[2]
LOCALES, DOCS = PACK / "locales", PACK / "web" / "docs"
LANGUAGES = ("en", "ru", "zh")
PREFIX = "K5"


def read_locale(language: str, name: str) -> dict[str, Any]:
    """`locales/<language>/<name>.json`."""
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def node_defs(info: dict[str, Any]) -> dict[str, Any]:
    """What `/object_info` says about our nodes, in the form of `nodeDefs.json`."""
    return {name: _node(schema) for name, schema in sorted(info.items()) if name.startswith(PREFIX)}


def _node(schema: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for section in ("required", "optional"):
        for name, (_, options) in schema["input"].get(section, {}).items():
            inputs[name] = _entry(options.get("display_name") or name, options.get("tooltip"))
            if options.get("control_after_generate"):
                # A widget that the frontend adds below the seed.
                inputs["control_after_generate"] = _entry("control after generate", None)
    tips = schema.get("output_tooltips") or [None] * len(schema["output_name"])
    outputs = zip(schema["output_name"], tips, strict=True)
    return {
        "display_name": schema["display_name"],
        "description": schema["description"],
        "inputs": inputs,
        "outputs": {str(index): _entry(name, tip) for index, (name, tip) in enumerate(outputs)},
    }


def _entry(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def key_paths(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Every text of a nested table by its dotted path."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= key_paths(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def rows(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    table = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)


def sizes_of(variant: Variant) -> str:
    """Width x height of every resolution."""
    return ", ".join(f"{width}x{height}" for height, width in variant.resolutions)


def variant_table(words: dict[str, str]) -> str:
    """Steps, guidance, shift and size of every variant, then the lists of sizes."""
    head = [words[key] for key in ("variant", "task", "steps", "guidance", "shift", "frames", "size", "attention")]
    lines = [
        [
            f"`{row.name}`", row.tasks[0], f"{row.sampling.num_steps}", f"{row.sampling.guidance_scale:g}",
            f"{row.sampling.shift:g}", f"{row.num_frames}", sizes_of(row).split(", ")[0],
            words["dense"] if row.nabla is None else f"NABLA {row.nabla.mass:g}",
        ]
        for row in VARIANTS.values()
    ]  # fmt: skip
    groups: dict[frozenset[tuple[int, int]], Variant] = {}
    for row in VARIANTS.values():
        groups.setdefault(frozenset(row.resolutions), row)
    lists = [f"- {sizes_of(row)}" for row in groups.values()]
    return "\n".join([rows(head, lines), "", f"{words['all_sizes']}:", "", *lists])


def blocks(node: dict[str, Any], words: dict[str, str]) -> dict[str, str]:
    """The renewed parts of one node's page in one language, by name."""
    inputs = rows(
        [words["name"], words["meaning"]],
        [[f"**{entry['name']}**", entry["tooltip"]] for entry in node["inputs"].values() if "tooltip" in entry],
    )
    rules = "\n".join(f"- {words[key]}" for key in ("frame_rule", "size_rule"))
    return {"inputs": inputs, "rules": rules, "variants": variant_table(words)}


def renewed(page: str, parts: dict[str, str]) -> str:
    """The page with the text between its markers replaced."""

    def put(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- {name} -->\n{parts[name]}\n<!-- /{name} -->"

    return re.sub(r"<!-- (?P<name>\w+) -->\n.*?<!-- /(?P=name) -->", put, page, flags=re.DOTALL)


def pages() -> list[tuple[str, str, Path]]:
    """Node id, language and file of every help page."""
    english = [(path.stem, "en", path) for path in sorted(DOCS.glob("*.md"))]
    return english + [(path.parent.name, path.stem, path) for path in sorted(DOCS.glob("*/*.md"))]


def renewed_page(node: str, language: str, path: Path) -> str:
    """What a help page should say."""
    words = read_locale(language, "main")["kandinsky5Help"]
    return renewed(path.read_text(encoding="utf-8"), blocks(read_locale(language, "nodeDefs")[node], words))


def main() -> None:
    """Write everything that is made from the nodes and the variants."""
    from tests.nodes.comfy_server import ComfyServer

    with ComfyServer() as server:
        english = node_defs(server.object_info())
    text = json.dumps(english, ensure_ascii=False, indent=2) + "\n"
    (LOCALES / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")
    for language in LANGUAGES[1:]:
        missing = sorted(set(key_paths(english)) - set(key_paths(read_locale(language, "nodeDefs"))))
        print(f"{language}: {len(missing)} missing {missing}")
    for node, language, path in pages():
        path.write_text(renewed_page(node, language, path), encoding="utf-8")


if __name__ == "__main__":
    main()
