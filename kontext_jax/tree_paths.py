"""Readable names of a tree's arrays: ``double_blocks/img_attn/qkv/kernel``.

Checkpoints store arrays under these names, and the tables of ``weights/`` map them to PyTorch's.
"""

from collections.abc import Mapping
from typing import Any

import jax


def paths_of(tree) -> list[tuple[str, ...]]:
    """The names on the way to each leaf, in the leaves' order; NNX variables add none."""
    paths = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        paths.append(tuple(names[:-1] if names[-1] == "value" else names))
    return paths


def named_leaves(tree) -> dict[str, Any]:
    """The leaves by their names, joined by "/", in the leaves' order."""
    names = ("/".join(path) for path in paths_of(tree))
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def by_name(tree) -> dict[str, Any]:
    """A tree of modules, optimizer states and dicts as nested dicts of arrays, by name."""
    names: dict[str, Any] = {}
    for path, leaf in zip(paths_of(tree), jax.tree.leaves(tree), strict=True):
        *parents, last = path
        place = names
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return names


def look_up(tree, path: tuple[str, ...]):
    """What nested dicts hold at ``path``, or None."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
