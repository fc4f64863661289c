"""Uploads in parts, as OpenAI's client makes them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serving import make_service, served, wait_for
from starlette.datastructures import UploadFile

import xl2jax
from xl2jax.errors import UserError
from xl2jax.serving import bodies, partial
from xl2jax.serving import uploads as uploads_module
from xl2jax.serving.errors import RequestError
from xl2jax.serving.limits import Limits
from xl2jax.serving.partial import Completion, PartialUploads, Start
from xl2jax.serving.service import Service
from xl2jax.serving.uploads import Uploads

DATA = bytes(range(256)) * 1000
MD5 = hashlib.md5(DATA).hexdigest()
UNKNOWN = "upload_" + "0" * 32


@pytest.fixture(scope="module")
def service(model: xl2jax.Model, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return make_service(model, tmp_path_factory.mktemp("serving"), limits=Limits(video_bytes=1 << 20))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with served(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def pending(service: Service) -> list[Path]:
    return list(service.partial._folder.iterdir())


def test_a_file_in_parts_is_the_file(client: openai.OpenAI, service: Service, tmp_path: Path) -> None:
    path = tmp_path / "talk.mp4"
    path.write_bytes(DATA)
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="video/mp4", purpose="user_data", part_size=100_000, md5=MD5
    )
    assert (upload.status, upload.bytes) == ("completed", len(DATA))
    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == DATA
    assert client.files.retrieve(upload.file.id).filename == "talk.mp4"
    assert pending(service) == []
    client.files.delete(upload.file.id)


def test_parts_are_joined_in_the_order_that_is_asked_for(client: openai.OpenAI, service: Service) -> None:
    """Wrong orders and sizes are refused, and the same upload can still be completed."""
    started = client.uploads.create(bytes=len(DATA), filename="v.mp4", mime_type="video/mp4", purpose="user_data")
    assert started.status == "pending"
    assert started.expires_at == started.created_at + partial.LIFETIME
    second, first = (client.uploads.parts.create(started.id, data=half).id for half in (DATA[70_000:], DATA[:70_000]))
    with pytest.raises(openai.BadRequestError) as e:
        client.uploads.parts.create(started.id, data=b"x")
    assert e.value.code == "wrong_size"
    wrong: list[tuple[list[str], str | None]] = [
        ([second, first], "wrong_md5"), ([first], "wrong_size"), ([first, first], None), ([first, UNKNOWN], None),
        ([first, "../about.json"], None), ([], None),
    ]  # fmt: skip
    for ids, code in wrong:
        with pytest.raises(openai.BadRequestError) as e:
            client.uploads.complete(started.id, part_ids=ids, md5=MD5)
        assert e.value.code == code
    done = client.uploads.complete(started.id, part_ids=[first, second], md5=MD5.upper())
    assert done.file is not None
    assert client.files.content(done.file.id).read() == DATA
    client.files.delete(done.file.id)
    with pytest.raises(openai.NotFoundError):
        client.uploads.complete(started.id, part_ids=[first, second])


def test_parts_that_come_together_keep_to_the_size(tmp_path: Path) -> None:
    uploads = PartialUploads(tmp_path / "parts", Uploads(tmp_path / "uploads", 1000, 1500))
    name = uploads.start(Start(bytes=1000, filename="v.mp4"))["id"]
    gate = threading.Barrier(8)

    class Slow(io.BytesIO):
        """All parts are open before one of them has ended."""

        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() == 0:
                gate.wait(timeout=20)
            return super().read(100)

    def add(_: int) -> bool:
        try:
            uploads.add(name, Slow(bytes(250)))
        except RequestError as e:
            return e.code != "wrong_size"
        return True

    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(add, range(8)))
    on_disk = sum(path.stat().st_size for path in (tmp_path / "parts" / name).glob("part_*"))
    assert on_disk == 250 * sum(stored) <= 1000
    # What was refused is not counted: the rest still fits.
    left = 1000 - on_disk
    if left:
        uploads.add(name, io.BytesIO(bytes(left)))
    with pytest.raises(RequestError):
        uploads.add(name, io.BytesIO(b"1"))


def test_a_full_disk_leaves_no_file_that_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(tmp_path, 1000, 1500)

    def full(*_: object) -> str:
        raise UserError("no space left")

    monkeypatch.setattr("xl2jax.serving.uploads.json.dumps", full)
    with pytest.raises(RequestError) as e:
        uploads.add(io.BytesIO(bytes(700)), "v.mp4", "user_data")
    assert e.value.status == 507
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / f"file-{'0' * 32}.data"
    left.write_bytes(bytes(700))
    PartialUploads(tmp_path / "parts", uploads)
    assert left.exists()  # another server may be about to complete it
    os.utime(left, (0, 0))  # as a killed server leaves it
    PartialUploads(tmp_path / "parts", uploads)
    assert uploads.room() == 1500


class Killed(BaseException):
    """A kill: nothing catches it."""


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_kill_while_parts_are_joined_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Parts are appended in place. Wherever that was cut off, the same request completes the upload later."""
    folder, left = tmp_path / "parts", calls
    uploads = Uploads(tmp_path / "uploads", 1 << 20, 1 << 20)
    before = PartialUploads(folder, uploads)
    name = before.start(Start(bytes=len(DATA), filename="v.mp4"))["id"]
    cuts = (0, 100_000, 100_001, len(DATA))
    ids = [before.add(name, io.BytesIO(DATA[a:b]))["id"] for a, b in itertools.pairwise(cuts)]
    copy, unlink = shutil.copyfileobj, Path.unlink

    def killed_now() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def copying(source: Any, target: Any, size: int) -> None:
        if killed_now():
            target.write(source.read(10))
            target.flush()
            raise Killed
        copy(source, target, size)

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("part_") and killed_now():
            raise Killed
        unlink(path, missing_ok)

    largest = []

    def replacing(path: Path, target: Path) -> Path:
        largest.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))
        if path.name == "joined" and killed_now():
            raise Killed
        os.replace(path, target)
        return target

    with monkeypatch.context() as patch:
        patch.setattr(partial.shutil, "copyfileobj", copying)
        patch.setattr(Path, "unlink", unlinking)
        patch.setattr(Path, "replace", replacing)
        asked = Completion(part_ids=ids, md5=MD5)
        if calls < 6:
            with pytest.raises(Killed):
                before.complete(name, asked)
        else:
            before.complete(name, asked)
            assert max(largest) < 1.5 * len(DATA)
    after = PartialUploads(folder, uploads)
    if calls < 6:
        with pytest.raises(RequestError, match="other parts"):
            after.complete(name, Completion(part_ids=ids[::-1]))
        with pytest.raises(RequestError, match="being completed"):
            after.add(name, io.BytesIO(b"1"))
        with pytest.raises(RequestError, match="MD5"):
            after.complete(name, Completion(part_ids=ids, md5="0"))
        after.complete(name, asked)
    (file,) = uploads.list()
    assert uploads.path(file["id"]).read_bytes() == DATA
    assert list(folder.iterdir()) == []


