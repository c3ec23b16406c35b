"""Where something may be written is known before any work."""

import os

import pytest

from hici.files import check_target, check_writable


def test_a_place_that_does_not_exist_yet(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_target(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_file_on_the_way(tmp_path):
    (tmp_path / "f").write_text("a file")
    for check in (check_target, check_writable):
        with pytest.raises(ValueError, match=r"nothing can be written in .*: .*f is a file; give another place"):
            check(tmp_path / "f" / "x" / "y")


def test_a_directory_without_permission(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    real = os.access  # replaced, since root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and real(path, mode))
    for check in (check_target, check_writable):
        with pytest.raises(ValueError, match=r"nothing can be written in .*closed is not writable; give another place"):
            check(tmp_path / "closed" / "x" / "y")
    check_target(tmp_path / "open" / "x")
