"""Fixtures: small texts, Parquet files, and a local server that stands in for the hub."""

import hashlib
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

WORDS = ["the", "of", "model", "token", "loss", "a", "gradient", "it's", "3.14", "Ünïcode", "東京"]
WORDS += ["<|endoftext|>", "\n\n", "tab\t", "🙂"]


def some_texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Distinct documents of varying length."""
    rng = random.Random(seed)
    return [
        f"{seed}-{i} " + " ".join(rng.choices(WORDS, k=rng.randint(0, 2 * words)))
        for i in range(count)
    ]


def parquet_bytes(texts: list[str | None], row_group: int = 64) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), sink, row_group_size=row_group)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def texts() -> Callable[..., list[str]]:
    return some_texts


@pytest.fixture
def as_parquet() -> Callable[..., bytes]:
    return parquet_bytes


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write a Parquet file into the folder `source`; return the folder."""

    def write(name: str, documents: list[str | None], row_group: int = 64) -> Path:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(parquet_bytes(documents, row_group))
        return folder

    return write


class LocalHub:
    """A server with the part of the hub's API that its client needs, and with faults on demand."""

    revision = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.licence: str | list[str] | None = "odc-by"
        self.corrupt: set[str] = set()  # files sent with a byte changed
        self.cut: dict[str, int] = {}  # file → how many of its next responses stop half-way
        self.downloads: list[str] = []  # requested files, in order
        self.revisions: set[str] = set()  # requested revisions of files and file lists
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.respond(self, body=False)

            def do_GET(self) -> None:
                hub.respond(self, body=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def respond(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            self._json(request, self._info(found[1], found[2]))
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(\w+)/?(.*)", path):
            self.revisions.add(found[2])
            self._json(request, self._tree(found[1], found[3]))
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            self.revisions.add(found[2])
            self._file(request, found[1], found[2], found[3], body)
        else:
            self._json(request, None)

    def _info(self, repository: str, revision: str | None) -> object:
        if repository not in self.repositories:
            return None
        card = {"license": self.licence} if self.licence else {}
        return {"id": repository, "sha": revision or self.revision, "cardData": card}

    def _tree(self, repository: str, folder: str) -> object:
        if repository not in self.repositories:
            return None
        return [
            {
                "type": "file", "path": name, "size": len(content), "oid": "0" * 40,
                "lfs": {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content), "pointerSize": 134,
                },
            }
            for name, content in self.repositories[repository].items()
            if name.startswith(f"{folder}/" if folder else "")
        ]  # fmt: skip

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        content = json.dumps({"error": "not found"} if value is None else value).encode()
        request.send_response(404 if value is None else 200)
        if value is None:
            request.send_header("X-Error-Code", "RepoNotFound")
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def add(self, repository: str, files: dict[str, bytes]) -> None:
        self.repositories.setdefault(repository, {}).update(files)

    def _file(
        self,
        request: BaseHTTPRequestHandler,
        repository: str,
        revision: str,
        name: str,
        body: bool,
    ) -> None:
        content = self.repositories[repository][name]
        start = 0
        if ranged := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
            start = int(ranged[1])
        request.send_response(206 if start else 200)
        request.send_header("X-Repo-Commit", revision)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("Content-Length", str(len(content) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if not body:
            return
        self.downloads.append(name)
        if name in self.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        end = len(content)
        if self.cut.get(name, 0) > 0:
            self.cut[name] -= 1
            end = (start + end) // 2
            request.close_connection = True
        request.wfile.write(content[start:end])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    served = LocalHub()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    yield served
    served.server.shutdown()
    served.server.server_close()
