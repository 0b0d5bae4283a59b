"""Tests that the committed golden file equals what the installed libraries compute."""

import numpy as np
import pytest

REASON = "needs the convert extra: pip install -e '.[convert]'"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from tests.parity import make_golden  # noqa: E402

pytestmark = pytest.mark.slow


def test_golden_file_is_up_to_date():
    computed = make_golden.make()
    with np.load(make_golden.GOLDEN) as golden:
        assert set(golden) == set(computed)
        for name, array in golden.items():
            if array.dtype.kind == "f":
                tolerances = dict(rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(computed[name], array, **tolerances, err_msg=name)
            elif not name.endswith("/config"):  # includes the library's version
                np.testing.assert_array_equal(computed[name], array, err_msg=name)
