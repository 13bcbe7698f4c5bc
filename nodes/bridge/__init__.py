"""Adapters between ComfyUI and the core: the only place that knows comfy, folder_paths and comfy_api."""
