"""Makes the images of a public benchmark, in the layout that its scorer reads.

    lumina-mgpt benchmark geneval --prompts evaluation_metadata.jsonl --save_path geneval -n 4
    lumina-mgpt benchmark dpg --prompts dpg_bench/prompts --save_path dpg
    lumina-mgpt benchmark compbench --prompts color_val.txt --save_path compbench_color
    lumina-mgpt benchmark parti --prompts PartiPrompts.tsv --save_path parti

The same command continues after a stop: images that are done are not made again. `manifest.json` in the output folder
holds what the images depend on. Under `accelerate launch` or torchrun, the processes share the images.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lumina_mgpt import __version__, cli, launcher
from lumina_mgpt.benchmarks import BENCHMARKS
from lumina_mgpt.benchmarks.folder import BenchmarkFolder
from lumina_mgpt.benchmarks.lists import Item, read_list
from lumina_mgpt.benchmarks.manifest import hashes, keep_manifest, package_versions
from lumina_mgpt.benchmarks.rewrites import rewritten_once, tried
from lumina_mgpt.checks import excerpt
from lumina_mgpt.cli import best_of, generate, rewrite
from lumina_mgpt.console import stops_delayed
from lumina_mgpt.errors import InputError
from lumina_mgpt.request import GenerationRequest, ImageJob, image_count

if TYPE_CHECKING:
    import torch

    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import Checkpoint, PreparedRequest
    from lumina_mgpt.results import RowsDone
    from lumina_mgpt.rewriting import Rewriter


@dataclass(frozen=True)
class BenchmarkRun:
    """One run of the command.

    Attributes:
        jobs: the images of this process, those that are done included.
        originals: the prompts of the list, if those of `prepared` were rewritten.
        text: settings for the text of the saved images.
    """

    folder: BenchmarkFolder
    prepared: "PreparedRequest"
    jobs: list[ImageJob]
    best: best_of.BestOf | None
    originals: tuple[str, ...]
    text: dict[str, object]

    def item(self, job: ImageJob) -> Item:
        return self.folder.items[job.prompt_index]


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        cli.ALIASES | {"prompts": "--prompts"},
        prog="lumina-mgpt benchmark",
        description="Makes the images of a public benchmark, in the layout that its scorer reads. The same command "
        "continues after a stop.",
    )
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), help="docs/benchmarks.md says how to score each")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts",
        required=True,
        metavar="LIST",
        help="the official list: a file, or for dpg a folder; docs/benchmarks.md says where they are",
    )
    defaults = ", ".join(f"{benchmark.images} for {name}" for name, benchmark in BENCHMARKS.items())
    group.add_argument("-n", type=cli.whole, help=f"images of each prompt (default: {defaults})")
    rewrite.add_rewrite(parser)
    group = parser.add_argument_group("size and batches")
    generate.add_size_options(group)
    cli.add_batch_size(group)
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser, fast=False)
    best_of.add_best_of(parser, keep=False)
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", required=True, help="folder for the images: new, or of the run to continue")
    cli.add_checkpoint_options(parser)
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights, then makes the images that are not done."""
    cli.quant_group(args)
    layout = BENCHMARKS[args.benchmark]
    prompts = read_list(args.prompts, layout.read)
    images = layout.images if args.n is None else image_count("n", args.n)
    share, speculation = launcher.image_share(), cli.speculation_settings(args)
    rewriter, best = rewrite.read_rewriter(args), best_of.read_best_of(args)

    from lumina_mgpt.devices import own_device  # imports torch, which takes seconds
    from lumina_mgpt.scoring import check_scorer

    device = own_device(args.device)
    checkpoint = cli.open_checkpoint(args)
    request = GenerationRequest(
        tuple(item.prompt for item in prompts.items),
        args.width,
        args.height,
        n=images,
        sampling=cli.sampling_settings(args),
        unset=cli.unset_sampling(args),
        speculation=speculation,
        task=checkpoint.config.family.task("t2i"),
        batch_size=args.batch_size,
        share=share,
    )
    prepared = checkpoint.prepare(request)
    checkpoint.require_decoder()
    if layout.square and len(set(prepared.layout.size)) > 1:
        width, height = prepared.layout.size
        raise InputError(f"must equal the height for {layout.title}, got {width} x {height}; leave both out", "width")
    if best:
        check_scorer(best.scorer, request.prompts[0])
    folder = BenchmarkFolder(args.save_path, layout, prompts.items, images)
    if rewriter:
        rewriter = tried(folder, request.prompts[0], _fitting(rewriter, checkpoint, request))
    folder.open()
    settings = settings_of(args, prepared, checkpoint, device, best) | {
        "list": {"sha256": prompts.sha256, "prompts": len(prompts.items)},
        "checkpoint": _file_hashes(checkpoint, shown=share[0] == 0),
    }
    keep_manifest(folder, settings, _run_of(args, device, share[1]), write=share[0] == 0)
    folder.write_texts()
    originals: tuple[str, ...] = ()
    if rewriter:
        originals = tuple(request.prompts)
        request = replace(request, prompts=_rewritten(folder, originals, rewriter, shown=share[0] == 0))
        prepared = checkpoint.prepare(request, "rewrite")
        best = replace(best, prompts=originals) if best else None
    run = BenchmarkRun(folder, prepared, request.jobs, best, originals, {"benchmark": layout.title})
    _make(args, run, checkpoint, device)


