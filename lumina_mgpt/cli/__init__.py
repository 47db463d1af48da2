"""The commands, one module each, and the options, parser and progress bars that they share.

No module of this package imports torch before a command runs.
"""

from lumina_mgpt.cli.options import (
    ALIASES,
    DEMO,
    add_batch_size,
    add_checkpoint_options,
    add_max_new_tokens,
    add_output_options,
    add_sampling_options,
    add_speculation_options,
    add_target_size,
    add_tensor_parallel,
    add_text_sampling,
    answer_limit,
    checkpoint_path,
    given_sampling,
    load_pipeline,
    model_processes,
    open_checkpoint,
    quant_group,
    refuse_tensor_parallel,
    sampling_settings,
    speculation_settings,
    unset_sampling,
    warn_without_text,
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
    "add_max_new_tokens",
    "add_output_options",
    "add_sampling_options",
    "add_speculation_options",
    "add_target_size",
    "add_text_sampling",
    "add_tensor_parallel",
    "answer_limit",
    "bar_interval",
    "checkpoint_path",
    "codes_bar",
    "given_sampling",
    "load_pipeline",
    "model_processes",
    "number",
    "open_checkpoint",
    "quant_group",
    "refuse_tensor_parallel",
    "run",
    "sampling_settings",
    "speculation_settings",
    "unset_sampling",
    "warn_without_text",
    "whole",
]
