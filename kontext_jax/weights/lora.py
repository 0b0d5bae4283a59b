"""Reads and writes LoRA adapters as diffusers' ``pytorch_lora_weights.safetensors``, bit for bit.

An adapted module of diffusers has two tensors, ``transformer.MODULE.lora_A.weight`` (rank, in) and
``transformer.MODULE.lora_B.weight`` (out, rank). Our fused kernels concatenate the outputs of
several modules: in a file, these modules have the same A, and each B holds its rows of ours. The
product is scaled by alpha / rank. alpha is not a tensor: the file's metadata stores it among the
fields of peft's ``LoraConfig`` (diffusers 0.42, ``LoraBaseMixin._save_lora_weights``).
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open

from kontext_jax.files import atomic_path
from kontext_jax.models import lora
from kontext_jax.models.flux import FluxConfig
from kontext_jax.models.layers import LowRank
from kontext_jax.models.lora import Adapters, LoraConfig
from kontext_jax.weights.files import (
    METADATA_KEY,
    TENSOR_DTYPES,
    Entry,
    NewTensor,
    TensorFiles,
    WeightsError,
    write_file,
)
from kontext_jax.weights.networks import NETWORKS, architecture
from kontext_jax.weights.reading import Reader
from kontext_jax.weights.table import LayerKey, Piece, in_layer_order

FILE_NAME = "pytorch_lora_weights.safetensors"
"""Name of the file in a folder, as in diffusers."""

PREFIX = "transformer."
PEFT_KEY = "lora_adapter_metadata"
"""Metadata key under which diffusers stores peft's ``LoraConfig`` as JSON."""

A, B, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"

OTHER_FORMATS = (
    ("kohya's (sd-scripts)", r"^lora_(unet|te\d*|transformer)_|\.lora_(down|up)\."),
    ("XLabs'", r"processor"),
    ("Black Forest Labs'", r"(^|\.)(double|single)_blocks\."),
    ("PEFT's own", r"base_model\."),
    ("LyCORIS'", r"\.(lokr|hada)_"),
)
"""Unsupported layouts: name and a pattern of their tensor names."""

INITS_THAT_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""peft's ``init_lora_weights`` that change the kernels under the adapter (peft 0.21, LoraLayer)."""


def write_lora(
    adapters: Adapters, config: FluxConfig, path: Path, record: Mapping[str, Any]
) -> None:
    """Writes adapters as diffusers saves them, for ``FluxKontextPipeline.load_lora_weights``.

    The file is read back and compared bit for bit before it gets its name. The adapter of a fused
    kernel is split into one adapter for each of diffusers' modules.

    Args:
      adapters: adapters of the transformer.
      config: config of the transformer.
      path: a ``.safetensors`` file, or a folder for `FILE_NAME`; created if needed.
      record: provenance of the adapters, stored in the file's metadata.

    Raises:
      OSError: the disk is full.
      ValueError: there are no adapters, or they belong to another network.
      WeightsError: the file differs from the adapters when read back.
    """
    if not adapters:
        raise ValueError("There are no adapters to write.")
    adapters = _on_host(adapters, config)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME
    with atomic_path(file) as temporary:
        write_file(temporary, _tensors(adapters, config), _metadata(adapters, config, record))
        _check_copy(adapters, read_lora(temporary, config))


def _on_host(adapters: Adapters, config: FluxConfig) -> Adapters:
    """Returns the adapters as float32 NumPy arrays.

    Raises:
      ValueError: a path or shape does not fit the transformer.
    """
    jax.eval_shape(lora.attach, NETWORKS["transformer"].abstract(config), adapters)
    return jax.tree.map(lambda x: np.asarray(jax.device_get(x), np.float32), adapters)


