"""Small helpers for API workflows."""

from __future__ import annotations

import copy
from typing import Any

Workflow = dict[str, dict[str, Any]]


def filled(workflow: Workflow, info: dict[str, Any]) -> Workflow:
    """The workflow with every widget that is left out at its default, as the browser would send it."""
    made = copy.deepcopy(workflow)
    for node in made.values():
        schema = info[node["class_type"]]["input"]
        for name, spec in {**schema.get("required", {}), **schema.get("optional", {})}.items():
            if name in node["inputs"]:
                continue
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            choices = kind if isinstance(kind, list) else options.get("options")
            if "default" in options and not options.get("forceInput"):
                node["inputs"][name] = options["default"]
            elif choices and isinstance(choices[0], str):
                node["inputs"][name] = choices[0]
    return made


def replaced(workflow: Workflow, node: str, **inputs: Any) -> Workflow:
    """The workflow with some inputs of a node changed."""
    made = copy.deepcopy(workflow)
    made[node]["inputs"].update(inputs)
    return made
