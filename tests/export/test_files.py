"""A path is checked before hours of training, and a file is whole or not there."""

import os
import stat

import pytest

from lightning_step.errors import ConfigurationError
from lightning_step.export import atomic_write, check_writable


@pytest.fixture
def umask():
    """Sets the umask of the process and puts it back."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def write_half(path, error):
    with atomic_write(path) as temporary:
        temporary.write_text("half of it")
        raise error


def test_folders_that_are_missing_are_made_and_nothing_else_is(tmp_path):
    path = tmp_path / "a" / "b" / "model.safetensors"
    assert check_writable(str(path)) == path
    assert list(path.parent.iterdir()) == []


def test_checking_leaves_a_file_that_is_there_as_it_was(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    check_writable(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"^Expected `path` to name a file, but got the folder '.*'\. Add a file name"
    ):
        check_writable(tmp_path)


def test_a_path_below_a_regular_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigurationError, match=r"^Expected `path` to be writable, but got '.*/file/sub/model': .*irectory"
    ):
        check_writable(tmp_path / "file" / "sub" / "model")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux keeps a file system that nobody can write to")
@pytest.mark.parametrize("path", ["/proc/model.safetensors", "/proc/self/out/model.safetensors"])
def test_a_file_system_that_takes_no_files_is_refused(path):
    with pytest.raises(ConfigurationError, match=r"^Expected `path` to be writable.*Choose a folder that this process may"):
        check_writable(path)


@pytest.mark.parametrize(("name", "reason"), [("x" * 250, "File name too long"), ("a\0b", "null byte")])
def test_a_name_that_the_file_system_refuses_is_found_at_once(name, reason, tmp_path):
    with pytest.raises(ConfigurationError, match=f"Expected `path` to be writable.*{reason}"):
        check_writable(tmp_path / name)


def test_a_device_is_not_replaced_by_a_file():
    with pytest.raises(ConfigurationError, match=f"to name a file, but got '{os.devnull}', a device or a pipe"):
        check_writable(os.devnull)
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent, "a rename across file systems is a copy"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(old, error, tmp_path):
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
    with pytest.raises(type(error)):
        write_half(path, error)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o000, 0o666)])
def test_permissions_follow_the_umask(mask, mode, tmp_path, umask):
    umask(mask)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert os.umask(mask) == mask, "the umask of the process was not put back"
