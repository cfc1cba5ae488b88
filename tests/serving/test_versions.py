"""Version folders on disk: publish, roll back, restore."""

import threading

import pytest

from tfvllm.errors import InputError
from tfvllm.savedmodel import versions


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"x" * 1000)
    (folder / "variables" / "data").write_bytes(b"y" * 1000)
    return folder


def test_publish_counts_up_and_keeps_what_is_there(saved, tmp_path):
    base = tmp_path / "base"
    assert versions.publish(saved, base) == base / "1"
    assert versions.publish(saved, base) == base / "2"
    assert versions.publish(saved, base, 10) == base / "10"
    assert sorted(versions.find(base)) == [1, 2, 10]
    with pytest.raises(InputError, match="has had a version 2 already"):
        versions.publish(saved, base, 2)
    with pytest.raises(InputError, match=r"no saved_model\.pb"):
        versions.publish(tmp_path / "nothing", base)
    with pytest.raises(InputError, match="is a SavedModel itself"):
        versions.publish(saved, saved)


def test_rollback_and_restore(saved, tmp_path):
    base = tmp_path / "base"
    for _ in range(3):
        versions.publish(saved, base)
    assert versions.rollback(base) == [3]
    assert sorted(versions.find(base)) == [1, 2]
    assert versions.publish(saved, base).name == "4"  # a retired number is not used again
    assert versions.rollback(base, to=1) == [4, 2]
    assert sorted(versions.find(base)) == [1]
    with pytest.raises(InputError, match="expected an older one"):
        versions.rollback(base)
    assert versions.restore(base, 2) == base / "2"
    assert sorted(versions.find(base)) == [1, 2]
    with pytest.raises(InputError, match="no retired version 2; retired are: 3, 4"):
        versions.restore(base, 2)


def test_only_whole_versions_are_found(saved, tmp_path):
    base = tmp_path / "base"
    versions.publish(saved, base)
    (base / "2").mkdir()  # empty
    (base / "latest").mkdir()
    (base / ".3.partial").mkdir()
    (base / "-4").mkdir()
    assert list(versions.find(base)) == [1]


def test_a_reader_never_sees_half_a_version(saved, tmp_path):
    base, seen, stop = tmp_path / "base", [], threading.Event()
    for i in range(200):
        (saved / "variables" / str(i)).write_bytes(b"z")

    def watch():
        while not stop.is_set():
            for folder in versions.find(base).values():
                seen.append(len(list((folder / "variables").iterdir())))

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(10):
        versions.publish(saved, base)
    stop.set()
    thread.join()
    assert seen
    assert set(seen) == {201}
