"""Lines of code, without blanks, comments and docstrings (`make count`).

    python tests/count.py

The core (scripts, common, models, data, metrics, pages) may have 3,900 lines, demo and benchmarks together 1,000, the
optional corpus 150, the report 450, and a file 260: `tests/test_house.py` checks it.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = "scripts", "common", "models", "data", "metrics", "pages"
AROUND = "demo", "benchmarks", "corpus", "report"
PARTS = {"core": CORE, "demo and benchmarks": AROUND[:2], "corpus": AROUND[2:3], "report": AROUND[3:]}
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Lines that hold a token other than a comment and are not part of a docstring.

    >>> code_lines('"About."' + chr(10) + 'x = 1  # one' + chr(10) * 2 + 'y = 2')
    2
    """
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # a docstring, of a field too, is a statement that is only a string
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def count() -> dict[str, dict[str, int]]:
    """Lines of code {folder: {file: lines}}; `scripts` are the files beside the README."""
    files = {room: sorted(ROOT.glob("*.py" if room == "scripts" else f"{room}/**/*.py")) for room in CORE + AROUND}
    return {
        room: {str(path.relative_to(ROOT)): code_lines(path.read_text(encoding="utf-8")) for path in paths}
        for room, paths in files.items()
    }


def total(part: str) -> int:
    """Lines of code of one of PARTS."""
    return sum(sum(lines.values()) for room, lines in count().items() if room in PARTS[part])


if __name__ == "__main__":
    for name, lines in count().items():
        largest = max(lines, key=lines.get)
        print(f"{name:12}{sum(lines.values()):>6}   largest: {largest} {lines[largest]}")
    for part in PARTS:
        print(f"{part}: {total(part)}")
