"""Models that are trained once for the tests of several programs."""

import jax
import pytest

from . import diagnosed as diagnosed_lib, tiny_model


@pytest.fixture(scope="package", autouse=True)
def every_program_cached():
    """A run begun anew compiles its programs again: here the quick ones are cached too."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


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
