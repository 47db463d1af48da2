"""Every imported package is declared, and every declared one is imported."""

import ast
import runpy
import sys
from collections.abc import Collection
from functools import cache
from unittest import mock

from commands import ROOT
from packaging.requirements import Requirement

# Import name -> name for pip, where they differ in more than "_" and "-".
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "llama_cpp": "llama-cpp-python",
    "yaml": "pyyaml",
}
SCRIPTS = ("generate_examples", "scripts")
# Part of the package that only works with an extra -> the extra.
PARTS = {"page": "page", "server": "ray"}
OWN_FILES = [path for folder in (*SCRIPTS, "tests") for path in (ROOT / folder).rglob("*.py")]
LOCAL = {"lumina_mgpt"} | {name for path in OWN_FILES for name in (path.stem, path.parent.name)}


def imported(folder: str, top: bool = False, without: Collection[str] = ()) -> set[str]:
    """Names for pip of the packages that a folder's files import: at module level only, or anywhere.

    `without` names folders in it to leave out.
    """
    names: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        if path.relative_to(ROOT / folder).parts[0] in without:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body if top else ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return {DISTRIBUTIONS.get(name, name.lower().replace("_", "-")) for name in names - LOCAL - sys.stdlib_module_names}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line.split(" #")[0]) for line in lines if line and line[0] not in "#-"]
    return {pip_name(one): one for one in found}


def pip_name(requirement: Requirement) -> str:
    return requirement.name.lower().replace("_", "-")


@cache
def project() -> dict:
    """The arguments that setup.py gives to `setup`."""
    arguments: dict = {}
    with mock.patch("setuptools.setup", arguments.update):
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def declared(*extras: str) -> set[str]:
    """Names for pip of requirements.txt and of these extras."""
    lines = [line for extra in extras for line in project()["extras_require"][extra]]
    return {pip_name(Requirement(line)) for line in lines} | set(pins())


def test_the_package_starts_with_its_requirements_alone():
    assert imported("lumina_mgpt", top=True, without=PARTS) <= declared()


def test_parts_of_the_package_need_their_extra_alone():
    for folder, extra in PARTS.items():
        assert imported(f"lumina_mgpt/{folder}", top=True) <= declared(extra)


def test_parts_with_an_extra_are_imported_when_they_are_used():
    """Outside of itself, such a part is imported in functions only."""
    for path in (ROOT / "lumina_mgpt").rglob("*.py"):
        if path.relative_to(ROOT / "lumina_mgpt").parts[0] in PARTS:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            text = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else ""
            assert not any(f"lumina_mgpt.{part}" in text for part in PARTS), path


def test_all_imports_are_declared():
    for folder in ("lumina_mgpt", *SCRIPTS):
        assert imported(folder) <= declared(*project()["extras_require"]), folder
    assert imported("tests") <= declared("test")


def test_all_requirements_are_imported():
    assert set(pins()) <= imported("lumina_mgpt")


def test_the_range_of_torch_holds_the_tested_version():
    """A release's metadata has the same requirements, torch with a range instead of the pin."""
    required = {pip_name(one): one for one in map(Requirement, project()["install_requires"])}
    assert required.keys() == pins().keys()
    assert all(required[name] == pin for name, pin in pins().items() if name != "torch")
    (pin,) = pins()["torch"].specifier
    assert pin.operator == "==" and pin.version in required["torch"].specifier
    assert {"<", ">="} == {bound.operator for bound in required["torch"].specifier}
