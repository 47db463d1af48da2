"""Compares steps of 7B layers in int4 with those of llama.cpp. Prints a table and one line of JSON.

python scripts/benchmarks/bench_llama.py --work DIR

Both sides run layers of the 7B's shapes with random weights, on the same CPU threads: a sequence with cached ids, and
1, 2 and 32 new ones. All matrices have the same shapes. llama.cpp's model has no norms of queries and keys, which its
Llama lacks. The two sides run in turn, and each repeat gives one ratio.

Needs llama-cpp-python and gguf. llama-cpp-python is built from source, and its speed depends on the build:

CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python gguf
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import add_sizes, add_threads, print_header, print_row, set_threads
from large_models import SEVEN_B, fill_cache, random_model

from lumina_mgpt import cli
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError, package_error
from lumina_mgpt.io import replacing
from lumina_mgpt.measure import seconds
from lumina_mgpt.model.kv_cache import KVCache

FORMATS = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
SIZES = {
    "layers": (4, "number of layers"),
    "cached": (1024, "ids in the cache before the new ones"),
    "repeats": (5, "ratios of each row"),
    "width": (4096, "width of the model"),
    "inner": (11008, "width of its MLP"),
    "heads": (32, "number of heads"),
}
_VOCABULARY = 512  # ids; so few that the output projection takes no time
_BATCH = 512  # ids of one call of llama.cpp that fills the cache
_ERROR = 4  # llama.cpp's log level of errors

Step = Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    return cli.run(bench, build_parser(), argv)


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="scripts/benchmarks/bench_llama.py", description=__doc__.split("\n")[0])
    add_threads(parser)
    parser.add_argument("--work", type=Path, required=True, help="folder for llama.cpp's models (2.6 GB, kept)")
    parser.add_argument("--tokens", type=cli.whole, nargs="+", default=[1, 2, 32], help="new ids of a step")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS), help="of llama.cpp")
    add_sizes(parser, SIZES)
    return parser


@torch.no_grad()
def bench(args: argparse.Namespace) -> None:
    for name in SIZES:
        if not 1 <= getattr(args, name) <= 1 << 16:
            raise InputError(f"must be in 1 ... 65536, got {getattr(args, name)}; try {SIZES[name][0]}", name)
    if bad := [count for count in args.tokens if not 1 <= count <= _BATCH]:
        raise InputError(f"must be in 1 ... {_BATCH}, got {bad[0]}; try 1 2 32", "tokens")
    set_threads(args.threads)
    llama, gguf = packages()
    config = replace(
        ModelConfig.from_yaml(SEVEN_B),
        **{"vocab_size": _VOCABULARY, "num_image_codes": 256, "image_code_offset": 256},
        **{"hidden_size": args.width, "intermediate_size": args.inner, "num_hidden_layers": args.layers},
        **{"num_attention_heads": args.heads, "num_key_value_heads": args.heads},
    )
    library = Library(llama)
    files = write_models(library, gguf, config, args.work, args.formats)
    theirs = {name: library.steps(file, args) for name, file in files.items()}
    ours = own_steps(config, args)
    print(f"{args.layers} layers, {args.cached} cached ids, {args.threads} threads; {library.build}\n")
    rows = compare(ours, theirs, args.repeats)
    versions = {"llama_cpp_python": llama.__version__, "build": library.build}
    print(json.dumps({"bench": "llama", "threads": args.threads, **versions, "rows": rows}))


def packages() -> tuple[Any, Any]:
    """Returns the modules `llama_cpp` and `gguf`.

    Raises:
        InputError: one of them is not installed, or its import fails.
    """
    try:
        import gguf
    except ImportError as error:
        raise package_error(error, "this comparison", "gguf") from None
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its library is missing or cannot be loaded
        raise package_error(error, "this comparison", "llama-cpp-python", ("llama_cpp",)) from None
    return llama_cpp, gguf


def compare(ours: dict[int, Step], theirs: dict[str, dict[int, Step]], repeats: int) -> list[dict]:
    """Times both sides in turn, prints a row for each number of ids and format, and returns the rows.

    Args:
        ours: number of new ids -> step of this package.
        theirs: format -> number of new ids -> step of llama.cpp.
    """
    print_header("new ids", "format", "llama.cpp, ms", "int4, ms", "times as fast", "least", "most")
    rows = []
    for count, step in ours.items():
        own: list[float] = []
        other: dict[str, list[float]] = {name: [] for name in theirs}
        for _ in range(repeats):
            own.append(seconds(step))
            for name, steps in theirs.items():
                other[name].append(seconds(steps[count]))
        for name, taken in other.items():
            ratios = [their / our for their, our in zip(taken, own, strict=True)]
            row = {"tokens": count, "format": name, "seconds": median(own), "their_seconds": median(taken)}
            row |= {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}
            times = f"{1000 * row['their_seconds']:.1f}", f"{1000 * row['seconds']:.1f}"
            print_row(count, name, *times, *(f"{row[key]:.2f}" for key in ("ratio", "least", "most")))
            rows.append(row)
    return rows


def own_steps(config: ModelConfig, args: argparse.Namespace) -> dict[int, Step]:
    """Returns a step of this package in int4 with a bf16 cache for each number of new ids."""
    model = random_model(config, torch.bfloat16, 128)
    store = KVCache(config, 1, args.cached + max(args.tokens), torch.bfloat16, "cpu")
    fill_cache(store)

    def step(count: int) -> None:
        ids, end = torch.ones(1, count, dtype=torch.long), args.cached + count
        hidden = model(ids, positions=torch.arange(args.cached, end)[None], cache=store, filled=end)
        model.project(hidden[:, -1:], None)

    return {count: partial(step, count) for count in args.tokens}


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


class Library:
    """llama.cpp, called through llama-cpp-python. It logs nothing; errors of its log are in the errors raised here.

    Attributes:
        build: what the library was built with, in its own words.
    """

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self._errors: list[str] = []

        @llama.llama_log_callback
        def log(level: int, text: bytes, data: object) -> None:
            if level == _ERROR:
                self._errors.append(text.decode(errors="replace").strip())

        self._log = log  # the library keeps only its address
        llama.llama_log_set(log, None)
        llama.llama_backend_init()
        self.build = llama.llama_print_system_info().decode().strip(" |")

    def quantize(self, source: Path, target: Path, name: str) -> None:
        """Writes the model `source` in a format of FORMATS to `target`.

        Raises:
            InputError: llama.cpp refuses the model, or cannot write the file.
        """
        options = self._llama.llama_model_quantize_default_params()
        options.ftype, options.nthread = getattr(self._llama, FORMATS[name]), torch.get_num_threads()
        status = self._llama.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(options))
        if status != 0:
            raise self._error(f"cannot write {target}")

    def steps(self, file: Path, args: argparse.Namespace) -> dict[int, Step]:
        """Loads a model, fills its cache, and returns a step for each number of new ids.

        Raises:
            InputError: llama.cpp cannot load or run the model.
        """
        llama, options = self._llama, self._llama.llama_model_default_params()
        if hasattr(options, "use_mmap"):  # a mapped file keeps its layout; only a copy is reordered for the processor
            options.use_mmap = False
        else:
            options.load_mode = llama.LLAMA_LOAD_MODE_NONE
        model = llama.llama_model_load_from_file(bytes(file), options)
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = args.cached + _BATCH, _BATCH, _BATCH
        settings.n_threads = settings.n_threads_batch = args.threads
        context = model and llama.llama_init_from_model(model, settings)
        if not context:
            raise self._error(f"cannot load {file}")
        memory = llama.llama_get_memory(context)

        def decode(batch: Any) -> None:
            if llama.llama_decode(context, batch) != 0:
                raise self._error(f"cannot run {file}")

        def step(batch: Any) -> None:
            decode(batch)
            llama.llama_memory_seq_rm(memory, 0, args.cached, -1)

        for first in range(0, args.cached, _BATCH):
            decode(self._batch(first, min(_BATCH, args.cached - first)))
        return {count: partial(step, self._batch(args.cached, count)) for count in args.tokens}

    def _batch(self, first: int, count: int) -> Any:
        """Returns a batch of `count` ids of sequence 0 from position `first` on, with logits of the last one."""
        batch = self._llama.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for index in range(count):
            batch.token[index] = (first + index) % _VOCABULARY
            batch.pos[index] = first + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index == count - 1
        return batch

    def _error(self, what: str) -> InputError:
        reason = self._errors[-1] if self._errors else "it gives no reason"
        return InputError(f"llama.cpp {what}: {reason}; delete the file, or build llama-cpp-python with other flags")


def write_models(library: Library, gguf: Any, config: ModelConfig, work: Path, formats: list[str]) -> dict[str, Path]:
    """Writes the random model in each format, unless the folder has it from an earlier run. Returns the files."""
    work.mkdir(parents=True, exist_ok=True)
    sizes = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads
    stem = "llama-" + "x".join(map(str, sizes))
    source, files = work / f"{stem}-f16.gguf", {name: work / f"{stem}-{name}.gguf" for name in formats}
    for name, file in files.items():
        if file.exists():
            continue
        if not source.exists():
            with replacing(source) as part:
                write_gguf(gguf, config, Path(part.name))
        with replacing(file) as part:
            library.quantize(source, Path(part.name), name)
    return files


def write_gguf(gguf: Any, config: ModelConfig, file: Path) -> None:
    """Writes a Llama of these sizes with random weights in half precision, and a vocabulary without texts.

    Matrices of one shape have equal numbers. Weights have a standard deviation of 0.02, norms are 1.
    """
    import numpy as np

    writer, generator = gguf.GGUFWriter(file, "llama"), np.random.default_rng(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    @cache
    def matrix(shape: tuple[int, ...]) -> Any:
        return (0.02 * generator.standard_normal(shape, dtype=np.float32)).astype(np.float16)

    for name, shape in tensor_shapes(config):
        writer.add_tensor(name, np.ones(shape, np.float32) if len(shape) == 1 else matrix(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of each tensor of a Llama in GGUF: those of this package, without norms of heads.

    Source: gguf's `MODEL_TENSORS[MODEL_ARCH.LLAMA]`.
    """
    D, inner = config.hidden_size, config.intermediate_size
    N, K = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    yield from (("token_embd.weight", (config.vocab_size, D)), ("output.weight", (config.vocab_size, D)))
    yield "output_norm.weight", (D,)
    sizes = {"attn_norm": (D,), "attn_q": (N, D), "attn_k": (K, D), "attn_v": (K, D), "attn_output": (D, N)}
    sizes |= {"ffn_norm": (D,), "ffn_gate": (inner, D), "ffn_up": (inner, D), "ffn_down": (D, inner)}
    for layer in range(config.num_hidden_layers):
        yield from ((f"blk.{layer}.{name}.weight", shape) for name, shape in sizes.items())


if __name__ == "__main__":
    sys.exit(main())
