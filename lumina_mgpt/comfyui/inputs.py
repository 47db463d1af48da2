"""Inputs that several nodes share, in ComfyUI's form, and the settings that their values stand for."""

from typing import Any

from lumina_mgpt.config import COUPLINGS, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.vocabulary import GRID_UNIT

MODEL = "LUMINA_MGPT"  # type of the output of the node that loads a checkpoint
PLAIN = "off"
_LONGEST = 8192  # pixels of a side; checkpoints see less
_LARGEST_SEED = 2**53 - 1  # ComfyUI's page is JavaScript, which rounds larger whole numbers

Inputs = dict[str, tuple[Any, dict[str, Any]]]


def model() -> Inputs:
    """Returns the input for a loaded checkpoint."""
    return {"model": (MODEL, {"tooltip": "The checkpoint, from Load Lumina-mGPT Checkpoint."})}


def text(name: str, default: str, tooltip: str) -> Inputs:
    """Returns an input for text of several lines."""
    return {name: ("STRING", {"default": default, "multiline": True, "tooltip": tooltip})}


def whole(default: int, low: int, high: int, tooltip: str, step: int = 1, **more: Any) -> tuple[str, dict[str, Any]]:
    """Returns the description of an input for a whole number in `low` ... `high`."""
    return ("INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip, **more})


def seed() -> Inputs:
    """Returns the input for a seed."""
    tooltip = "The same seed and inputs give the picture that the command line makes."
    return {"seed": whole(0, 0, _LARGEST_SEED, tooltip, control_after_generate=True)}


def size() -> Inputs:
    """Returns the inputs for the size of an image."""
    rule = f"in pixels, a multiple of {GRID_UNIT}"
    return {
        "width": whole(0, 0, _LONGEST, f"Width {rule}. 0: the checkpoint's own size.", GRID_UNIT),
        "height": whole(
            0, 0, _LONGEST, f"Height {rule}, of all panels together. 0: the checkpoint's own size.", GRID_UNIT
        ),
    }


def sampling(cfg: float = 4.0) -> Inputs:
    """Returns the inputs for sampling image codes, speculative sampling included, and for previews.

    Args:
        cfg: default of the guidance scale; -1 is that of the task.
    """
    tooltip = "Guidance scale. 1: no guidance, half of the work. -1: the default of the task."
    number = {"step": 0.1, "round": 0.001}
    fast = "Several codes a step. noise: the same picture as off. maximal, independent: another one."
    return {
        **seed(),
        "cfg": ("FLOAT", {"default": cfg, "min": -1.0, "max": 1000.0, "tooltip": tooltip, **number}),
        "temperature": (
            "FLOAT",
            {"default": 1.0, "min": 0.01, "max": 100.0, "tooltip": "Lower values prefer probable codes.", **number},
        ),
        "top_k": whole(0, 0, 1 << 20, "Sample from this many most probable codes. 0: the checkpoint's default."),
        "speculative": ([PLAIN, *COUPLINGS], {"default": PLAIN, "tooltip": fast}),
        "window": whole(0, 0, 1024, "Drafts that one step verifies. 0: chosen for the device. Only if speculative."),
        "preview": ("BOOLEAN", {"default": True, "tooltip": "Show the rows that are sampled so far, once a second."}),
    }


def request_settings(
    width: int, height: int, seed: int, cfg: float, temperature: float, top_k: int, speculative: str, window: int
) -> dict[str, Any]:
    """Returns arguments of `GenerationRequest.of`. Defaults of the checkpoint and the task are left out.

    Args:
        width, height: pixels; 0 for the checkpoint's own size.
        cfg: guidance scale; below 0 for the task's default.
        top_k: 0 for the checkpoint's default.
        speculative: PLAIN or a coupling.
        window: 0 for the device's default.

    Raises:
        InputError: a value is out of range.
    """
    settings: dict[str, Any] = {"width": width or None, "height": height or None}
    settings |= {"seed": seed, "temperature": temperature}
    settings |= {} if cfg < 0 else {"cfg": cfg, "guide_again": False}  # the input always has a value
    settings |= {"top_k": top_k} if top_k else {}
    if speculative != PLAIN:
        settings["speculation"] = Speculation(coupling=speculative, window=window or None)
    elif window:
        raise InputError(f"has no effect with speculative={PLAIN}, got {window}; set it to 0", "window")
    return settings


def check_size(**sides: int | None) -> bool | str:
    """Returns True, or what is wrong with a width or height; None: it comes from another node.

    ComfyUI checks minimum and maximum of an input unless the node checks that input. It never checks the step.
    """
    for name, side in sides.items():
        if side is None:
            continue
        if not 0 <= side <= _LONGEST or side % GRID_UNIT:
            return (
                f"{name} must be a multiple of {GRID_UNIT} in 0 ... {_LONGEST}, got {side}; 0 is the checkpoint's size"
            )
    return True
