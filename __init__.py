"""ComfyUI entry of the pack. Everything heavy is imported inside the function: ComfyUI starts without it."""

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():  # noqa: ANN201
    """The extension that ComfyUI asks for its nodes."""
    from .nodes import make_extension

    return make_extension()
