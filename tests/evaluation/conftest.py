import pytest

from kontext_jax.evaluation import judges


@pytest.fixture
def cores(monkeypatch):
    """Pretends that the machine has seven cores."""
    monkeypatch.setattr(judges.os, "cpu_count", lambda: 7)
