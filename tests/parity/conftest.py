"""Sets the highest matmul precision for all parity tests, and makes torchvision importable."""

import importlib.util
import sys

import jax
import pytest


def declare_torchvision_operators() -> None:
    """Declares torchvision's operators if it was built for another PyTorch, e.g. with CUDA.

    Its compiled operators then do not load, and its Python code does not import without them. No
    test calls them.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "torchvision")):
        return
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", signature)


declare_torchvision_operators()


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield
