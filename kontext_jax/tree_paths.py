"""Readable names of the arrays of a tree: ``double_blocks/img_attn/qkv/kernel``.

Checkpoints store arrays under these names; the tables in ``weights/`` map them to PyTorch's names.
"""

from collections.abc import Mapping
from typing import Any

import jax


def paths_of(tree) -> list[tuple[str, ...]]:
    """The path of each leaf as a tuple of names, in order of the leaves.

    The ``value`` of an NNX variable is not part of the path.
    """
    paths = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        paths.append(tuple(names[:-1] if names[-1] == "value" else names))
    return paths


def named_leaves(tree) -> dict[str, Any]:
    """The leaves by name (the path joined by "/"), in order of the leaves."""
    names = ("/".join(path) for path in paths_of(tree))
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def by_name(tree) -> dict[str, Any]:
    """A tree of modules, optimizer states and dicts as nested dicts of arrays, keyed by name."""
    nested: dict[str, Any] = {}
    for path, leaf in zip(paths_of(tree), jax.tree.leaves(tree), strict=True):
        *parents, last = path
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def look_up(tree, path: tuple[str, ...]):
    """The value at ``path`` in nested dicts, or None if it is absent."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
