"""The JSON files of a part."""

import json
import pathlib
from typing import Any

from experiments import launch


def read(path: pathlib.Path, **keys: type) -> dict[str, Any]:
    """A file that has some keys, with values of some types.

    Raises:
      UserError: it has not.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in keys.items():
            if not isinstance(record[key], kind):
                raise TypeError(f"{key} is {record[key]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise launch.UserError(f"{path} is damaged ({error!r}); run that part again.") from error
    return record
