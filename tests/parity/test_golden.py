"""The committed file is what its script makes with the libraries that are installed."""

import numpy as np
import pytest

REASON = "needs the convert extra: pip install -e '.[convert]'"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from tests.parity import make_golden  # noqa: E402

pytestmark = pytest.mark.slow


def test_golden_file_is_up_to_date():
    made = make_golden.make()
    with np.load(make_golden.GOLDEN) as golden:
        assert set(golden) == set(made)
        for name, array in golden.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(made[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
            elif not name.endswith("/config"):  # which tells the library's version
                np.testing.assert_array_equal(made[name], array, err_msg=name)
