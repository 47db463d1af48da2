"""Shared fixtures: the oracle files, and weights made by the oracle's formula."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ORACLE, ORACLE_V1 = (Path(__file__).parent / name for name in ("oracle", "oracle_v1"))
# One thread here and in every process that a test starts: the order of float32 sums is the same everywhere, and more
# threads than cores make small products 20 times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def _oracle_weights(folder: Path = ORACLE):
    spec = importlib.util.spec_from_file_location("oracle_weights", folder / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Restores the environment: a training sets variables of the process, which later tests would inherit."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def always_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a compiled model are compiled, whether that is faster or not."""
    monkeypatch.setattr("lumina_mgpt.model.compiled._timed", lambda eager, compiled: (compiled(), 1.0, 0.5))


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    return ORACLE


@pytest.fixture(scope="session")
def oracle_checkpoint(tmp_path_factory):
    """variant name -> checkpoint folder in the released layout, written once a session."""
    folders: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in folders:
            folders[variant] = _oracle_weights().write_checkpoint(tmp_path_factory.mktemp(variant), variant)
        return folders[variant]

    return get


@pytest.fixture(scope="session")
def oracle_v1_dir() -> Path:
    """Files that the released code of the first generation gives on small weights."""
    return ORACLE_V1


@pytest.fixture(scope="session")
def oracle_v1_checkpoint(tmp_path_factory):
    """Name -> checkpoint folder of the first generation, written once a session.

    A name is a variant ("mha128", "swin128") or the script of the tiny model ("image", "text", "mixed", "images"). The
    folders of the tiny model hold its image tokenizer.
    """
    folders: dict[str, Path] = {}
    weights = _oracle_weights(ORACLE_V1)

    def get(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name) / "checkpoint"
            if name in weights.SCRIPTS:
                weights.write_tiny(folder, name)
                weights.write_vqgan(folder / "vqgan.safetensors", "vqgan_tiny")
            else:
                weights.write_checkpoint(folder, name)
            folders[name] = folder
        return folders[name]

    return get


@pytest.fixture(scope="session")
def oracle_movqgan(tmp_path_factory) -> Path:
    return _oracle_weights().write_movqgan(tmp_path_factory.mktemp("movqgan") / "movqgan_270M.ckpt")


TINY_SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    image_code_offset=512,
    num_image_codes=64,
    vocab_size=512 + 64,
    base_size=64,
)
TINY_NAMES = ("hedgehog", "slice of pizza", "snowman", "red apple", "cat")
TINY_EXAMPLES = {
    "edit": ["make the background red"],
    "subject": ["the same on a pink background"],
    "chat": ["Draw this:\na cat"],
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A complete demo-like checkpoint: random weights of two layers, 64 image codes, a byte-level BPE, a VQGAN.

    Made without this project's code, in the released layout, from fixed weights; base size 64, at most 2,048 ids.
    """
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    folder.mkdir()
    _write_tiny_model(folder)
    _write_tiny_tokenizer(folder)
    _oracle_weights().write_movqgan(folder / "movqgan_270M.ckpt", blocks=1, codes=TINY_SIZES["num_image_codes"])
    (folder / "names.txt").write_text("\n".join(TINY_NAMES) + "\n")
    (folder / "prompts.txt").write_text("".join(f"a {name} on a white background\n" for name in TINY_NAMES))
    (folder / "examples.json").write_text(json.dumps(TINY_EXAMPLES))
    return folder


def _write_tiny_model(folder: Path) -> None:
    oracle, size = _oracle_weights(), TINY_SIZES
    D, V, inner = size["hidden_size"], size["vocab_size"], size["intermediate_size"]
    H = D // size["num_attention_heads"]
    K = size["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for layer in range(size["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{x}_proj.weight": (D, D) for x in "qo"}
        shapes |= {prefix + f"self_attn.{x}_proj.weight": (K * H, D) for x in "kv"}
        shapes |= {prefix + f"self_attn.{x}_norm.{y}": (1, H) for x in "qk" for y in ("weight", "bias")}
        shapes |= {prefix + f"mlp.{x}_proj.weight": (inner, D) for x in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (D, inner)}
        shapes |= {prefix + f"{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    tensors = {
        name: torch.from_numpy(oracle.fill(name, shape, *oracle.language_rule(name, shape)))
        for name, shape in shapes.items()
    }
    tensors["lm_head.weight"] *= 0.4  # flatter distributions than the oracle's, so that noise matters with guidance too
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = dict(model_type="chameleon", rms_norm_eps=1e-5, rope_theta=10000.0, model_parallel_size=1) | size
    (folder / "config.json").write_text(json.dumps(config))


def _write_tiny_tokenizer(folder: Path) -> None:
    corpus = ["Generate an image of 64x64 according to the following prompt:\na hedgehog on a sky blue background"] * 2
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    names = ["<|endoftext|>", "<racm3:break>", "<eoss>", "<|image|>", "<reserved08706>"]
    names += [f"<reserved{number:05d}>" for number in range(8796, 8800 + 64 + 1)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    assert tokenizer.get_vocab_size() <= TINY_SIZES["image_code_offset"]
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tokens(tiny_checkpoint, tmp_path_factory) -> Path:
    """A data YAML over 24 short sequences of two sizes."""
    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.data.shards import Sequence, write_shard
    from lumina_mgpt.unirep import encode_conversation
    from lumina_mgpt.vocabulary import Vocabulary

    folder = tmp_path_factory.mktemp("tokens")
    vocabulary = Vocabulary.from_folder(tiny_checkpoint, ModelConfig.from_json(tiny_checkpoint / "config.json"))
    random = torch.Generator().manual_seed(0)
    sequences = []
    for n in range(24):
        codes = torch.randint(0, 64, (4, 4 * (1 + n % 2)), generator=random)
        ids, labels = encode_conversation([("human", [f"a cat {n}"]), ("assistant", [codes])], vocabulary)
        sequences.append(Sequence(n, torch.tensor(ids), torch.tensor(labels)))
    rows = write_shard(folder / "a.safetensors", sequences, []).rows("a.safetensors")
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.yaml").write_text(f"META:\n  - path: {folder / 'records.jsonl'}\n    type: default\n")
    return folder / "data.yaml"


@pytest.fixture(scope="session")
def vocabulary(tiny_checkpoint):
    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.vocabulary import Vocabulary

    return Vocabulary.from_folder(tiny_checkpoint, ModelConfig.from_json(tiny_checkpoint / "config.json"))


@pytest.fixture(scope="session")
def tools(tiny_checkpoint, vocabulary):
    """Vocabulary and image tokenizer of the tiny checkpoint, for PreTokenizer."""
    from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

    return vocabulary, ImageTokenizer.from_checkpoint(tiny_checkpoint / "movqgan_270M.ckpt")


@pytest.fixture
def settings(tokens, tiny_checkpoint, tmp_path):
    """A training of eight steps from the tiny checkpoint, with dropout, in float32."""
    from lumina_mgpt.training.options import TrainingConfig

    return TrainingConfig.of(
        data_config=str(tokens),
        output_dir=str(tmp_path / "run"),
        init_from=str(tiny_checkpoint),
        batch_size=4,
        max_steps=8,
        lr=1e-3,
        warmup=0.2,
        precision="fp32",
        dropout=0.1,
        save_iteration_interval=0,
    )