def _kernels(config: FluxConfig) -> dict[LayerKey, list[Piece]]:
    """Returns diffusers' kernels by the path and layer of the linear map that they make up."""
    pieces = NETWORKS["transformer"].table(config, "diffusers").pieces
    return {
        (param.removesuffix("/kernel"), layer): parts
        for (param, layer), parts in pieces.items()
        if param.endswith("/kernel")
    }


def _module(piece: Piece) -> str:
    return piece.name.removesuffix(".weight")


def _tensors(adapters: Adapters, config: FluxConfig) -> list[NewTensor]:
    kernels = _kernels(config)
    tensors = []
    for path, layer in in_layer_order(kernels):
        if path not in adapters:
            continue
        a, b = _layer(adapters[path], layer)
        for piece in kernels[path, layer]:
            rows = piece._replace(shape=(piece.stop - piece.start, len(b)))
            name, make_b = PREFIX + _module(piece), functools.partial(rows.to_tensor, b)
            tensors += [
                NewTensor(f"{name}.{A}", a.T.shape, a.dtype, lambda a=a: a.T),
                NewTensor(f"{name}.{B}", rows.shape, b.dtype, make_b),
            ]
    return tensors


def _metadata(adapters: Adapters, config: FluxConfig, record: Mapping[str, Any]) -> dict[str, str]:
    """Returns the file's metadata: peft's fields and our record.

    Fields of ``LoraConfig`` at peft's defaults are left out, because older versions of peft refuse
    fields that they do not know.
    """
    ranks, alphas, others = {}, {}, []
    for (path, _), pieces in _kernels(config).items():
        for module in map(_module, pieces):
            if path not in adapters:
                others.append(module)
                continue
            ranks[module] = adapters[path].b.shape[-2]
            alphas[module] = _alpha(adapters[path].scale, ranks[module])
    rank, rank_pattern = _to_patterns(ranks)
    alpha, alpha_pattern = _to_patterns(alphas)
    fields = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _targets(sorted(ranks), others),
    }
    peft = {PREFIX + name: value for name, value in fields.items()}
    record = dict(record) | {"network": architecture(config)}
    return {
        "format": "pt",  # required by PyTorch's loaders
        PEFT_KEY: json.dumps(peft, indent=2, sort_keys=True),
        METADATA_KEY: json.dumps(record, sort_keys=True),
    }


def _alpha(scale: float, rank: int) -> int | float:
    """Returns the alpha with alpha / rank == scale, as an int if it is whole."""
    product = scale * rank
    near = [product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf)]
    exact = [alpha for alpha in near if alpha / rank == scale]
    # A scale that was computed as alpha / rank has an exact alpha. Any other scale is off by one
    # rounding of float64, far below the float32 of the computation.
    alpha = min(exact or near[:1], key=lambda alpha: len(repr(alpha)))
    return int(alpha) if alpha.is_integer() else alpha


def _to_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the most common value, and the other values by peft's patterns.

    In a pattern, ``^`` matches the start of a module's name.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{name}": value for name, value in values.items() if value != common}


def _targets(modules: Sequence[str], others: Iterable[str]) -> Sequence[str] | str:
    """Returns peft's ``target_modules``: names, or a regular expression of them.

    peft matches a name with every module that ends in it after a dot. If that includes one of
    ``others``, as for ``proj_out``, which every single block has too, only an expression will do.
    """
    endings = tuple(f".{module}" for module in modules)
    if any(other.endswith(endings) for other in others):
        return "|".join(map(re.escape, modules))
    return modules


def _check_copy(source: Adapters, copy: Adapters) -> None:
    def bits(adapter: LowRank):
        a, b = adapter.a[...], adapter.b[...]
        return a.shape, a.tobytes(), b.shape, b.tobytes(), np.float32(adapter.scale)

    wrong = [
        path
        for path in sorted(source.keys() | copy.keys())
        if path not in source or path not in copy or bits(source[path]) != bits(copy[path])
    ]
    if wrong:
        raise WeightsError(
            f"The written adapters differ from their source in {', '.join(wrong)}; check the disk "
            "for errors."
        )


