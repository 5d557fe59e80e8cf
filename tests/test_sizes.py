"""Files and functions stay small enough to read."""

import ast

from tests.conftest import ROOT

LINES, FUNCTION = 300, 60


def test_files_and_functions_are_short() -> None:
    for path in sorted((ROOT / "rekindle").rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < FUNCTION, f"{path}: {node.name}"
