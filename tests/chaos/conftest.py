"""What the runs that are broken in this process need."""

import shutil

import pytest

from tests.tiny_net import registered


@pytest.fixture(scope="module")
def tiny(undrawn):
    """The tiny net by its name."""
    with registered():
        yield


@pytest.fixture(scope="module")
def data_dir(digits_dir, tmp_path_factory):
    """The data that a module's runs share, in a place of their own."""
    return shutil.copytree(digits_dir, tmp_path_factory.mktemp("data"), dirs_exist_ok=True)
