"""Uploads in parts, as OpenAI's client makes them."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
from serving import make_service, served

import xl2jax
from xl2jax.errors import UserError
from xl2jax.serving import partial
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
    Uploads(tmp_path, 1000, 1500)
    assert left.exists()  # another server may be about to complete it
    os.utime(left, (0, 0))  # as a killed server leaves it
    assert Uploads(tmp_path, 1000, 1500).room() == 1500


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
