"""Folders of TFDS sets."""

import os
from typing import Any


def has_data(builder: Any) -> bool:
    """Whether the set was written (``builder.is_prepared`` warns where it was not)."""
    return os.path.isfile(os.path.join(os.fspath(builder.data_dir), "dataset_info.json"))
