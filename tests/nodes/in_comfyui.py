"""Run inside ComfyUI's Python: loads the pack as ComfyUI does, without its server.

`<python> in_comfyui.py <ComfyUI> <pack folder> <check> <folder>` runs `check_<check>` of `checks.py`; `FILE.check`: of
`FILE.py` beside it.
"""

import asyncio
import importlib.util
import sys
from pathlib import Path


def load_pack(folder: Path, name: str = "custom_nodes.some-pack.v1"):
    """The pack as a module under a name that is no identifier, as ComfyUI gives it."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    comfyui, pack, check, folder = sys.argv[1:5]
    sys.path.insert(0, comfyui)
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    before = list(sys.path)
    module = load_pack(Path(pack))
    extension = asyncio.run(module.comfy_entrypoint())
    classes = asyncio.run(extension.get_node_list())
    assert sys.path == before
    for node in classes:
        nodes.NODE_CLASS_MAPPINGS[node.define_schema().node_id] = node
    file, _, check = check.rpartition(".")
    spec = importlib.util.spec_from_file_location("checks", Path(__file__).parent / f"{file or 'checks'}.py")
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    getattr(checks, f"check_{check}")(module.__name__, Path(folder))
    print("OK", check)


if __name__ == "__main__":
    main()
