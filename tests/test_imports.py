"""Imports run from upper floors to lower ones, folder by folder."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "kontext_jax"

FLOORS = [
    {"chips", "files", "tree_paths", "types"},
    {"cli", "metrics", "settings"},
    {"compilation", "flow", "geometry", "sharding", "toy_data"},
    {"data", "models"},
    {"encoders", "flops", "optim", "sampler", "weights"},
    {"objectives"},
    {"sampling", "training"},
    {"config"},
    {"loading"},
    {"evaluation"},
    {"report"},
    {"compile", "convert", "encode", "evaluate", "sample", "train"},
    {"__main__"},
]
"""From the ground up. A module or folder imports from itself and from the floors below its own."""

MAX_MODULES = 22


def floor_of(name: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if name in floor)


def imports(path: Path) -> set[str]:
    """The modules and folders at the package's top level that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kontext_jax"):
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "kontext_jax" and len(name) > 1}
    return found


def test_imports_never_run_upwards_and_folders_have_no_cycles():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name == "__init__":
            continue
        for imported in imports(path) - {name, "__version__"}:
            if floor_of(imported) >= floor_of(name):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong


def test_every_floor_exists():
    """A name that is gone would guard nothing."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set.union(*FLOORS) == names - {"__init__", "__pycache__"}


def test_the_top_level_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_MODULES


def test_importing_the_package_imports_nothing_heavy():
    assert imports(PACKAGE / "__init__.py") == set()
