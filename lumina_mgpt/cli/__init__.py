"""The commands, one module each, and the options, parser and progress bars that they share.

No module of this package imports torch before a command runs.
"""

from lumina_mgpt.cli.options import (
    ALIASES,
    DEMO,
    add_batch_size,
    add_checkpoint_options,
    add_output_options,
    add_sampling_options,
    add_speculation_options,
    add_target_size,
    add_text_sampling,
    checkpoint_path,
    load_pipeline,
    open_checkpoint,
    quant_group,
    sampling_settings,
    speculation_settings,
    unset_sampling,
)
from lumina_mgpt.cli.parser import Parser, number, whole
from lumina_mgpt.cli.progress import ReadingBar, bar_interval, codes_bar
from lumina_mgpt.cli.runner import REFUSED, run

__all__ = [
    "ALIASES",
    "DEMO",
    "Parser",
    "REFUSED",
    "ReadingBar",
    "add_batch_size",
    "add_checkpoint_options",
    "add_output_options",
    "add_sampling_options",
    "add_speculation_options",
    "add_target_size",
    "add_text_sampling",
    "bar_interval",
    "checkpoint_path",
    "codes_bar",
    "load_pipeline",
    "number",
    "open_checkpoint",
    "quant_group",
    "run",
    "sampling_settings",
    "speculation_settings",
    "unset_sampling",
    "whole",
]
