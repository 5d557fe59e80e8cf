"""Find the files given on the command line. Each is read, or left out for a reported reason."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rekindle.errors import UserError


@dataclass(frozen=True)
class FoundFile:
    """A file to read."""

    path: Path
    name: str  # relative to the given folder
    location: str  # relative to the common parent of all given paths; determines its split


@dataclass
class Found:
    """The result of `find`."""

    files: list[FoundFile] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)


def find(paths: list[Path], suffixes: tuple[str, ...]) -> Found:
    """Find the files given by `paths`. A folder stands for all files below it with a known suffix.

    Raises `UserError` if a path does not exist, refers to a file that another path also refers to,
    or contains no file to read.
    """
    found = Found()
    above = os.path.commonpath([os.path.abspath(path) for path in paths])
    for path in paths:
        if path.is_dir():
            inside = _in_folder(path, suffixes)
            found.left_out += inside.left_out
            files = inside.files
        else:
            _check(path)
            files = [FoundFile(path, path.name, path.name)]
        if len(paths) > 1 and os.path.abspath(path) != above:
            files = [FoundFile(f.path, f.name, _below(f.path, above)) for f in files]
        found.files += files
    _check_named_once(found.files, paths)
    return found


def _below(path: Path, above: str) -> str:
    return Path(os.path.relpath(os.path.abspath(path), above)).as_posix()


def _check(path: Path) -> None:
    """Raise `UserError` unless `path` is a regular file, which can be read more than once."""
    if path.is_file():
        return
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: restore that file, or "
            "remove the link"
        )
    if path.is_fifo():
        raise UserError(f"{path} is a pipe, which can only be read once: save it to a file first")
    if path.exists():
        raise UserError(f"{path} is neither a file nor a folder: give one of those")
    raise UserError(f"there is no file or folder {path}: check the path")


def _check_named_once(files: list[FoundFile], paths: list[Path]) -> None:
    seen: set[tuple[int, int]] = set()
    for file in files:
        key = _key(file.path)
        if key in seen:
            named = ", ".join(map(str, paths))
            raise UserError(f"{file.path} is given twice among {named}: give it once")
        seen.add(key)


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> Found:
    """The files below a folder, sorted by path; a file with two names is listed once."""
    found, by_key = Found(), dict[tuple[int, int], Path]()
    paths = sorted(_walk(folder, folder, found, {_key(folder)}))
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path)):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith("."):
            found.left_out.append((name, "hidden"))
        elif not path.name.lower().endswith(suffixes) and (path.exists() or not path.is_symlink()):
            found.left_out.append((name, f"not {' or '.join(suffixes)}"))
        else:
            _check(path)
            first = by_key.setdefault(_key(path), path)
            if first == path:
                found.files.append(FoundFile(path, name, name))
            else:
                same = first.relative_to(folder).as_posix()
                found.left_out.append((name, f"same file as {same}"))
    found.files.sort(key=lambda file: file.path)
    if not found.files:
        there = ", ".join(name for name, _ in found.left_out[:5])
        raise UserError(
            f"{folder} contains no {' or '.join(suffixes)} file"
            + (f" (but {there}{', ...' if len(found.left_out) > 5 else ''})" if there else "")
        )
    return found


def _walk(top: Path, folder: Path, found: Found, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield all files below a folder. Links are followed, but no folder is visited twice."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path)):
        name = f"{path.relative_to(top).as_posix()}/"
        if not path.is_dir():
            yield path
        elif path.name.startswith("."):
            found.left_out.append((name, "hidden"))
        elif (key := _key(path)) in seen:
            found.left_out.append((name, "links to a folder that is already read"))
        else:
            seen.add(key)
            yield from _walk(top, path, found, seen)


def _key(path: Path) -> tuple[int, int]:
    """Device and inode, which identify a file or folder under all its names."""
    status = path.stat()
    return status.st_dev, status.st_ino
