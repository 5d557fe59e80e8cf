"""Durable, atomic writes. All files that must survive a crash are written through this package.

A reader sees a file or folder either complete or not at all: it is written under a temporary name,
flushed to disk, hashed and renamed into place, and then its parent folder is flushed.
"""

from rekindle.storage.files import (
    TEMPORARY,
    Folder,
    file_sha256,
    has_unfinished,
    is_empty,
    make_folder,
    move_file,
    new_folder,
    parse_json,
    printable,
    read_json,
    remove_folder,
    remove_unfinished,
    set_aside,
    write_file,
    write_json,
)
from rekindle.storage.json_lines import JsonLines, read_json_lines
from rekindle.storage.lock import LOCK, Lock

__all__ = [
    "LOCK",
    "TEMPORARY",
    "Folder",
    "JsonLines",
    "Lock",
    "file_sha256",
    "has_unfinished",
    "is_empty",
    "make_folder",
    "move_file",
    "new_folder",
    "parse_json",
    "printable",
    "read_json",
    "read_json_lines",
    "remove_folder",
    "remove_unfinished",
    "set_aside",
    "write_file",
    "write_json",
]