class Cut:
    """A server with an upload that it was killed while completing, and servers that start after it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, point: str):
        self.folder = folder
        before = self.start()
        self.name = before.start(Start(bytes=len(DATA), filename="v.mp4"))["id"]
        self.ids = [before.add(self.name, io.BytesIO(half))["id"] for half in (DATA[:70_000], DATA[70_000:])]
        for part in folder.glob("parts/*/part_*"):
            os.utime(part, (0, 0))  # so old that bytes without a description count as left behind

        def killed(*_: object, **__: object) -> None:
            raise Killed

        adopt = Uploads.adopt

        def adopting(*args: Any) -> None:
            adopt(*args)
            raise Killed

        def replacing(path: Path, target: Path) -> Path:
            if path.name == "joined":
                os.utime(path, (0, 0))
                if point == "before the move":
                    raise Killed
            os.replace(path, target)
            return target

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replacing)
            if point == "after the move":
                patch.setattr(Uploads, "_describe_new", killed)
            if point == "after the description":
                patch.setattr(Uploads, "adopt", adopting)
            with pytest.raises(Killed):
                before.complete(self.name, Completion(part_ids=self.ids, md5=MD5))

    def start(self) -> PartialUploads:
        self.uploads = Uploads(self.folder / "uploads", 1 << 20, 1 << 20)
        return PartialUploads(self.folder / "parts", self.uploads)

    def data(self) -> list[str]:
        return [path.stem for path in self.folder.glob("uploads/*.data")]

    def promised(self) -> str:
        order = json.loads((self.folder / "parts" / self.name / "order.json").read_text())
        return str(order["file"])


POINTS = ("before the move", "after the move", "after the description")


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_while_a_file_appears_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """The same request gets the file under the id that was chosen before the kill, also from a later server."""
    cut = Cut(tmp_path, monkeypatch, point)
    promised = cut.promised()
    moved = [] if point == "before the move" else [promised]
    listed = [promised] if point == "after the description" else []
    after = cut.start()
    assert cut.data() == moved
    assert [file["id"] for file in cut.uploads.list()] == listed
    for ids, md5, error in ((cut.ids[::-1], MD5, "other parts"), (cut.ids, "0", "MD5")):
        with pytest.raises(RequestError, match=error):
            after.complete(cut.name, Completion(part_ids=ids, md5=md5))
    with pytest.raises(RequestError, match="being completed"):
        after.add(cut.name, io.BytesIO(b"1"))
    done = after.complete(cut.name, Completion(part_ids=cut.ids, md5=MD5))
    assert (done["status"], done["file"]["id"], done["file"]["bytes"]) == ("completed", promised, len(DATA))
    assert cut.uploads.list() == [done["file"]]
    assert cut.uploads.path(promised).read_bytes() == DATA
    assert list((tmp_path / "parts").iterdir()) == []
    cut.start()
    assert cut.data() == [promised]


@pytest.mark.parametrize("ending", ["cancelled", "expired"])
@pytest.mark.parametrize("point", POINTS)
def test_an_upload_that_ends_leaves_no_bytes_without_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, ending: str
) -> None:
    cut = Cut(tmp_path, monkeypatch, point)
    kept = [cut.promised()] if point == "after the description" else []
    if ending == "cancelled":
        cut.start().cancel(cut.name)
    else:
        now = partial.time.time()
        monkeypatch.setattr(partial.time, "time", lambda: now + partial.LIFETIME + 1)
        cut.start()
    assert cut.data() == [file["id"] for file in cut.uploads.list()] == kept
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_kill_while_a_completed_upload_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000, 1500)
    server = PartialUploads(tmp_path / "parts", uploads)
    name = server.start(Start(bytes=700, filename="v.mp4"))["id"]
    asked = Completion(part_ids=[server.add(name, io.BytesIO(bytes(700)))["id"]])

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(partial.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            server.complete(name, asked)
    with pytest.raises(RequestError) as e:
        server.complete(name, asked)
    assert e.value.status == 404
    PartialUploads(tmp_path / "parts", uploads)
    assert list((tmp_path / "parts").iterdir()) == []
    (file,) = uploads.list()
    assert uploads.path(file["id"]).read_bytes() == bytes(700)


def test_a_description_that_does_not_fit_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000, 700)
    server = PartialUploads(tmp_path / "parts", uploads)
    name = server.start(Start(bytes=700, filename="v.mp4"))["id"]
    asked = Completion(part_ids=[server.add(name, io.BytesIO(bytes(700)))["id"]])

    def full(*_: object) -> None:
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Uploads, "_describe_new", full)
        with pytest.raises(RequestError) as e:
            server.complete(name, asked)
    assert e.value.status == 507
    assert uploads.list() == []
    file = server.complete(name, asked)["file"]
    assert uploads.path(file["id"]).read_bytes() == bytes(700)


def test_two_servers_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither removes what the other one is working on, however old it is."""
    uploads = [Uploads(tmp_path / "uploads", 1000, 1500) for _ in range(2)]
    first, second = (PartialUploads(tmp_path / "parts", each) for each in uploads)
    name = first.start(Start(bytes=700, filename="v.mp4"))["id"]
    part = first.add(name, io.BytesIO(bytes(700)))["id"]
    adopt, refused = uploads[0].adopt, []

    def meanwhile(*args: Any) -> dict[str, Any]:
        with pytest.raises(RequestError) as e:
            second.complete(name, Completion(part_ids=[part]))
        refused.append(e.value.status)
        with monkeypatch.context() as later:
            later.setattr(partial.time, "time", lambda: 1e12)
            PartialUploads(tmp_path / "parts", uploads[1])
        return adopt(*args)

    monkeypatch.setattr(uploads[0], "adopt", meanwhile)
    file = first.complete(name, Completion(part_ids=[part]))["file"]
    assert refused == [409]
    assert uploads[1].path(file["id"]).stat().st_size == 700
    uploads[1].remove(file["id"])
    assert uploads[0].room() == 1500
    with pytest.raises(RequestError) as e:
        second.complete(name, Completion(part_ids=[part]))
    assert e.value.status == 404


