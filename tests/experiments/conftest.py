"""Models that are trained once for the tests of several programs."""

import pytest

from . import diagnosed as diagnosed_lib, tiny_model


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """A work folder with the trained model of ``diagnosed``, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.install(patch)
        return diagnosed_lib.train_in(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def diagnosed(dense_folder, tmp_path_factory):
    """A work folder with the rows of ``diagnosed``, to be copied or left as it is; its record."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.install(patch)
        return diagnosed_lib.make(dense_folder, tmp_path_factory.mktemp("diagnosed") / "run")


@pytest.fixture(scope="module")
def dense():
    """Makes the model of ``tiny_model`` known."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.install(patch)
        yield
