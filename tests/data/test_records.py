"""Prepared sets whose files do not hold what their metadata say."""

import json
import pathlib
import shutil

import pytest

from ttt_jax import data


@pytest.fixture
def copied(digits, tfds_dir, tmp_path):
    """A copy of the prepared digits: its folder and the record file of the test split."""
    shutil.copytree(tfds_dir, tmp_path, dirs_exist_ok=True)
    (records,) = tmp_path.rglob("*test*array_record*")
    return tmp_path, pathlib.Path(records)


@pytest.mark.parametrize("said", [359, 361, 500])
def test_the_length_is_that_of_the_record_file(copied, said):
    folder, _ = copied
    (path,) = folder.rglob("dataset_info.json")
    info = json.loads(path.read_text())
    for split in info["splits"]:
        if split["name"] == "test":
            split["shardLengths"] = [str(said)]
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"test has 360 records on disk.*say {said}; delete"):
        data.load("tfds:digits", "test", data_dir=str(folder))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.99])
def test_a_damaged_record_file_is_named_or_gives_what_it_held(copied, digits, share):
    folder, records = copied
    content = bytearray(records.read_bytes())
    content[int(share * len(content)) + 3] ^= 0xFF
    records.write_bytes(content)
    message = rf"the set in .*{records.name}.* is damaged .*again"
    if share in (0.25, 0.5):
        with pytest.raises(ValueError, match=message):
            data.load("tfds:digits", "test", data_dir=str(folder)).arrays()
        return
    # A byte that only an index or a rim has need not matter.
    found = data.load("tfds:digits", "test", data_dir=str(folder))
    assert found.fingerprint == digits.fingerprint


def test_a_missing_record_file_is_named(copied):
    folder, records = copied
    records.unlink()
    with pytest.raises(ValueError, match=rf"the record file .*{records.name}.* is missing"):
        data.load("tfds:digits", "test", data_dir=str(folder))
