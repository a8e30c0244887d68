"""Downloads from a server that breaks off, sends other bytes and lies about sizes; archives that
reach outside their folder."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from fastirt.atomic import try_lock
from fastirt.datasets.archives.download import download
from fastirt.datasets.archives.published import PUBLISHED
from fastirt.datasets.archives.unpack import unpack
from fastirt.datasets.cub_sop_inshop import load_cub200, load_sop
from fastirt.errors import UserError
from tests.datasets.archive import DATA, FILES, HASTE, NAMES, facts, fetch, tgz
from tests.datasets.http_server import serve
from tests.helpers import ROOT, run_cli


def refusal(folder: Path, *urls: str, **changes) -> str:
    with pytest.raises(UserError) as caught:
        fetch(folder, *urls, **changes)
    assert "\n" not in str(caught.value)
    assert not (folder / "CUB_200_2011").exists() and not list(folder.glob(".CUB*"))
    return str(caught.value)


def assert_whole(folder: Path) -> None:
    root = folder / "CUB_200_2011"
    found = {f"CUB_200_2011/{f.relative_to(root)}": f.read_bytes() for f in root.rglob("*") if f.is_file()}
    assert found == {name: data for name, data in FILES.items() if name.startswith("CUB") and "._" not in name}
    assert (folder / "CUB_200_2011.tgz").read_bytes() == DATA
    left = {path.name for path in folder.iterdir()}
    assert left == {"CUB_200_2011", "CUB_200_2011.tgz", ".fastirt-download.lock"}


@pytest.mark.parametrize(
    "ways",
    [
        ("fine",),
        ("breaks off", "breaks off", "fine"),
        ("500", "stalls", "503", "fine"),
        ("breaks off", "ignores ranges"),
        ("breaks off", "other range", "fine"),
        ("states nothing",),
        ("crawls", "fine"),
    ],
    ids=" then ".join,
)
def test_a_server_that_breaks_off_is_asked_again(tmp_path, ways):
    with serve(DATA, *ways) as server:
        assert fetch(tmp_path, server.url) == tmp_path / "CUB_200_2011"
    assert_whole(tmp_path)
    if ways[0] == "breaks off":
        assert server.ranges[1] == f"bytes={len(DATA) // 2}-"


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("404", "HTTP 404"),
        ("loop", "HTTP 302"),
        ("500", "HTTP 500"),
        ("stalls", "no answer for 0.4 s"),
        ("states more", f"{len(DATA) + 1000:,} bytes"),
        ("states less", f"{len(DATA) - 1000:,} bytes"),
        ("sends more", "more bytes"),
        ("other", "sha256"),
    ],
)
def test_what_no_server_has_is_refused_in_one_line(tmp_path, way, words):
    with serve(DATA, way) as server:
        assert words in refusal(tmp_path, server.url)
    assert not (tmp_path / "CUB_200_2011.tgz").exists()
    if way == "other":  # deleted: the next call does not trip over it
        assert not (tmp_path / "CUB_200_2011.tgz.part").exists()
    with serve(DATA, way if way == "other" else "404") as bad, serve(DATA) as good:  # the next address has it
        fetch(tmp_path, bad.url, good.url)
    assert_whole(tmp_path)


def test_a_changed_file_is_not_mixed_with_the_bytes_of_the_old_one(tmp_path):
    part = tmp_path / "CUB_200_2011.tgz.part"
    with serve(DATA) as server:
        part.write_bytes(b"old" * 100)
        part.with_name(part.name + ".etag").write_text(f'{{"url": "{server.url}", "tag": "\\"v0\\""}}')
        fetch(tmp_path, server.url)
        assert server.ranges == ["bytes=300-"]
    assert_whole(tmp_path)


def test_a_complete_folder_ends_the_call_and_an_incomplete_one_is_left_alone(tmp_path, caplog):
    with serve(DATA) as server, caplog.at_level("INFO", "fastirt"):
        fetch(tmp_path, server.url)
        caplog.clear()
        fetch(tmp_path, server.url)
        assert "is there already" in caplog.text and len(server.ranges) == 1
    (tmp_path / "CUB_200_2011/images" / NAMES[0]).unlink()
    with pytest.raises(UserError, match="row 1"):
        fetch(tmp_path)
    assert (tmp_path / "CUB_200_2011").exists()


def test_two_downloads_do_not_mix(tmp_path):
    with open(tmp_path / ".fastirt-download.lock", "w") as file:
        assert try_lock(file)
        assert "another download" in refusal(tmp_path)


def test_no_room_and_no_other_protocol(tmp_path):
    assert "GB needed" in refusal(tmp_path, "http://127.0.0.1:9/x", unpacked=10**18)
    for url in ("ftp://127.0.0.1/x", "http://", "http://[", "http://127.0.0.1:99999/x", "http://127.0.0.1/a b"):
        assert f"--url '{url}': is no http" in refusal(tmp_path, url)
    assert "127.0.0.1:9" in refusal(tmp_path, "http://127.0.0.1:9/x")  # nobody listens


def test_an_archive_on_disk_is_checked_and_kept(tmp_path):
    file = tmp_path / "elsewhere.tgz"
    file.write_bytes(DATA[:-1] + b"!")
    with pytest.raises(UserError, match="sha256"):
        download(facts(DATA), load_cub200, tmp_path / "out", archive_file=file, progress=False)
    assert file.exists()
    file.write_bytes(DATA)
    assert download(facts(DATA), load_cub200, tmp_path / "out", archive_file=file, progress=False).is_dir()
    assert not (tmp_path / "out/CUB_200_2011.tgz").exists()


def test_a_killed_download_goes_on(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.datasets.archive import fetch; fetch(Path(sys.argv[1]), sys.argv[2])"
    )
    with serve(DATA) as server:
        server.delay = 0.05
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), server.url], cwd=ROOT)
        part = tmp_path / "CUB_200_2011.tgz.part"
        while not (part.exists() and part.stat().st_size > 20_000):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        had, server.delay = part.stat().st_size, 0.0
        stale = tmp_path / ".CUB_200_2011.unpacking"  # of a call that was killed while it unpacked
        stale.mkdir()
        (stale / "half.jpg").touch()
        fetch(tmp_path, server.url)
        assert server.ranges == [None, f"bytes={had}-"]
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ({"CUB_200_2011/../../out.jpg": b""}, "outside"),
        ({"/tmp/out.jpg": b""}, "outside"),
        ({"CUB_200_2011/link.jpg": "../../x"}, "link"),
        ({"CUB_200_2011/big": bytes(900_000)}, "states more"),
        ({"CUB_200_2011/images.txt/x": b""}, "cannot be unpacked"),
        ({"CUB_200_2011/./images.txt": b""}, "twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_an_archive_that_would_do_harm_is_refused(tmp_path, member, words):
    data = tgz({**FILES, **member})
    with serve(data) as server, pytest.raises(UserError, match=words):
        download(facts(data), load_cub200, tmp_path, urls=[server.url], patience=HASTE, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fastirt-download.lock", "CUB_200_2011.tgz"]


def sop_zip(files: dict[str, bytes], link: str = "") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"Stanford_Online_Products/{name}", data)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def test_a_zip_is_unpacked_and_one_that_lies_or_links_is_refused(tmp_path):
    header = b"image_id class_id super_class_id path\n"
    files = {f"a_final/{i}.JPG": bytes(2000) for i in range(8)}
    for split, first in (("train", 0), ("test", 4)):
        rows = [b"%d %d 1 a_final/%d.JPG\n" % (i, i // 2, i) for i in range(first, first + 4)]
        files[f"Ebay_{split}.txt"] = header + b"".join(rows)

    def get(data: bytes, folder: str) -> Path:
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "Stanford_Online_Products.zip"
        file.write_bytes(data)
        published = facts(data, file.name)
        return download(published, load_sop, tmp_path / folder, progress=False)

    data = sop_zip(files)
    assert (get(data, "whole") / "a_final/7.JPG").read_bytes() == bytes(2000)
    with pytest.raises(UserError, match="link"):
        get(sop_zip(files, "Stanford_Online_Products/passwd"), "link")
    # 2,000 bytes that the directory states to be 20, once in front of the file and once at the end
    lie = data.replace((2000).to_bytes(4, "little"), (20).to_bytes(4, "little"))
    with pytest.raises(UserError, match="cannot be unpacked"):
        get(lie, "lie")
    with pytest.raises(UserError, match="cannot be unpacked|cut off"):
        unpack(facts(DATA).archive, _cut(tmp_path), tmp_path / "cut", progress=False)
    assert not (tmp_path / "cut").exists()


def _cut(folder: Path) -> Path:
    (folder / "cut.tgz").write_bytes(DATA[: len(DATA) // 2])
    return folder / "cut.tgz"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PUBLISHED, "cub200", facts(DATA))
    with serve(DATA, "breaks off", "fine") as server:
        assert run_cli("download", "cub200", tmp_path, "--url", server.url) == 0
    out, err = capsys.readouterr()
    assert f"--data-path {tmp_path / 'CUB_200_2011'}" in out and "B/s" in err
    assert run_cli("download", "inshop", tmp_path / "clothes") == 2
    out = capsys.readouterr().out
    assert all(word in out for word in ("list_eval_partition.txt", "img.zip", "fastirt verify inshop"))
    for seconds in ("0", "inf", "nan"):
        with pytest.raises(SystemExit):
            run_cli("download", "cub200", tmp_path, "--timeout", seconds)
        assert "must be above 0" in capsys.readouterr().err
    assert run_cli("download", "cub200", os.devnull) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
