"""The folder of an export is complete, or as it was."""

import os
import re

import pytest

from fastirt.errors import UserError
from fastirt.export.new_folder import REPORT, check_place, new_folder


def test_what_another_process_made_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="exists"), new_folder(out, overwrite=False):
        out.mkdir()
        (out / "precious").touch()
    assert (out / "precious").exists() and list(tmp_path.iterdir()) == [out]


def test_an_earlier_export_survives_a_failed_rename(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with new_folder(out, overwrite=False) as folder:
        (folder / REPORT).write_text("first")
    rename = os.replace

    def failing(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(18, "Invalid cross-device link", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match=f"{re.escape(str(out))}: Invalid cross-device link: nothing was exported"):
        with new_folder(out, overwrite=True):
            pass
    assert (out / REPORT).read_text() == "first" and list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="card: No space left on device: nothing was exported"):
        with new_folder(tmp_path / "out", overwrite=False):
            raise OSError(28, "No space left on device", "card")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_a_living_one_left_alone(tmp_path):
    out, left, other = tmp_path / "out", tmp_path / ".out.1.tmp", tmp_path / ".outer.1.tmp"
    aside = tmp_path / ".out.1.old"  # killed between the two renames
    for folder in (left, other, aside):
        folder.mkdir()
    (aside / REPORT).write_text("first")
    with new_folder(out, overwrite=True) as folder:
        assert (out / REPORT).read_text() == "first" and not left.exists()
        living = folder.rename(tmp_path / ".out.2.tmp")  # it keeps its lock
        with new_folder(out, overwrite=True) as second:
            assert living.exists()
            (second / REPORT).write_text("second")
        assert (out / REPORT).read_text() == "second"
        living.rename(folder)
    assert sorted(tmp_path.iterdir()) == [other, out] and not any(out.iterdir())


def test_a_mount_point_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UserError, match="mount point.*below it"):
        check_place(tmp_path, overwrite=True)
