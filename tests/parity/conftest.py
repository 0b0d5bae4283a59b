"""All products of matrices are exact here: accelerators round them off by default."""

import importlib.util
import sys

import jax
import pytest


def declare_torchvision_operators() -> None:
    """Lets torchvision be imported beside a PyTorch of another build, such as one for CPUs.

    Its operators are compiled for one build alone, and its Python does not load without them. They
    are declared, then; no test calls one.
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