def _fitting(rewriter: "Rewriter", checkpoint: "Checkpoint", request: GenerationRequest) -> "Rewriter":
    """Returns a rewriter that refuses an expanded prompt that the model cannot take, before it is kept in a file."""

    def expand(prompt: str) -> str:
        expanded = rewriter(prompt)
        try:
            checkpoint.prepare(replace(request, prompts=(expanded,)))
        except InputError as error:
            rule = f"gives {excerpt(expanded)} for {excerpt(prompt)}, which cannot be drawn"
            raise InputError(f"{rule} ({error}); correct it, or leave rewriting out", "rewrite") from None
        return expanded

    return expand


def _rewritten(folder: BenchmarkFolder, prompts: tuple[str, ...], rewriter: "Rewriter", shown: bool) -> tuple[str, ...]:
    """Returns the expanded prompts. A bar shows the progress if it takes long."""
    from tqdm import tqdm

    with tqdm(
        total=len(set(prompts)),
        desc="rewriting prompts",
        unit=" prompts",
        delay=2,
        disable=not shown,
        mininterval=cli.bar_interval(),
    ) as bar:
        return rewritten_once(folder, prompts, rewriter, bar.update)


def settings_of(
    args: argparse.Namespace,
    prepared: "PreparedRequest",
    checkpoint: "Checkpoint",
    device: "torch.device",
    best: best_of.BestOf | None,
) -> dict[str, object]:
    """Returns the settings that the images depend on, as JSON values, without hashes of files."""
    from lumina_mgpt.devices import default_window, resolve_dtype

    config, request = checkpoint.config, prepared.request
    group = cli.quant_group(args, config.int4_group) or config.int4_group
    dtype = resolve_dtype(args.dtype, device, config, group)
    sampling = asdict(request.sampling) | {"top_k": min(request.sampling.top_k, config.num_image_codes)}
    drafts: dict[str, object] = {}
    if request.speculation:
        window = request.speculation.window or default_window(device, bool(group))
        drafts = {"coupling": request.speculation.coupling, "window": window}
    width, height = prepared.layout.size
    return {
        "benchmark": args.benchmark,
        "images_a_prompt": request.n,
        "width": width,
        "height": height,
        **{name: value for name, value in sampling.items() if not name.startswith("text_")},
        **drafts,
        **(best.described(config.family) if best else {}),
        **rewrite.described(args),
        "dtype": str(dtype).removeprefix("torch."),
        "quant_group": group,
        **{name: getattr(args, name) for name in ("cache_dtype", "movqgan_dtype", "attn", "compile")},
    }


