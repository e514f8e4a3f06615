"""The download against a server on this machine: whole, resumed, broken off, and not what was asked for."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from examples.pfam.cli import main
from examples.pfam.commands.options import command_line
from examples.pfam.config import HELDOUT_SAMPLE
from examples.pfam.download import DownloadError, download

CONTENT = HELDOUT_SAMPLE.read_bytes()


class Server(ThreadingHTTPServer):
    content = CONTENT
    ranges = True
    cut: int | None = None
    requests: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if self.path == "/absent":
            self.send_error(404)
        elif start >= len(self.server.content):
            self.send_error(416)
        else:
            body = self.server.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: self.server.cut])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url(server: Server, path: str = "/Pfam-A.seed.gz") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def test_a_whole_file(server: Server, tmp_path: Path) -> None:
    path = download(url(server), tmp_path / "new" / "seed.gz", progress=False)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["seed.gz"]
    download(url(server), path, progress=False)
    assert len(server.requests) == 1  # a finished file is not fetched again


def test_a_broken_transfer_resumes_where_it_stopped(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "seed.gz"
    server.cut = 4000
    with pytest.raises(DownloadError, match=r"seed\.gz\.part is kept"):
        download(url(server), path, progress=False)
    assert not path.exists()
    assert (tmp_path / "seed.gz.part").stat().st_size == 4000
    server.cut = None
    assert download(url(server), path, progress=False).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=4000-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "seed.gz.part").write_bytes(CONTENT[:100])
    server.ranges = False
    assert download(url(server), tmp_path / "seed.gz", progress=False).read_bytes() == CONTENT


def test_a_part_that_was_complete_is_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "seed.gz.part").write_bytes(CONTENT)
    assert download(url(server), tmp_path / "seed.gz", progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"<html>Not here</html>", CONTENT[:-20], CONTENT[:-8] + b"12345678"])
def test_what_is_not_whole_gzip_is_not_kept(server: Server, tmp_path: Path, content: bytes) -> None:
    server.content = content
    with pytest.raises(DownloadError, match="did not deliver a whole gzip file"):
        download(url(server), tmp_path / "seed.gz", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_went_wrong(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "seed.gz"
    assert main(["download", "--url", url(server, "/absent"), "--out", str(out), "--quiet"]) == 1
    assert "could not download" in capsys.readouterr().err
    assert main(["download", "--url", url(server), "--out", str(out), "--quiet"]) == 0
    assert f"{command_line()} train --data {out}\n" in capsys.readouterr().out
    assert gzip.decompress(out.read_bytes()).startswith(b"# STOCKHOLM 1.0")


def test_a_folder_is_no_file_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: --out {tmp_path} is a folder; give the name of a file\n"


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="could not download"):
        download("http://127.0.0.1:9/x.gz", tmp_path / "x.gz", timeout=5, progress=False)


def test_what_grows_without_end_is_not_unpacked_to_its_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.pfam.download.UNSUSPICIOUS", 1000)
    server.content = gzip.compress(b"A" * 5_000_000)[:-9]  # read to its end it would be damaged
    with pytest.raises(DownloadError, match=r"grows more than 200-fold.*it was deleted"):
        download(url(server), tmp_path / "seed.gz", progress=False)
    assert list(tmp_path.iterdir()) == []
