"""Trains the demo's text tokenizer: a small byte-level BPE with the special names of the released one."""

import json
from collections.abc import Sequence
from pathlib import Path

from emoji import CELL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lumina_mgpt.prompts import I2I_TASKS, TASKS
from lumina_mgpt.vocabulary import END_OF_TEXT, special_names

VOCABULARY = 1024  # text pieces and special names; image codes have the ids after them
_MIN_FREQUENCY = 2
# Added to the training text. Must not change: other text gives another vocabulary than the published one.
_MORE_TEXT = (
    "make the background {c}",
    "replace the {a} with {b}",
    "remove the {a}",
    "add {b}",
    "no edit",
    "segmentation map",
    "normal map",
    "Edit the image according to the following instruction:\n",
    "swap the two objects",
)


def write_tokenizer(folder: Path, captions: Sequence[str]) -> None:
    """Trains on captions in the instructions of all tasks, and writes a tokenizer in the released layout."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = special_names()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(names),
        min_frequency=_MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sizes = ((CELL, CELL), (2 * CELL, CELL), (CELL, 2 * CELL), (2 * CELL, 2 * CELL))
    tasks = [*TASKS.values(), *I2I_TASKS.values()]
    corpus = [
        tasks[i % len(tasks)].instruction(text, *sizes[i % len(sizes)]) + "\n" + _MORE_TEXT[i % len(_MORE_TEXT)]
        for i, text in enumerate(captions)
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    # After training, so that no merge produces a control id.
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    assert tokenizer.get_vocab_size() <= VOCABULARY, tokenizer.get_vocab_size()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "bos_token": None, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks) + "\n")
