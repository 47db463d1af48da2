"""ComfyUI nodes. ComfyUI reads the two mappings from this folder, or from a file that imports them: docs/comfyui.md."""

from lumina_mgpt.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
