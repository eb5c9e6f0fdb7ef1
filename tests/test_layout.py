"""The project's layout: which modules import which, how long files are, what is installed, where the version is."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import ROOT

import densenet

ALONE = ("densenet", "plot")  # they import nothing of the project, so that they can be copied anywhere
DYNAMIC = ("importlib", "runpy", "imp", "pkgutil")  # could import a module that these tests do not see
MAX_LINES = 450
MAX_LINES_OF = {"densenet.py": 890}
DOWNLOADS = ("load_state_dict_from_url", "get_state_dict")  # functions of torch.hub and torchvision that torch.load


# --- imports ----------------------------------------------------------------------------------------------------

def sources(root: Path) -> dict[str, Path]:
    """-> module name: file, of the top level and of lib with its subfolders"""
    files = [*root.glob("*.py"), *root.glob("lib/**/*.py")]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
            for file in sorted(files)}


def imported_names(module: str, file: Path) -> Iterator[str]:
    """-> the full names of everything that a file imports, at any place; "from a import b" gives a.b"""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[:len(package) - node.level + 1] if node.level else []
            if node.module:
                start = [*start, *node.module.split(".")]
            yield from (".".join([*start, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Name) and node.id == "__import__":
            yield "__import__"


def imports_of(root: Path) -> dict[str, set[str]]:
    """-> module: the project's modules, "tests" and dynamic ways of importing that it imports"""
    modules = sources(root)
    found = {}
    for module, file in modules.items():
        found[module] = set()
        for name in imported_names(module, file):
            first = name.split(".")[0]
            if first in ("tests", "__import__", *DYNAMIC):
                found[module].add(first)
            while name and name not in modules:  # lib.data.load is a name in lib.data
                name = name.rpartition(".")[0]
            if name:
                found[module].add(name)
    return found