def read_lora(path: Path, config: FluxConfig) -> Adapters:
    """Returns the adapters in a file of diffusers, peft or `write_lora`, as float32 NumPy arrays.

    The modules that one of our kernels fuses may have different adapters, or none. Modules whose
    A is equal bit for bit share ranks in the fused adapter; all others get separate ranks. Layers
    of smaller rank, or without an adapter, are padded with zeros. This does not change the
    function, and training does not update ranks whose A and B are both zero.

    Args:
      path: the file, or its folder.
      config: config of the transformer that the adapters are for.

    Raises:
      FileNotFoundError: the file does not exist.
      WeightsError: the file has another format, or does not fit the transformer; the message names
        every error.
    """
    stored = _StoredAdapters(path / FILE_NAME if (path / FILE_NAME).is_file() else path, config)
    layers: dict[str, list[list[Piece]]] = {}
    stacked = set()
    for (name, layer), pieces in _kernels(config).items():
        layers.setdefault(name, []).append(pieces)
        if layer is not None:
            stacked.add(name)
    network = NETWORKS["transformer"].abstract(config)
    adapters = {}
    for name in sorted(layers):
        modules = {_module(piece) for pieces in layers[name] for piece in pieces}
        scales = {stored.scales[module] for module in modules & stored.scales.keys()}
        if not scales:
            continue
        # Our adapter has one scale. If the file has several, they are folded into b.
        fused = [_fuse(stored, pieces, fold=len(scales) > 1) for pieces in layers[name]]
        rank = max(len(b) for _, b in fused)
        a = np.stack([np.pad(a, ((0, 0), (0, rank - a.shape[1]))) for a, _ in fused])
        b = np.stack([np.pad(b, ((0, rank - len(b)), (0, 0))) for _, b in fused])
        arrays = [a, b] if name in stacked else [a[0], b[0]]
        adapters[name] = _adapter(network, name, arrays, scales.pop() if len(scales) == 1 else 1.0)
    return adapters


