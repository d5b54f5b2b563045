"""What tests of the native kernels share."""

import pytest

from jaxnets.ops import native_library

needs_kernels = pytest.mark.skipif(not native_library.available(), reason="needs a C++ compiler")
NATIVE = pytest.param("native", marks=needs_kernels)  # a case of a `parametrize` over formulations
