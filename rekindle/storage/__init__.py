"""What must last is written here, and nowhere else.

A reader sees a file or folder whole or not at all: everything is written under a temporary name,
flushed to disk, hashed, renamed into place, and the folder that holds it is flushed as well.
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
    read_json,
    remove_folder,
    remove_unfinished,
    set_aside,
    spelled,
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
    "read_json",
    "read_json_lines",
    "remove_folder",
    "remove_unfinished",
    "set_aside",
    "spelled",
    "write_file",
    "write_json",
]
