"""The embedded default: documentation that comes with CPython, so that the demo needs no network.

About 2 MB of English: the language reference by topic (`pydoc_data.topics`) and the docstrings of
the standard library. The sources are parsed, never imported.
"""

import ast
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from rekindle.data.sources.base import Block, Source, SourceFile
from rekindle.errors import UserError

# Tests, other programs, and packages that the user installed.
SKIPPED = frozenset({
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "_vendor",
    "site-packages", "dist-packages", "__pycache__", "__phello__",
})  # fmt: skip
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class PythonDocs(Source):
    """The topics of the Python manual, then the docstrings of each standard module."""

    name = "Python's own documentation"
    revision = platform.python_version()
    licence = "PSF-2.0"

    def __init__(self) -> None:
        if not self.documents:
            raise UserError(
                "this Python has neither its manual nor the source of its standard library: "
                "give another source of text"
            )
        self.files = [SourceFile("documentation", self.text_bytes)]

    @cached_property
    def documents(self) -> list[str]:
        return [*_topics(), *_library()]

    @property
    def text_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.documents)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        import pyarrow as pa

        if texts := self.documents[skip:]:  # small enough for one block
            yield Block(pa.array(texts, pa.string()), file, skip, 1.0)


def _topics() -> Iterator[str]:
    """The manual by topic, as shown by `help("topics")`; some distributions do not include it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for _, text in sorted(topics.items()):
        yield text.strip() + "\n"


def _library() -> Iterator[str]:
    """One document for each documented standard module."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts) and (text := _module(path, ".".join(parts))):
            yield text


def _module(path: Path, name: str) -> str:
    """All docstrings of one module, each below the definition that it describes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources contain invalid escapes
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    sections = list(_docstrings(tree, f"module {name.removesuffix('.__init__')}"))
    return "\n\n".join(sections) + "\n" if sections else ""


def _docstrings(node: Documented, heading: str) -> Iterator[str]:
    """Docstrings of a module, class or function and of the definitions in it, in source order."""
    if docstring := ast.get_docstring(node):
        # A docstring may contain a lone surrogate, which cannot be encoded as UTF-8.
        yield f"{heading}\n{docstring}".encode(errors="ignore").decode()
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"class {child.name}:")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"def {child.name}({ast.unparse(child.args)}):")