def cycles(imports: dict[str, set[str]]) -> list[str]:
    """-> import cycles, as "a -> b -> a" """
    done, found = set(), []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module):], module]))
        elif module not in done:
            for other in sorted(imports.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in imports:
        visit(module, [])
    return found


def violations(root: Path) -> list[str]:
    """-> imports that break a rule: scripts and lib import only lib and densenet; densenet and plot import nothing"""
    imports = imports_of(root)
    found = [f"cycle: {cycle}" for cycle in cycles(imports)]
    for module, names in imports.items():
        for name in sorted(names):
            allowed = name == "densenet" or name.split(".")[0] == "lib"
            if module in ALONE or not allowed:
                found.append(f"{module} imports {name}")
    return found


SOUND = {
    "densenet.py": "import torch\n",
    "plot.py": "import matplotlib\n",
    "train.py": "import densenet\nfrom lib import cli\nfrom lib.data import load\n",
    "tool.py": "import lib.sub.deep\nfrom densenet import DenseNet\n",
    "lib/cli.py": "import argparse\n",
    "lib/data.py": "import densenet\nfrom lib.cli import path\nfrom . import cli\n",
    "lib/sub/deep.py": "from lib import data\nfrom ..cli import path\n",
    "tests/test_train.py": "import train\n",
    "tests/benchmarks/step.py": "import importlib\nimport train\n",
}
FAULTS = [
    ("lib/cli.py", "import train", "lib.cli imports train"),
    ("lib/cli.py", "from train import main", "lib.cli imports train"),
    ("lib/cli.py", "def f():\n    import plot", "lib.cli imports plot"),
    ("lib/cli.py", "if True:\n    from plot import main as m", "lib.cli imports plot"),
    ("lib/cli.py", "from .. import train", "lib.cli imports train"),
    ("lib/sub/deep.py", "import tool", "lib.sub.deep imports tool"),
    ("lib/sub/deep.py", "from ...train import main", "lib.sub.deep imports train"),
    ("lib/cli.py", "import tests.common", "lib.cli imports tests"),
    ("train.py", "import plot", "train imports plot"),
    ("train.py", "import torch, tool", "train imports tool"),
    ("tool.py", "from train import main", "tool imports train"),
    ("train.py", "from tests import common", "train imports tests"),
    ("train.py", "import importlib", "train imports importlib"),
    ("lib/data.py", "from importlib import import_module", "lib.data imports importlib"),
    ("lib/sub/deep.py", "import importlib.util", "lib.sub.deep imports importlib"),
    ("train.py", "plot = __import__('plot')", "train imports __import__"),
    ("tool.py", "import runpy", "tool imports runpy"),
    ("densenet.py", "from lib.cli import path", "densenet imports lib.cli"),
    ("densenet.py", "import train", "densenet imports train"),
    ("plot.py", "import densenet", "plot imports densenet"),
    ("plot.py", "def f():\n    from lib import cli", "plot imports lib.cli"),
    ("lib/cli.py", "import lib.data", "cycle: lib.cli -> lib.data -> lib.cli"),
    ("lib/cli.py", "def f():\n    from lib.sub import deep", "cycle: lib.cli -> lib.sub.deep -> lib.cli"),
    ("lib/data.py", "from lib.sub.deep import x", "cycle: lib.data -> lib.sub.deep -> lib.data"),
]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A small project that breaks no rule."""
    for name, text in SOUND.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_scripts_import_lib_and_densenet_and_lib_imports_densenet_only():
    assert {"train", "plot", "densenet", "lib.cli", "lib.compare"} <= sources(ROOT).keys()
    assert violations(ROOT) == []


def test_a_sound_tree_has_no_violations(tree):
    assert violations(tree) == []


@pytest.mark.parametrize("file, line, expected", FAULTS)
def test_each_wrong_import_is_found(tree, file, line, expected):
    (tree / file).write_text(SOUND[file] + line + "\n")
    assert expected in violations(tree)


# --- torch.load -------------------------------------------------------------------------------------------------

def unsafe_loads(root: Path) -> list[str]:
    """-> calls that could unpickle code: torch.load, and functions that call it, without weights_only=True"""
    found = []
    for module, file in sources(root).items():
        tree = ast.parse(file.read_text())
        names = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                 and node.module == "torch" for alias in node.names if alias.name == "load"}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            is_load = called == "torch.load" or called in names or called.split(".")[-1] in DOWNLOADS
            if is_load and not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords):
                found.append(f"{module}:{node.lineno}")
    return found


def test_files_are_loaded_as_weights_only():
    assert unsafe_loads(ROOT) == []


@pytest.mark.parametrize("call, safe", [
    ("torch.load(f, weights_only=True)", True), ("torch.load(f)", False), ("torch.load(f, weights_only=False)", False),
    ("torch.load(\n    f,\n    map_location='cpu')", False), ("from torch import load as get\nget(f)", False),
    ("torch.hub.load_state_dict_from_url(url)", False), ("json.load(f)", True)])
@pytest.mark.parametrize("file", ["train.py", "lib/data.py", "lib/sub/deep.py"])
def test_each_unsafe_load_is_found(tree, file, call, safe):
    (tree / file).write_text(call + "\n")
    assert (unsafe_loads(tree) == []) is safe


# --- files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", sources(ROOT).values(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_too_long_to_read_in_one_sitting(file):
    assert len(file.read_text().splitlines()) <= MAX_LINES_OF.get(file.name, MAX_LINES)


def test_only_densenet_is_installed():
    """Installed, lib, train and plot would collide with other packages' modules of these names."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["py-modules"] == ["densenet"]
    assert setuptools.keys() <= {"py-modules", "dynamic"}  # no packages
    assert not (ROOT / "setup.py").exists() and not (ROOT / "setup.cfg").exists()


def test_gitignore_has_the_folder_data_but_not_lib_data():
    lines = (ROOT / ".gitignore").read_text().splitlines()
    assert "/data/" in lines
    assert not {"data", "data/", "data*", "lib", "lib/", "/lib/"} & set(lines)


def test_the_version_stands_in_densenet_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "densenet.__version__"}}
    assert re.fullmatch(r"\d+\.\d+\.\d+", densenet.__version__)
    cited = re.findall(r"^version: *\"?([^\s\"]+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert set(cited) <= {densenet.__version__}
