"""Downloads from a local imitation of the hub, with the code of huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from xl2jax.checkpoint.params import load_params
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.errors import UserError

REPO = "org/Video-XL-2.1"


class Hub(ThreadingHTTPServer):
    """One repository with two commits: `main`, and the branch `old` with another README."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {"main": files, "old": files | {"README.md": b"old", "chat_template.jinja": b"old"}}
        self.commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.files}
        self.fetched: list[str] = []
        self.gated = self.private = self.broken = False
        self.cut: set[str] = set()
        """Files whose download stops in the middle."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, commit in self.commits.items():
            if revision in (name, commit):
                return commit, self.files[name]
        return None


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        path += "/revision/main" if path == f"/api/models/{REPO}" else ""
        if hub.broken:
            return self.answer(503, b"Service Unavailable")
        if not path.startswith((f"/api/models/{REPO}/", f"/{REPO}/resolve/")) or hub.private:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        api, _, rest = path.removeprefix("/api/models").removeprefix(f"/{REPO}/").partition("/")
        revision, _, name = rest.partition("/")
        at = hub.at(revision)
        if at is None:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        commit, files = at
        if api == "revision":
            return self.json({"id": REPO, "sha": commit, "siblings": [{"rfilename": f} for f in files]})
        if api == "tree":
            rows = [{"type": "file", "path": f, "size": len(x), "oid": _sha(x)} for f, x in files.items()]
            return self.json(rows)
        if hub.gated:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message=f"Access to model {REPO} is restricted")
        if self.command == "GET":
            hub.fetched.append(name)
        self.answer(200, files[name], name in hub.cut, ETag=f'"{_sha(files[name])}"', X_Repo_Commit=commit)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    others = dict.fromkeys(("pytorch_model.bin", "original/model.safetensors", "video.mp4", "optimizer.pt"), b"x")
    server = Hub(files | others)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Removes the network in one of three ways."""

    def take(how: str) -> None:
        if how == "HF_HUB_OFFLINE":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        elif how == "refused":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        else:
            hub.broken = True

    return take


def test_only_needed_files_are_downloaded(hub: Hub, checkpoint: Path) -> None:
    folder = find_checkpoint(REPO)
    wanted = {f for f in hub.files["main"] if f.endswith((".json", ".safetensors")) and not f.startswith("original")}
    assert sorted(hub.fetched) == sorted(wanted)
    assert load_params(folder)[0] == load_params(checkpoint)[0]
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    find_checkpoint(REPO)
    assert sorted(hub.fetched) == sorted(wanted)  # nothing is downloaded twice


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "refused", "broken"])
def test_cached_checkpoints_need_no_network(how: str, hub: Hub, offline: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = {revision: find_checkpoint(f"{REPO}{revision}") for revision in ("", "@old")}
    assert before[""] != before["@old"]
    assert (before["@old"] / "chat_template.jinja").read_text() == "old"
    offline(how)
    with caplog.at_level("INFO"):
        for revision, folder in before.items():
            assert find_checkpoint(f"{REPO}{revision}") == folder
        assert find_checkpoint(f"{REPO}@{hub.commits['old']}") == before["@old"]
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("xl2jax")]
    assert len(messages) == 3
    assert all("the copy in the hub's cache is used" in line for line in messages)


@pytest.mark.parametrize(
    ("how", "advice"),
    [
        ("HF_HUB_OFFLINE", f"HF_HUB_OFFLINE is set: unset it, or run `hf download {REPO}` with a network"),
        ("refused", "the hub cannot be reached .*: check the network"),
        ("broken", "the hub answers 503 .*: try again later"),
    ],
)
def test_a_checkpoint_that_is_not_cached(how: str, advice: str, hub: Hub, offline: Any) -> None:
    offline(how)
    with pytest.raises(UserError, match=f"^{REPO}: no such folder, not in the hub's cache, and {advice}"):
        find_checkpoint(REPO)


def test_a_missing_repository(hub: Hub) -> None:
    with pytest.raises(
        UserError, match="the hub has no repository org/none, or it is private: check the name, and log in"
    ) as e:
        find_checkpoint("org/none")
    assert "Client Error" not in str(e.value)
    assert "hf auth login" in str(e.value)


def test_a_missing_revision(hub: Hub) -> None:
    find_checkpoint(REPO)
    with pytest.raises(UserError, match=f"^{REPO}@v9: the repository has no such revision"):
        find_checkpoint(f"{REPO}@v9")


def test_a_gated_repository(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(UserError, match=f"accept its conditions at {hub.url}/{REPO}, then log in with `hf auth login`"):
        find_checkpoint(REPO)


def test_a_repository_that_became_private_is_read_from_the_cache(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    folder = find_checkpoint(REPO)
    hub.private = True
    assert find_checkpoint(REPO) == folder
    assert "or it is private" in caplog.text


def test_an_interrupted_download_is_continued(hub: Hub, offline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub sleeps between its attempts
    hub.cut = {"model.safetensors"}
    with pytest.raises(UserError, match=f"{REPO}: the download stopped: .*run the same command again"):
        find_checkpoint(REPO)
    with monkeypatch.context() as m:
        m.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="the copy in the hub's cache is not complete, and HF_HUB_OFFLINE is set"):
            find_checkpoint(REPO)
    hub.cut = set()
    hub.fetched.clear()
    load_params(find_checkpoint(REPO))
    assert hub.fetched == ["model.safetensors"]


def test_a_cache_without_the_weights(hub: Hub, offline: Any) -> None:
    """Another program may have downloaded only the config."""
    huggingface_hub.hf_hub_download(REPO, "config.json")
    offline("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match="the copy in the hub's cache has no weights, and HF_HUB_OFFLINE is set"):
        find_checkpoint(REPO)


@pytest.mark.parametrize(("left", "message"), [("pytorch_model.bin", "is a pickle"), ("video.mp4", "no safetensors")])
def test_unreadable_weights_are_not_downloaded(left: str, message: str, hub: Hub) -> None:
    hub.files["main"] = {f: x for f, x in hub.files["main"].items() if f in (left, "config.json")}
    with pytest.raises(UserError, match=message):
        find_checkpoint(REPO)
    assert hub.fetched == []


def test_a_folder_wins_over_a_hub_id(hub: Hub, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("org").mkdir()
    Path(REPO).symlink_to(checkpoint)
    with caplog.at_level("INFO"):
        assert find_checkpoint(REPO) == Path(REPO)
        find_checkpoint(checkpoint)
    assert hub.fetched == []
    assert [r.getMessage() for r in caplog.records if r.name.startswith("xl2jax")] == [
        f"{REPO}: the folder is read, not the hub's repository of that name"
    ]
