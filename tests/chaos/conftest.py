"""What the runs that are broken in this process need."""

import pytest

from jaxnets import report
from tests.tiny_net import registered


@pytest.fixture(scope="module")
def tiny():
    """The tiny net by its name, and no pages: half a second each."""
    with registered(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda workdirs: None)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A place for the data that a module's runs share."""
    return tmp_path_factory.mktemp("data")