def test_files_expire_when_they_are_asked_to(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays = client.files.create(file=("a.mp4", b"1"), purpose="user_data")
    goes = client.files.create(
        file=("b.mp4", b"2"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert stays.expires_at is None
    assert goes.expires_at == goes.created_at + 3600
    form = {"purpose": "user_data", "expires_after": '{"anchor": "created_at", "seconds": 3600}'}  # as curl sends it
    told = httpx2.post(f"{client.base_url}files", data=form, files={"file": ("c.mp4", b"4")}).json()
    assert told["expires_at"] == told["created_at"] + 3600
    client.files.delete(told["id"])
    started = client.uploads.create(
        bytes=1,
        filename="v.mp4",
        mime_type="video/mp4",
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    with pytest.raises(openai.BadRequestError, match="an empty part"):
        client.uploads.parts.create(started.id, data=b"")
    part = client.uploads.parts.create(started.id, data=b"3")
    joined = client.uploads.complete(started.id, part_ids=[part.id]).file
    assert joined is not None
    assert joined.expires_at == joined.created_at + 3600
    assert len(list(client.files.list())) == 3
    now = uploads_module.time.time()
    monkeypatch.setattr(uploads_module.time, "time", lambda: now + 3700)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(goes.id)
    service.uploads.room()
    assert [path.stem for path in service.uploads._folder.glob("*.data")] == [stays.id]
    client.files.delete(stays.id)
    for wrong in ({"anchor": "created_at", "seconds": 10}, {"anchor": "used_at", "seconds": 3600}, {"seconds": 3600}):
        with pytest.raises(openai.BadRequestError) as e:
            client.files.create(file=("b.mp4", b"2"), purpose="user_data", expires_after=wrong)  # type: ignore[arg-type]
        assert e.value.param == "expires_after"


def test_an_upload_of_which_nothing_comes_ends(model: xl2jax.Model, tmp_path: Path) -> None:
    service = make_service(model, tmp_path, limits=Limits(idle_seconds=0.2))
    with served(service) as address:
        host, port = address.removeprefix("http://").split(":")
        head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(f"{head}Content-Length: 1000\r\n\r\n--x\r\n".encode())
            answer = b"".join(iter(lambda: slow.recv(1000), b""))  # to its end: the connection is closed
        assert b" 408 " in answer
        wait_for(lambda: service.in_flight == 0)


def test_an_upload_that_trickles_ends(model: xl2jax.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that come now and then do not hold a place for ever. One that is slow but steady is stored."""
    monkeypatch.setattr(bodies, "SLOWEST", 1000)
    service = make_service(model, tmp_path, limits=Limits(idle_seconds=0.5))
    with served(service) as address:
        host, port = address.removeprefix("http://").split(":")
        for size, status in ((10, b" 408 "), (500, b" 200 ")):
            parts = [b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n', *[bytes(size)] * 12]
            parts.append(b"\r\n--x--\r\n")
            head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            with socket.create_connection((host, int(port)), timeout=20) as slow:
                slow.sendall(f"{head}Content-Length: {sum(map(len, parts))}\r\nConnection: close\r\n\r\n".encode())
                with contextlib.suppress(OSError):  # it was closed
                    for part in parts:
                        slow.sendall(part)
                        time.sleep(0.2)
                assert status in slow.recv(1000)
        wait_for(lambda: service.in_flight == 0)


@pytest.mark.parametrize(
    ("charset", "error", "status"),
    [("undefined", None, 400), ("utf-8", OSError(errno.ENOSPC, "No space left on device"), 507)],
)
def test_forms_that_cannot_be_stored(
    client: openai.OpenAI,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    charset: str,
    error: Exception | None,
    status: int,
) -> None:
    """Their charset is no text, or the disk of temporary files is full."""

    async def write(self: UploadFile, data: bytes) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(UploadFile, "write", write)
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    kind = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    answer = httpx2.post(f"{client.base_url}files", content=form, headers=kind)
    assert (answer.status_code, list(service.uploads.list())) == (status, [])


def test_a_cancelled_upload_is_gone(client: openai.OpenAI, service: Service) -> None:
    started = client.uploads.create(bytes=10, filename="v.mp4", mime_type="video/mp4", purpose="user_data")
    client.uploads.parts.create(started.id, data=b"12345")
    assert client.uploads.cancel(started.id).status == "cancelled"
    assert pending(service) == []
    for name in (started.id, UNKNOWN, "..", "upload_x"):
        response = httpx2.post(f"{client.base_url}uploads/{name}/parts", files={"data": b"1"})
        assert response.status_code == 404, name


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        ('{"bytes": 2000000, "filename": "v"}', "application/json", 413),
        ('{"bytes": 0, "filename": "v"}', "application/json", 400),
        ('{"bytes": 1e3, "filename": "v"}', "application/json", 400),
        ('{"filename": "v"}', "application/json", 400),
        ("[", "application/json", 400),
        ('{"bytes": 1, "filename": "v"}', "text/plain", 415),
    ],
)
def test_wrong_beginnings(client: openai.OpenAI, service: Service, content: str, kind: str, status: int) -> None:
    response = httpx2.post(f"{client.base_url}uploads", content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert pending(service) == []


def test_a_restart_finds_uploads_and_removes_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000, 1500)
    before = PartialUploads(tmp_path / "parts", uploads)
    first, old = (before.start(Start(bytes=700, filename="v.mp4"))["id"] for _ in range(2))
    with pytest.raises(RequestError) as e:  # both are counted
        before.start(Start(bytes=700, filename="v.mp4"))
    assert e.value.status == 507
    part = before.add(first, io.BytesIO(bytes(700)))["id"]
    (tmp_path / "parts" / old / "about.json").unlink()  # as a server leaves it that is killed while it begins an upload
    after = PartialUploads(tmp_path / "parts", uploads)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [first]
    file = after.complete(first, Completion(part_ids=[part]))["file"]
    assert uploads.path(file["id"]).stat().st_size == 700

    late = after.start(Start(bytes=700, filename="v.mp4"))["id"]
    now = partial.time.time()
    monkeypatch.setattr(partial.time, "time", lambda: now + partial.LIFETIME + 1)
    with pytest.raises(RequestError) as e:
        after.add(late, io.BytesIO(b"1"))
    assert e.value.status == 404
    PartialUploads(tmp_path / "parts", uploads)
    assert list((tmp_path / "parts").iterdir()) == []