def _run_of(args: argparse.Namespace, device: "torch.device", processes: int) -> dict[str, object]:
    """Returns what the manifest records of a run besides its settings."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = package_versions() | {"lumina_mgpt": __version__}
    places = {"model_path": args.model_path, "prompts": args.prompts}
    return {"versions": versions, "device": name, "processes": processes, "batch_size": args.batch_size} | places


def _file_hashes(checkpoint: "Checkpoint", shown: bool) -> dict[str, str]:
    """Returns the SHA-256 of the files of a checkpoint. A bar shows the progress, as 16 GB take a minute."""
    from tqdm import tqdm

    from lumina_mgpt.model.weight_files import find_weights

    files = {checkpoint.folder / "config.json", *find_weights(checkpoint.folder)}
    files |= {path for path in checkpoint.folder.glob("*token*.json")}
    files |= {checkpoint.movqgan_path} if checkpoint.movqgan_path else set()
    total = sum(path.stat().st_size for path in files)
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="checksums of the checkpoint",
        delay=2,
        disable=not shown,
        mininterval=cli.bar_interval(),
    ) as bar:
        return hashes(files, bar.update)


def _make(args: argparse.Namespace, run: BenchmarkRun, checkpoint: "Checkpoint", device: "torch.device") -> None:
    """Makes the images that are not done. Each is saved when it is finished."""
    folder, (rank, processes) = run.folder, run.prepared.request.share
    for item in folder.items[rank::processes]:
        folder.finish(item)  # a tile that a killed process did not write
    pending = [job for job in run.jobs if not folder.is_done(run.item(job), job.repeat)]
    if rank == 0:
        total = len(folder.items) * folder.images
        here = "" if processes == 1 else f"; process 0 of {processes} makes {len(run.jobs)}"
        done = len(run.jobs) - len(pending)
        print(f"{run.text['benchmark']}: {len(folder.items)} prompts, {total} images{here}, {done} are done already")
    if pending:
        text = run.best.text(checkpoint.config.family) if run.best else None
        pipeline = cli.load_pipeline(args, checkpoint, device, text=text)
        _sample(pipeline, run, pending, args)
    folder.close()
    if rank == 0:
        print(f"the images of {'this process' if processes > 1 else 'all prompts'} are in {folder.path}")


def _sample(pipeline: "Pipeline", run: BenchmarkRun, pending: Sequence[ImageJob], args: argparse.Namespace) -> None:
    folder, layout, saved = run.folder, run.prepared.layout, 0
    described = run.text | generate.describe(pipeline, run.prepared, generate.loading_text(args))
    described |= rewrite.described(args)
    described |= run.best.described(pipeline.checkpoint.config.family) if run.best else {}
    drawn = len(pending) * (run.best.count if run.best else 1)
    bar = cli.codes_bar(len(pending), drawn * layout.num_codes, shown=run.prepared.request.share[0] == 0)

    def on_row(done: "RowsDone") -> None:
        bar.update(len(done.jobs) * layout.cols)

    try:
        for chosen in best_of.chosen_images(pipeline, run.prepared, run.best, on_row, pending):
            job = chosen.result.job
            text: dict[str, object] = {"prompt": job.prompt, "repeat": job.repeat}
            text |= rewrite.original(run.originals, job.prompt_index) | described | chosen.text
            with stops_delayed():  # else an image could be saved and not counted
                folder.save_image(run.item(job), job.repeat, chosen.result.image, text)
                saved += 1
    except KeyboardInterrupt:
        progress = f"{len(run.jobs) - len(pending) + saved} of {len(run.jobs)} images are in {folder.path}"
        raise KeyboardInterrupt(f"{progress}; the same command continues") from None
    finally:
        bar.close()


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(benchmark, build_parser(), argv, stopped="the same command continues")
