"""The arrows of the package: kernels <- llama4 <- eagle3 <- aerie; no import goes right.

Read from the source, so that a cycle hidden inside a function is found too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "llama4", "eagle3")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
AERIE = ROOT / "src" / "aerie"
OUTER = sorted([*AERIE.glob("*.py"), *AERIE.glob("commands/*.py")])
OTHERS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_there_are_files():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_goes_right(path):
    layer = path.relative_to(ROOT).parts[0]
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    ours = {module for module in imported_modules(path) if module.split(".")[0] == "aerie"}
    layers = {module.split(".")[1] for module in ours if "." in module}
    assert layers <= set(allowed), f"{path.name} imports {sorted(layers - set(allowed))}"


@pytest.mark.parametrize("path", [*FILES, *OUTER, *OTHERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_bare_imports(path):
    bare = {module for module in imported_modules(path) if module.split(".")[0] in LAYERS}
    assert bare == set(), f"write aerie.{sorted(bare)[0]}: a bare import loads a second copy"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_reads_no_environment(path):
    source = path.read_text()
    assert "os.environ" not in source
    assert "getenv" not in source
    assert "triton.autotune" not in source


@pytest.mark.parametrize("stem", [p.stem for p in FILES if "@torch.library" in p.read_text()])
def test_every_op_has_reference_test_and_bench(stem):
    source = (ROOT / "kernels" / f"{stem}.py").read_text()
    assert f"def {stem}_ref(" in source
    assert f"def {stem}(" in source
    assert "def _launch_config(" in source
    assert (ROOT / "tests" / "kernels" / f"test_{stem}.py").is_file()
    assert (ROOT / "bench" / "kernels" / f"{stem}.py").is_file()


@pytest.mark.parametrize("stem", [p.stem for p in FILES if "@torch.library" in p.read_text()])
def test_readme_lists_the_op(stem):
    assert f"`{stem}`" in (ROOT / "kernels" / "README.md").read_text()
