"""Imports of the package go one way, modules stay small, and only commands print or exit."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from commands import ROOT

PACKAGE = ROOT / "lumina_mgpt"
MAX_FILE, MAX_FUNCTION = 400, 60  # lines

# Top-level module or package -> what it may import besides itself, as names of rows above its own.
FOUNDATIONS = {"errors", "io"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "resources": set(),
    "measure": set(),
    "console": set(),
    "cuda": set(),
    "meta": set(),
    "prompts": set(),
    "io": {"errors"},
    "checks": {"errors"},
    "launcher": FOUNDATIONS,
    "outputs": FOUNDATIONS,
    "benchmarks": FOUNDATIONS | {"outputs"},
    "user_functions": {"errors"},
    "rewriting": FOUNDATIONS | {"user_functions"},
    "images": FOUNDATIONS,
    "maps": {"errors", "images"},
    "boxes": set(),
    "model_config_checks": {"errors", "checks"},
    "families": {"errors", "checks", "prompts"},
    "prompt_files": FOUNDATIONS | {"families"},
    "config": FOUNDATIONS | {"checks", "families", "model_config_checks", "prompts"},
    "devices": {"errors", "config"},
    "vocabulary": FOUNDATIONS | {"config", "prompts"},
    "unirep": {"errors", "checks", "vocabulary"},
    "vqgan": FOUNDATIONS | {"checks", "config", "cuda", "families", "images", "meta"},
    "panels": {"errors", "checks", "images", "prompts", "vqgan", "unirep", "vocabulary"},
    "kernels": {"config"},
    "model": FOUNDATIONS | {"checks", "config", "cuda", "families", "kernels", "launcher", "meta"},
    "image_tokenizer": {"errors", "model", "vqgan"},
    "sampling": {"errors", "checks", "config", "unirep", "vocabulary"},
    "request": {"errors", "checks", "config", "panels", "prompts"},
    "results": {"prompts", "request", "unirep"},
    "attention_map": {"model", "unirep", "vocabulary"},
}
LAYERS["preparation"] = FOUNDATIONS | {"config", "images", "model", "vqgan", "panels", "prompts", "request"}
LAYERS["preparation"] |= {"unirep", "vocabulary"}
LAYERS["answers"] = {"preparation", "results", "unirep", "vqgan"}
LAYERS["loading"] = {"errors", "model", "preparation", "vqgan"}
LAYERS["conversation_cache"] = {"config", "model", "preparation", "unirep", "vqgan"}
LAYERS["conversation"] = set(LAYERS) - {"console", "launcher", "outputs"}
LAYERS["describing"] = set(LAYERS) - {"console", "launcher", "outputs"}
LAYERS["pipeline"] = set(LAYERS) - {"console", "launcher", "outputs"}
LAYERS["editing"] = {"pipeline", "preparation", "results"}
LAYERS["scoring"] = {"errors", "checks", "families", "request", "results", "unirep", "user_functions"}
LAYERS["scoring"] |= {"pipeline", "preparation"}
LAYERS["autotune"] = {"config", "devices", "measure", "model", "pipeline", "preparation", "sampling", "unirep"}
LAYERS["data"] = FOUNDATIONS | {
    "checks",
    "config",
    "devices",
    "families",
    "images",
    "vqgan",
    "prompts",
    "unirep",
    "vocabulary",
}
LAYERS["training"] = set(LAYERS) - {"console"}
LAYERS["__init__"] = {"pipeline", "request"}  # loaded on first use
LAYERS["server"] = set(LAYERS) - {"console", "launcher", "autotune", "data", "training"}
LAYERS["comfyui"] = set(LAYERS) - {"console", "data", "launcher", "outputs", "server", "training"}
LAYERS["hf"] = set(LAYERS) - {"comfyui", "console", "launcher", "outputs", "server"}
LAYERS["page"] = set(LAYERS) - {
    "autotune",
    "comfyui",
    "console",
    "data",
    "hf",
    "launcher",
    "model",
    "sampling",
    "training",
    "vqgan",
}
LAYERS["cli"] = set(LAYERS) - {"comfyui", "hf"}
LAYERS["__main__"] = {"cli"}
PRINTERS = {"cli", "__main__"}
EXITS = {"print", "exit", "quit", "sys.exit", "os._exit"}


@cache
def modules() -> dict[str, Path]:
    """Module name without the package's -> file; `__init__` is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package != "lumina_mgpt":
                continue
            while module and module not in modules():
                module = module.rpartition(".")[0]
            yield module or "__init__"


def layer(module: str) -> str:
    return module.split(".")[0]


def test_layers_form_an_order():
    above = set()
    for name, allowed in LAYERS.items():
        assert allowed <= above, f"{name} may import {sorted(allowed - above)}, which are not above it"
        above.add(name)


def test_imports_go_to_layers_above():
    wrong = []
    for module, path in modules().items():
        name = layer(module)
        assert name in LAYERS, f"add {name} to LAYERS"
        wrong += [f"{module} -> {other}" for other in imports(path) if layer(other) not in LAYERS[name] | {name}]
    assert not wrong


def test_only_the_adapters_import_transformers():
    """The import takes seconds, which a command would wait."""
    found = set()
    for module, path in modules().items():
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] in ("accelerate", "transformers") for name in names):
                found.add(layer(module))
    assert found == {"hf"}


def test_imports_form_no_cycle():
    graph = {module: {other for other in imports(path) if other != module} for module, path in modules().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_only_commands_print_or_exit():
    wrong = []
    for module, path in modules().items():
        if layer(module) in PRINTERS:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in EXITS or called.startswith(("sys.stdout.", "sys.stderr.")):
                    wrong.append(f"{module}, line {node.lineno}: {called}")
            elif isinstance(node, ast.Raise) and node.exc and "SystemExit" in ast.unparse(node.exc):
                wrong.append(f"{module}, line {node.lineno}: SystemExit")
    assert not wrong


def test_files_and_functions_are_short():
    long = []
    for module, path in modules().items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            long.append(f"{module}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    long.append(f"{module}.{node.name}: {lines} lines")
    assert not long
