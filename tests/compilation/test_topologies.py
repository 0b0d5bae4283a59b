"""Devices of TPU topologies for ahead-of-time compilation."""

import sys

import pytest

from kontext_jax import cli
from kontext_jax.compilation.topologies import topology_devices


def test_a_missing_tpu_compiler_is_named_with_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(cli.UserError, match="pip install 'kontext-jax\\[aot\\]'"):
        topology_devices("v5e:2x4")
