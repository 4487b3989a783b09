from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from running import ROOT

from shards.checkpoint.hub import resolve
from shards.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
COMMON = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "original/params.json": b"{}"}
MODELS: dict[str, dict[str, bytes]] = {
    "we/safe": {**COMMON, "model.safetensors": b"S" * 5000, "pytorch_model.bin": b"B" * 5000, "consolidated.bin": b"C"},
    "we/old": {**COMMON, "pytorch_model-1.bin": b"1" * 3000, "pytorch_model.bin.index.json": b"{}"},
    "we/gated": COMMON,
    "we/broken": {**COMMON, "model.safetensors": bytes(24 << 20)},  # written in steps of 10 MiB
}


@dataclass
class Hub:
    url: str = ""
    asked: list[str] = field(default_factory=list)  # files whose content was fetched
    cut: set[str] = field(default_factory=set)  # files whose next transfer breaks off halfway


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs."""

    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), parts[4:])
        else:
            self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def describe(self, model: str, rest: list[str]) -> None:
        if model not in MODELS:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in MODELS[model].items()
            ]
            self.send(200, json.dumps(files).encode())
        elif rest[1:] not in ([], ["main"], [COMMIT]):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.send(200, json.dumps({"id": model, "sha": COMMIT, "siblings": []}).encode())

    def send_file(self, model: str, revision: str, path: str) -> None:
        if model == "we/gated":
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        content = MODELS[model][path]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET":
            self.hub.asked.append(f"{path} {self.headers.get('Range', '')}".strip())
        if requested := self.headers.get("Range"):
            first = int(requested.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.send(206, content[first:], headers)
        elif model == "we/broken" and path in self.hub.cut and self.command == "GET":
            self.hub.cut.remove(path)
            self.send(200, content, headers, keep=len(content) // 2)
        else:
            self.send(200, content, headers)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, keep: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:keep])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


CODE = """
import sys
from shards.errors import UserError
from shards.checkpoint.hub import resolve
try:
    print(resolve(sys.argv[1], sys.argv[2] or None, sys.argv[3] == "weights"))
except UserError as error:
    sys.exit(f"ERROR {error}")
assert "torch" not in sys.modules
"""


def ask(home: Path, url: str, model: str, revision: str = "", weights: str = "weights", **env: str) -> str:
    """The path or error line of `resolve` in a new process, since the hub's settings are read only once per process."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    root = str(ROOT)
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, model, revision, weights],
        env={**known, **settings, "PYTHONPATH": root, **env},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 0:
        return done.stdout.strip()
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "a/b/c", "", "~/none", __file__])
def test_what_can_be_no_model_is_one_line(path: str) -> None:
    with pytest.raises(CheckpointError, match="is neither a folder nor the id of a model"):
        resolve(path)


@pytest.mark.slow
def test_download_then_cache_then_offline(hub: Hub, tmp_path: Path) -> None:
    first = ask(tmp_path, hub.url, "we/safe")
    assert files(first) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (Path(first) / "model.safetensors").read_bytes() == MODELS["we/safe"]["model.safetensors"]
    fetched = list(hub.asked)
    assert ask(tmp_path, hub.url, "we/safe") == first
    assert hub.asked == fetched
    assert ask(tmp_path, "http://127.0.0.1:9", "we/safe", HF_HUB_OFFLINE="1") == first


def test_bin_files_come_where_there_are_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    wanted = {"config.json", "tokenizer.json", "pytorch_model-1.bin", "pytorch_model.bin.index.json"}
    assert files(ask(tmp_path, hub.url, "we/old", COMMIT)) == wanted


def test_without_weights_only_the_description_comes(hub: Hub, tmp_path: Path) -> None:
    assert files(ask(tmp_path, hub.url, "we/safe", weights="no")) == {"config.json", "tokenizer.json"}
    assert "ERROR we/safe is not complete in the cache" in ask(tmp_path, hub.url, "we/safe", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_a_broken_download_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut.add("model.safetensors")
    folder = ask(tmp_path, hub.url, "we/broken")
    if folder.startswith("ERROR"):
        folder = ask(tmp_path, hub.url, "we/broken")
    assert (Path(folder) / "model.safetensors").read_bytes() == MODELS["we/broken"]["model.safetensors"]
    assert f"model.safetensors bytes={10 << 20}-" in hub.asked


@pytest.mark.parametrize(
    ("model", "revision", "fact", "hint"),
    [
        ("we/gated", "", "we/gated is gated: {url} does not give it to you.", "ask at {url}/we/gated, then log in"),
        ("we/none", "", "There is no folder we/none, and no model we/none at {url}", "check the spelling"),
        ("we/safe", "v9", "we/safe at {url} has no revision v9.", "model.revision=null, which is its newest"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, tmp_path: Path, model: str, revision: str, fact: str, hint: str
) -> None:
    line = ask(tmp_path, hub.url, model, revision)
    assert line.startswith(f"ERROR {fact.format(url=hub.url)}")
    assert f"HINT: {hint.format(url=hub.url)}" in line


def test_no_network_is_one_line(tmp_path: Path) -> None:
    line = ask(tmp_path, "http://127.0.0.1:9", "we/safe")
    assert line.startswith("ERROR http://127.0.0.1:9 cannot be reached, and we/safe is not complete in the cache.")


def test_offline_without_a_cache_is_one_line(tmp_path: Path) -> None:
    line = ask(tmp_path, "http://127.0.0.1:9", "we/safe", HF_HUB_OFFLINE="1")
    assert "is not complete in the cache" in line
    assert "HF_HUB_OFFLINE is set. HINT: unset HF_HUB_OFFLINE," in line
