"""Lines of code, without blanks, comments and docstrings (`make count`).

    python tests/count.py

The core (scripts, common, models, data, metrics, pages) may have 3,400 lines, demo and benchmarks 1,000, a file 260.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE, AROUND = ("common", "models", "data", "metrics", "pages"), ("demo", "benchmarks")
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
    """Code lines of each file, by room."""
    rooms = {"scripts": sorted(ROOT.glob("*.py"))} | {
        room: sorted((ROOT / room).rglob("*.py")) for room in CORE + AROUND
    }
    return {
        room: {str(f.relative_to(ROOT)): code_lines(f.read_text("utf-8")) for f in files}
        for room, files in rooms.items()
    }


if __name__ == "__main__":
    sizes = count()
    for room, files in sizes.items():
        print(
            f"{room:12}{sum(files.values()):>6}   largest: {max(files, key=files.get, default='-')} {max(files.values(), default=0)}"
        )
    for name, rooms in (("core", ("scripts", *CORE)), ("demo and benchmarks", AROUND)):
        print(f"{name}: {sum(sum(sizes[room].values()) for room in rooms)}")