def _fuse(
    stored: "_StoredAdapters", pieces: Sequence[Piece], fold: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns one layer's a [in, rank] and b [rank, out]; ``fold`` folds the scale into b."""
    tensors = {
        piece: (stored.read(_module(piece), A), stored.read(_module(piece), B))
        for piece in pieces
        if _module(piece) in stored.scales
    }
    starts: dict[bytes, int] = {}
    blocks = [np.zeros((pieces[0].shape[1], 0), np.float32)]
    rank = 0
    for a, _ in tensors.values():
        if a.tobytes() not in starts:
            starts[a.tobytes()] = rank
            rank += len(a)
            blocks.append(a.T)
    fused = np.zeros((rank, pieces[-1].stop), np.float32)
    for piece, (a, b) in tensors.items():
        start = starts[a.tobytes()]
        if fold:
            b = (b.astype(np.float64) * stored.scales[_module(piece)]).astype(np.float32)
        fused[start : start + len(a), piece.start : piece.stop] = piece.to_ours(b)
    return np.concatenate(blocks, axis=1), fused


def _adapter(network, path: str, arrays: Sequence[np.ndarray], scale: float) -> LowRank:
    """Returns an adapter as `lora.init` makes it, with the given arrays a, b and scale."""
    settings = LoraConfig(rank=arrays[0].shape[-1], targets=(path,))
    shapes = jax.eval_shape(lambda: lora.init(network, settings, jax.random.key(0)))[path]
    adapter = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    adapter.scale = scale
    return adapter


class _StoredAdapters:
    """The adapters of a file in diffusers' layout, by diffusers' module names.

    Attributes:
      scales: alpha / rank of every adapted module.
    """

    def __init__(self, path: Path, config: FluxConfig):
        """Checks the file against the transformer's name table.

        Raises:
          FileNotFoundError: the file does not exist.
          WeightsError: the file has another format, or tensors or metadata do not fit; the message
            names every error.
        """
        self._files = TensorFiles(path)
        _check_format(self._files)
        names = self._files.entries
        # Pipelines write the prefix; a transformer's save_lora_adapter does not.
        self._prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
        shapes = {
            _module(piece): piece.shape for pieces in _kernels(config).values() for piece in pieces
        }
        wrong: list[str] = []
        ranks = self._ranks(shapes, wrong)
        self.scales = self._scales(ranks, wrong)
        if wrong:
            raise WeightsError(f"The adapters in {path} do not fit: {'; '.join(wrong)}.")

    def read(self, module: str, ending: str) -> np.ndarray:
        """Returns a module's tensor in float32."""
        return self._files.read(f"{self._prefix}{module}.{ending}").astype(np.float32)

    def _ranks(self, shapes: Mapping[str, tuple[int, ...]], wrong: list[str]) -> dict[str, int]:
        """Returns the rank of every adapted module, and appends what is wrong to ``wrong``."""
        known = {
            f"{self._prefix}{module}.{ending}": (module, ending)
            for module in shapes
            for ending in (A, B, ALPHA)
        }
        entries: dict[str, dict[str, Entry]] = {}
        for name, entry in self._files.entries.items():
            if name in known:
                module, ending = known[name]
                entries.setdefault(module, {})[ending] = entry
            else:
                wrong.append(f"{name} belongs to no linear map of this transformer")
        ranks = {}
        for module, tensors in entries.items():
            missing = [ending for ending in (A, B) if ending not in tensors]
            dtypes = {entry.dtype for entry in tensors.values()} - TENSOR_DTYPES.keys()
            if missing:
                wrong.append(f"{module} has {', '.join(tensors)} but no {' or '.join(missing)}")
            if dtypes:
                wrong.append(
                    f"{module} is {', '.join(sorted(dtypes))}, not {', '.join(TENSOR_DTYPES)}"
                )
            if missing or dtypes:
                continue
            a, b = tensors[A].shape, tensors[B].shape
            out_features, in_features = shapes[module]
            if not a or not a[0] or (a, b) != ((a[0], in_features), (out_features, a[0])):
                wrong.append(
                    f"{module} has A {a} and B {b}, which do not fit its kernel {shapes[module]}"
                )
                continue
            ranks[module] = a[0]
        return ranks

    def _scales(self, ranks: Mapping[str, int], wrong: list[str]) -> dict[str, float]:
        """Returns alpha / rank of every module, and appends what is wrong to ``wrong``.

        As in diffusers, alpha comes from peft's fields, else from tensors, else the scale is 1.
        """
        fields = _peft_fields(self._files, self._prefix)
        alphas = {
            module: self._files.read(f"{self._prefix}{module}.{ALPHA}")
            for module in ranks
            if f"{self._prefix}{module}.{ALPHA}" in self._files.entries
        }
        if fields and alphas:
            wrong.append(f"alpha is in both the metadata and tensors ({next(iter(alphas))})")
        elif fields:
            return _scales_of(fields, ranks, wrong)
        elif alphas:
            without = sorted(ranks.keys() - alphas.keys())
            wrong += [f"{module} has no alpha, unlike other modules" for module in without]
            wrong += [
                f"the alpha of {module} is not a scalar"
                for module, alpha in alphas.items()
                if alpha.size != 1
            ]
        if wrong:
            return {}
        return {
            module: alphas[module].item() / rank if alphas else 1.0
            for module, rank in ranks.items()
        }


def _peft_fields(files: TensorFiles, prefix: str) -> dict[str, Any]:
    """Returns the fields of peft's ``LoraConfig`` in the metadata; empty if there are none.

    Raises:
      WeightsError: the fields are not a JSON object.
    """
    fields: dict[str, Any] = {}
    for file in sorted({entry.file for entry in files.entries.values()}):
        with safe_open(file, framework="np") as opened:
            text = (opened.metadata() or {}).get(PEFT_KEY, "{}")
        try:
            fields |= json.loads(text)
        except (TypeError, ValueError) as error:
            raise WeightsError(
                f"{PEFT_KEY} in the metadata of {file} is not a JSON object."
            ) from error
    return {
        name.removeprefix(prefix): value
        for name, value in fields.items()
        if name.startswith(prefix)
    }


def _scales_of(
    fields: Mapping[str, Any], ranks: Mapping[str, int], wrong: list[str]
) -> dict[str, float]:
    """Returns alpha / rank of every module by the fields of ``LoraConfig``, with peft's defaults.

    Appends what is wrong to ``wrong``.
    """
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(INITS_THAT_CHANGE_THE_BASE):
        wrong.append(f"init_lora_weights {init!r} changes the base model's kernels too")
    scales = {}
    for module, rank in ranks.items():
        declared = _by_pattern(fields.get("rank_pattern"), module, fields.get("r", 8))
        alpha = _by_pattern(fields.get("alpha_pattern"), module, fields.get("lora_alpha", 8))
        if declared != rank:
            wrong.append(f"{module} has rank {rank}, but {declared} in the metadata")
        if not isinstance(alpha, int | float):
            wrong.append(f"{module} has alpha {alpha!r} in the metadata")
            continue
        scales[module] = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
    return scales


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of the module's name.

    The same rule as peft's ``get_pattern_key``.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_format(files: TensorFiles) -> None:
    """Checks that a file holds adapters in diffusers' layout.

    Raises:
      WeightsError: the adapters have another layout, or there are none.
    """
    for name, pattern in OTHER_FORMATS:
        example = next((key for key in files.entries if re.search(pattern, key)), None)
        if example is not None:
            raise WeightsError(
                f"{files.path} has adapters in {name} layout ({example}), not in diffusers'. "
                "diffusers converts most of them: load_lora_weights, then save_lora_adapter."
            )
    if not any(key.endswith((A, B)) for key in files.entries):
        raise WeightsError(f"{files.path} has no adapters in diffusers' layout: no *.{A}.")


class MergedReader:
    """A transformer's weights with adapters added to its kernels, as `lora.merge` does."""

    def __init__(self, reader: Reader, adapters: Adapters, record: dict[str, Any] | None = None):
        """Wraps a reader.

        Args:
          reader: weights of the transformer under the adapters.
          adapters: adapters of the transformer, on devices or in NumPy arrays.
          record: provenance of the merged weights; None takes the reader's.

        Raises:
          ValueError: a path or shape does not fit the transformer.
        """
        self.network, self.config, self.dtypes = reader.network, reader.config, reader.dtypes
        self.record = reader.record if record is None else record
        self._reader = reader
        self._adapters = _on_host(adapters, reader.config)

    def round_to(self, dtype: np.dtype) -> None:
        """Sets the dtype of merged kernels, which is the reader's by default."""
        merged = {f"{path}/kernel": dtype for path in self._adapters}
        self.dtypes = self.dtypes | merged

    def read(self, key: LayerKey) -> np.ndarray:
        """Returns one layer of a parameter; kernels are merged in float32 and rounded once."""
        stored = self._reader.read(key)
        param, layer = key
        adapter = self._adapters.get(param.removesuffix("/kernel"))
        if adapter is None or not param.endswith("/kernel"):
            return stored
        a, b = _layer(adapter, layer)
        merged = stored.astype(np.float32) + np.float32(adapter.scale) * (a @ b)
        return merged.astype(self.dtypes[param])


def _layer(adapter: LowRank, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns one layer's a [in, rank] and b [rank, out]; layer is None if they are not stacked."""
    a, b = adapter.a[...], adapter.b[...]
    return (a, b) if layer is None else (a[layer], b[layer])
