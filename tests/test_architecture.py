"""The house rules: imports go down only, and every function and file can be read at a glance."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "finetune"
FILES = sorted(
    path
    for folder in (PACKAGE, ROOT / "tests", ROOT / "examples", ROOT / "benchmarks")
    for path in folder.rglob("*.py")
)

LAYERS = [
    {"__main__", "command_server"},
    {"cli"},
    {"commands"},
    {"page"},
    {"recipe"},
    {"run"},
    {"evaluators"},
    {"results"},
    {"training"},
    {"cache"},
    {"data", "models"},
    {"arguments", "batch", "seeding", "atomic_io", "memory_limit", "out_of_memory", "import_path"},
    {"source_options"},
    {"config"},
    {"options"},
    {"option_info"},
    {"deprecation", "errors", "log_handlers", "text", "optimizer_table"},
]
"""From the top down; a part imports only from layers below it, or from itself."""

SEE_THE_CONFIG = {"arguments", "cli", "commands", "recipe", "run", "evaluators", "config", "source_options", "__init__"}
SEE_THE_ACCELERATOR = {"recipe.py", "results/trackers.py", "run/setup.py"}


def part(module: str) -> str:
    """finetune.models.lora -> models"""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imported(path: Path) -> set[str]:
    """The modules of this package and `accelerate` that a file imports, at any depth of it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "finetune" else [node.module]
            )
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] in ("finetune", "accelerate")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if relative.name == "__init__.py":
        return
    depth = {name: level for level, names in enumerate(LAYERS) for name in names}
    mine = relative.parts[0].removesuffix(".py")
    for module in imported(path):
        if module.startswith("accelerate"):
            assert relative.as_posix() in SEE_THE_ACCELERATOR, f"{relative} imports {module}"
            continue
        theirs = part(module)
        assert theirs == mine or depth[theirs] > depth[mine], f"{relative} imports {module} from above or beside it"
        if theirs == "config":
            assert mine in SEE_THE_CONFIG, f"{relative} takes plain values, not the run's config"


def lines_of_docstrings(tree: ast.AST) -> int:
    """How many lines of a file or a function say what it is for."""
    texts = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    return sum((text.end_lineno or 0) - text.lineno + 1 for text in texts if isinstance(text.value, str))


WHOLE = {"finetune/recipe.py", "finetune/training/trainer.py"}
"""The loop and the trainer: each is one thing, and not cut in pieces for a number."""


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if str(path.relative_to(ROOT)) not in WHOLE],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_functions_stay_under_60_lines_and_files_under_400(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) - lines_of_docstrings(tree) < 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1  # a signature may have a line for each argument
            assert lines - lines_of_docstrings(node) < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_no_remote_code_and_nothing_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            carried = [ast.unparse(line) for line in node.body] == ["self._error = error"]  # to the thread that asks
            assert carried or not {"everything", "Exception", "BaseException"} & set(re.findall(r"\w+", caught)), caught
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load" and path.name == "ckpt_file.py":
                assert "weights_only=True" in map(ast.unparse, node.keywords)
                continue
            assert called not in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "eval", "exec"), called
            assert all(keyword.arg != "trust_remote_code" for keyword in node.keywords)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_families_are_known_to_the_table_and_defaults_to_the_resolved_config(path: Path) -> None:
    if path.parent.name == "models":
        return
    text = path.read_text()
    assert not re.search(r"family\.name\s*[!=]=", text), "a family's row says what is special about it"
    assert not re.search(r"\bconfig\.\w+ or (?:[\d.]+|\"\w+\")", text), "a default would hide an option left open"


@pytest.mark.parametrize("module", ["finetune", "finetune.config", "finetune.models.families", "finetune.cli"])
def test_light_modules_import_neither_torch_nor_diffusers(module: str) -> None:
    check = f"import sys, {module}; sys.exit(bool({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_every_public_name_exists() -> None:
    import finetune

    source = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {alias.name for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(finetune.__all__) == typed - {"Any", "TYPE_CHECKING"}
    for name in finetune.__all__:
        assert getattr(finetune, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        finetune.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["CaptionVisits", "Encoded", "Noised", "Prepared"])
def test_a_public_name_of_before_goes_on_working(name: str) -> None:
    import finetune

    with pytest.warns(DeprecationWarning, match=rf"finetune\.{name} is now finetune\.(\w+)"):
        assert isinstance(getattr(finetune, name), type)
