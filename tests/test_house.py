"""The rules of the house: which folder may import which, and how long files and functions may be."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from count import ROOT, code_lines, count, total

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FLOORS = ("common", "data", "models", "metrics", "pages", "scripts", "corpus", "demo", "report", "benchmarks")
FILES = [path for room in count().values() for path in room]


def floor(module: str) -> int:
    """The number of a module's floor, from 0.

    >>> floor("data.photos"), floor("p2_train")
    (1, 5)
    """
    room = module.partition(".")[0]
    return FLOORS.index("scripts" if room in SCRIPTS else room)


def module_of(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imported(source: str, package: str) -> set[str]:
    """The modules of the suite that a file of `package` imports, at its top or inside functions.

    >>> sorted(imported("import torch, data.photos\\nfrom models import projector\\nfrom . import page", "pages"))
    ['data.photos', 'models.projector', 'pages.page']
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found & MODULES.keys()


def imports() -> dict[str, set[str]]:
    return {
        module: imported((ROOT / path).read_text(encoding="utf-8"), module.rpartition(".")[0])
        for module, path in MODULES.items()
    }


def test_no_file_imports_from_a_higher_floor():
    up = [f"{one} imports {two}" for one, others in imports().items() for two in others if floor(one) < floor(two)]
    assert not up, up


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_script_imports_another():
    pairs = [(one, two) for one in SCRIPTS for two in imports()[one] if two in SCRIPTS]
    assert not pairs, pairs


def test_functions_have_at_most_50_lines():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                long += [f"{path}: {node.name} has {lines} lines"] if lines > 50 else []
    assert not long, long


def test_files_have_at_most_260_lines_of_code():
    long = {path: lines for room in count().values() for path, lines in room.items() if lines > 260}
    assert not long, long


def test_the_suite_stays_small():
    assert total("core") <= 3900
    assert total("demo and benchmarks") <= 1000
    assert total("corpus") <= 150
    assert total("report") <= 450


def test_readme_has_at_most_130_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_every_file_is_counted():
    """No Python file lies in a folder that the rules above do not see."""
    skipped = {"tests", "runs", ".venv", ".venv-oldest"}
    found = {path.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    missed = {path for path in found if path.parts[0] not in skipped and not path.parts[0].startswith(".")}
    assert {str(path) for path in missed} == set(FILES)


def test_code_lines_are_those_that_run():
    source = (
        '"""About.\n\nMore."""\nx = 1  # one\n\n# none\ny = """two\nlines"""\n\ndef f():\n    "doc"\n    return x\n'
    )
    assert code_lines(source) == 5
    assert sys.version_info >= (3, 11)
