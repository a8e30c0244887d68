"""`fastirt verify`: counts, digests, and every file decoded, of files and of a packed store."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil

import pytest

from fastirt.datasets.archives.published import PUBLISHED, Archive, Published
from tests.helpers import folder_flags, run_cli, write_images


def verify(capsys, *words) -> tuple[int, str]:
    code = run_cli("verify", *words)
    return code, capsys.readouterr().out


@pytest.fixture
def sop(tmp_path, monkeypatch):
    """Two classes of four images in each split, with its archive beside it."""
    root = tmp_path / "Stanford_Online_Products"
    write_images(root, 4, 4)
    for split, labels in (("train", (0, 1)), ("test", (2, 3))):
        rows = [f"{i} {c} 1 class{c:02d}/{i}.jpg" for c in labels for i in range(4)]
        (root / f"Ebay_{split}.txt").write_text("\n".join(["image_id class_id super_class_id path", *rows]) + "\n")
    data = b"archive"
    (tmp_path / "Stanford_Online_Products.zip").write_bytes(data)
    archive = Archive("Stanford_Online_Products.zip", (), 7, hashlib.sha256(data).hexdigest(), "", root.name, 1)
    counts = {"train": 8, "test": 8}, {"train": 2, "test": 2}
    md5 = hashlib.md5((root / "class00/0.jpg").read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, "sop", Published("sop", *counts, archive, (("class00/0.jpg", md5),)))
    return root


def test_a_whole_set_and_what_is_wrong_with_others(sop, capsys, monkeypatch):
    code, out = verify(capsys, "sop", sop.parent)
    assert code == 0 and "nothing is wrong" in out and "WRONG" not in out
    for words in ("sha256 of Stanford_Online_Products.zip", "md5 of class00/0.jpg", "test classes", "16"):
        assert words in out
    whole = [line for line in out.splitlines() if line.startswith("sha256 of the files")]
    (sop / "class00/0.jpg").write_bytes((sop / "class00/1.jpg").read_bytes())
    (sop / "class01/2.jpg").write_bytes((sop / "class01/2.jpg").read_bytes()[:200])
    (sop / "class03/3.jpg").write_bytes(b"<html>")
    (sop.parent / "Stanford_Online_Products.zip").write_bytes(b"archivE")
    monkeypatch.setitem(PUBLISHED, "sop", dataclasses.replace(PUBLISHED["sop"], images={"train": 8, "test": 9}))
    code, out = verify(capsys, "sop", sop)
    problems = [line for line in out.splitlines() if line.startswith("wrong: ")]
    assert code == 1 and len(problems) == 5 and "5 wrong" in out
    for words in ("class01/2.jpg", "class03/3.jpg", "md5 of class00/0.jpg", "test images: 8 instead of 9", ".zip: "):
        assert any(words in problem for problem in problems)
    assert "14" in out and not [line for line in out.splitlines() if line in whole]
    (sop / "class02/1.jpg").unlink()
    code, out = verify(capsys, "sop", sop)
    assert code == 1 and "Ebay_test.txt: row 3: no file" in out and ".zip: " in out


def test_own_sets_and_packed_stores(image_folder, tmp_path, capsys):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    store = tmp_path / "store.pack"
    assert run_cli("pack", store, *folder_flags(folder), "--resize-size", 18, "--workers", 1) == 0
    capsys.readouterr()
    code, out = verify(capsys, "folder", folder, "--packed", store, "--workers", 2)
    assert code == 0 and "packed images decoded" in out and "104" in out
    train, test = (sorted((folder / split).rglob("*.jpg"))[0] for split in ("train", "test"))
    own, times = test.read_bytes(), (test.stat().st_atime_ns, test.stat().st_mtime_ns)
    test.write_bytes(train.read_bytes())
    code, out = verify(capsys, "folder", folder)
    assert code == 1 and "1 copy between splits or classes" in out
    test.write_bytes(own)
    os.utime(test, ns=times)
    with open(store, "r+b") as file:
        file.seek(400)
        file.write(b"?" * 8)
    code, out = verify(capsys, "folder", folder, "--packed", store)
    assert code == 1 and "wrong checksum" in out
    for size in (1000, 10, 0):
        os.truncate(store, size)
        code, out = verify(capsys, "folder", folder, "--packed", store)
        assert code == 1 and "files decoded" in out and "damaged, foreign or stale" in out
    next(folder.rglob("*.jpg")).write_bytes(b"")
    code, out = verify(capsys, "folder", folder, "--packed", store)
    assert code == 1 and "empty" in out and "stale" in out
    assert run_cli("verify", "folder", tmp_path / "nowhere") == 2
    assert run_cli("verify", "folder", folder, "--packed", tmp_path / "nowhere") == 2
    with pytest.raises(SystemExit):
        run_cli("verify", "folder", folder, "--workers", -1)
    with pytest.raises(SystemExit):
        run_cli("verify", "folders", folder)
    assert "invalid choice: 'folders'" in capsys.readouterr().err
