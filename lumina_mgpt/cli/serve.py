"""Serves a checkpoint over HTTP, with a page at `/` and OpenAI's API for images and chat.

    lumina-mgpt serve --open
    lumina-mgpt serve --model_path Alpha-VLLM/Lumina-mGPT-2.0 --host 0.0.0.0 --api_key KEY

The first signal (Ctrl-C) refuses the requests that wait and finishes those that run.
"""

import argparse
import functools
import ipaddress
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_mgpt import cli
from lumina_mgpt.checks import whole_number
from lumina_mgpt.errors import InputError, package_error

if TYPE_CHECKING:
    from lumina_mgpt.server.app import Page
    from lumina_mgpt.server.limits import Limits

KEY_VARIABLE = "LUMINA_MGPT_API_KEY"
_MODULES = ("fastapi", "uvicorn", "multipart", "python_multipart", "prometheus_client", "starlette", "pydantic")
_MIB = 2**20


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="lumina-mgpt serve",
        description="Serves a checkpoint over HTTP, with OpenAI's API for images and chat.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all networks")
    group.add_argument("--port", type=cli.whole, default=8000, help="port to listen on; 0: a free one")
    group.add_argument("--open", action="store_true", help="open the server in a browser")
    group.add_argument(
        "--api_key", help=f"key that clients must send (default: the variable {KEY_VARIABLE}; without it, no key)"
    )
    group.add_argument("--model_name", help="name of the model in the API (default: last part of --model_path)")
    group.add_argument("--no_page", action="store_true", help="serve the API alone, without the page at /")
    group.add_argument("--text", action="store_true", help="load what the model needs to write text, for chat")
    group = parser.add_argument_group("batches and limits")
    group.add_argument(
        "--batch_size", type=cli.whole, help="images sampled together (default: as many as fit 1 GiB, at most 16)"
    )
    group.add_argument("--max_queue", type=cli.whole, default=256, help="images that wait; more are refused")
    group.add_argument("--max_n", type=cli.whole, default=10, help="images of one request")
    group.add_argument("--max_prompt", type=cli.whole, default=8000, help="characters of a prompt")
    group.add_argument("--max_pixels", type=cli.whole, default=4096 * 4096, help="pixels of a picture")
    group.add_argument("--max_body", type=cli.whole, default=20, help="MiB of a request")
    cli.add_checkpoint_options(parser)
    cli.add_target_size(parser)
    return parser


def serve(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights, then loads the weights and serves until a signal."""
    cli.quant_group(args)
    sizes = ("max_queue", "max_n", "max_prompt", "max_pixels", "max_body")
    for name in (*sizes, *(["batch_size"] if args.batch_size is not None else [])):
        whole_number(name, getattr(args, name), 1, 2**40, "must be a whole number of at least 1")
    key = os.environ.get(KEY_VARIABLE) if args.api_key is None else args.api_key
    if key is not None and not key.strip():
        raise InputError("must not be empty, got ''; give a key, or leave it out", "api_key")
    try:
        from lumina_mgpt.server.app import create_app
        from lumina_mgpt.server.engine import Engine
        from lumina_mgpt.server.limits import Limits
        from lumina_mgpt.server.running import Server, address, open_socket
    except ImportError as error:
        raise package_error(error, "lumina-mgpt serve", "'lumina-mgpt[server]'", _MODULES) from None
    from lumina_mgpt.devices import own_device

    with open_socket(args.host, args.port) as listener:
        checkpoint = cli.open_checkpoint(args)
        if args.text:
            cli.warn_without_text(checkpoint)
        pipeline = cli.load_pipeline(args, checkpoint, own_device(args.device), text=args.text or None)
        name = args.model_name or Path(args.model_path).name or "lumina-mgpt"
        engine = Engine(pipeline, name, args.batch_size, args.max_queue)
        limits = Limits(args.max_body * _MIB, args.max_pixels, args.max_n, args.max_prompt)
        url, page = address(listener), None if args.no_page else _page(args, limits)

        def ready() -> None:
            print(f"{name} at {url}; {url}/docs describes the API; Ctrl-C stops", flush=True)
            if args.open:
                webbrowser.open(url)

        if key is None and not _is_local(listener.getsockname()[0]):
            print("hint: everyone in the network can use this server; --api_key asks for a key", file=sys.stderr)
        try:
            Server(create_app(engine, page, limits=limits, api_key=key), engine, ready).run([listener])
        finally:
            engine.close()


def _page(args: argparse.Namespace, limits: "Limits") -> "Page | None":
    """Returns what mounts the page; None, with a hint, if Gradio is not installed."""
    try:
        from lumina_mgpt.page.mount import mount
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        print("hint: pip install 'lumina-mgpt[page]' adds a page for browsers", file=sys.stderr)
        return None
    return functools.partial(mount, options=_checkpoint_options(args), limits=limits)


def _checkpoint_options(args: argparse.Namespace) -> list[str]:
    """Returns the options about checkpoint and device that differ from their defaults."""
    parser = cli.Parser()
    cli.add_checkpoint_options(parser)
    words = []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value != action.default:
            words += [action.option_strings[0]] + ([] if value is True else [str(value)])
    return words


def _is_local(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(serve, build_parser(), argv, "requests that ran are answered")
