"""Who may import whom: the data's path in one direction, and no way back."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "kontext_jax"

# Each layer may import itself and the layers above it.
LAYERS = [
    {"types", "cli", "hlo", "names", "ranges"},
    {"geometry", "sharding", "flow", "data", "metrics"},
    {"models"},
    {"encoders", "weights", "flops"},
    {"objectives", "sampler", "optim"},
    {"train_state"},
    {"checkpoint", "evaluator", "losses", "provenance", "results", "writer"},
    {"config"},
    {"places", "sheets", "judges", "scores", "watch"},
    {"cells", "charts", "labels", "making", "runs", "summary", "validation"},
    {"gallery", "page", "report", "tables", "trends"},
    {"train", "sample", "evaluate", "convert", "encode", "compile"},
]


def layer_of(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kontext_jax"):
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "kontext_jax" and len(name) > 1}
    return found


def test_every_module_has_a_layer_and_imports_only_upwards():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module == "__init__":
            continue
        for imported in imports(path):
            if layer_of(imported) > layer_of(module):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong


def test_data_and_metrics_do_not_import_models():
    assert layer_of("models") > layer_of("data") and layer_of("models") > layer_of("metrics")


def test_importing_the_package_imports_nothing_heavy():
    assert imports(PACKAGE / "__init__.py") == set()
