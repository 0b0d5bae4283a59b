"""Converts weights from one layout to another, bit for bit, one layer of a parameter at a time.

python -m kontext_jax.convert --input=LOCATION --output=PATH --format={diffusers,bfl,orbax,lora} \\
    [--params=ema] [--network=transformer] [--dtype=bfloat16] [--lora=FILE] [--verify]

``--input`` is a run's workdir, an output of this command, a diffusers pipeline or the folder of
one of its networks, or a single file in Black Forest Labs' layout. ``--format`` is one of:

    diffusers  a pipeline for ``FluxKontextPipeline.from_pretrained``, or one network's folder
    bfl        transformer.safetensors and ae.safetensors, text encoders in transformers' layout
    orbax      one checkpoint, to start runs from or to sample with
    lora       the adapters of a run that trained adapters, for ``load_lora_weights``

The output gets its name only after all of it is written, read back and compared.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import flags

import kontext_jax
from kontext_jax import cli
from kontext_jax.files import atomic_path
from kontext_jax.flow import TimeConfig
from kontext_jax.loading.locations import (
    PARAMETER_SETS,
    load_adapters,
    open_networks,
    tokenizers_of,
)
from kontext_jax.settings import from_dict
from kontext_jax.weights.export import write_bfl, write_diffusers, write_orbax
from kontext_jax.weights.fingerprint import fingerprint, fingerprint_of
from kontext_jax.weights.lora import MergedReader, read_lora, write_lora
from kontext_jax.weights.networks import NETWORKS, architecture
from kontext_jax.weights.pipeline import (
    BFL_FILES,
    TOKENIZERS,
    write_index,
    write_scheduler,
    write_tokenizer,
)
from kontext_jax.weights.reading import Reader

FORMATS = ("diffusers", "bfl", "orbax", "lora")
EXPORT_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would clash with other commands'."""
    flags.DEFINE_string("input", None, "location of the weights, see above")
    flags.DEFINE_string("output", None, "file or folder to write; must not exist")
    flags.DEFINE_enum("format", None, FORMATS, "layout of the output")
    flags.DEFINE_enum("params", "ema", PARAMETER_SETS, "averaged or raw parameters of a run")
    flags.DEFINE_enum("network", None, list(NETWORKS), "network to convert; all by default")
    flags.DEFINE_enum(
        "dtype", None, list(EXPORT_DTYPES), "dtype to cast to; the stored dtypes by default"
    )
    flags.DEFINE_string("lora", None, "adapters to merge, a file or folder in diffusers' layout")
    flags.DEFINE_bool("verify", False, "also compare outputs with PyTorch's (extra: convert)")
    flags.mark_flags_as_required(["input", "output", "format"])


def convert(
    location: Path,
    output: Path,
    format: str,
    *,
    params: str = "ema",
    network: str | None = None,
    dtype: str | None = None,
    lora: Path | None = None,
    verify: Callable[[Path, dict[str, Reader]], None] | None = None,
) -> dict[str, str]:
    """Converts weights and returns the fingerprint of every network as written.

    Args:
      location: location of the weights, see the module's docstring.
      output: file or folder to write.
      format: "diffusers", "bfl", "orbax" or "lora".
      params: "ema" or "params", the parameter set of a run.
      network: name of the only network to convert; None converts all.
      dtype: "float32", "bfloat16" or "float16" to cast to; None keeps the stored dtypes.
      lora: adapters to merge into the transformer, a file or folder in diffusers' layout.
      verify: called with the written output and its readers before the output gets its name.

    Raises:
      FileExistsError: ``output`` exists.
      FileNotFoundError: ``location`` has no weights, or lacks the network.
      OSError: the disk is full; no partial output remains.
      ValueError: the weights are invalid, or the format does not support the network.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists; delete it or name another --output.")
    if format == "lora":
        if network or dtype or lora or verify:
            raise ValueError(
                "--format=lora writes a run's adapters unchanged: leave out --network, --dtype, "
                "--lora and --verify."
            )
        adapters, config, record = load_adapters(location, params)
        record |= {"fingerprint": fingerprint(adapters)} | _software()
        with atomic_path(output) as path:
            write_lora(adapters, config, path, record)
        return {"lora": record["fingerprint"]}
    readers = open_networks(location, params, only=network)
    if others := readers.keys() - NETWORKS.keys():
        raise ValueError(
            f"{location} holds a {min(others)}, which is not part of a pipeline and needs no "
            "conversion."
        )
    if lora is not None:
        if "transformer" not in readers:
            raise ValueError(f"{location} has no transformer to merge {lora} into.")
        adapters = read_lora(lora, readers["transformer"].config)
        record = readers["transformer"].record | {"lora": fingerprint(adapters)}
        readers["transformer"] = MergedReader(readers["transformer"], adapters, record)
    single = network is not None or (len(readers) == 1 and not _is_pipeline(location))
    if output.suffix == ".safetensors" and not (single and format == "bfl"):
        raise ValueError(
            f"{output} would be a folder; only one network in Black Forest Labs' layout is a "
            "single file: --format=bfl --network=transformer."
        )
    tokenizers = {n: source for n, source in tokenizers_of(location).items() if n in readers}
    for name in TOKENIZERS.keys() & readers.keys() - tokenizers.keys():
        if not single:
            raise FileNotFoundError(f"{location} has no {TOKENIZERS[name]} for the {name}.")
    target = EXPORT_DTYPES[dtype] if dtype else None
    for reader in readers.values():
        if target and isinstance(reader, MergedReader):
            reader.round_to(target)
    records = {name: _record(reader, target) for name, reader in readers.items()}
    with atomic_path(output) as path:
        if format == "orbax":
            step = max(record.get("step", 0) for record in records.values())
            meta = {
                "networks": {name: architecture(r.config) for name, r in readers.items()},
                "records": records,
            }
            _write_tokenizers(tokenizers, path)
            write_orbax(readers, path, step, meta, target)
        elif single:
            _write_single(*readers.values(), path, format, *records.values(), target)
        else:
            _write_pipeline(readers, path, format, records, target)
            _write_tokenizers(tokenizers, path)
            if format == "diffusers":
                write_index(path, readers)
        if verify:
            verify(path, open_networks(path))
    return {name: record["fingerprint"] for name, record in records.items()}


def _record(reader: Reader, dtype: np.dtype | None) -> dict[str, Any]:
    """Returns the record of the output: the source's record, and fingerprints before and after."""
    record = {k: v for k, v in reader.record.items() if k != "network"} | _software()
    record["made_from"] = record["fingerprint"] = fingerprint_of(reader)
    if dtype:
        record["fingerprint"] = fingerprint_of(reader, dtype)
    return record


def _software() -> dict[str, str]:
    return {"software": f"kontext_jax {kontext_jax.__version__}"}


def _is_pipeline(location: Path) -> bool:
    return (location / "model_index.json").is_file()


def _write_single(reader: Reader, path: Path, format: str, record: dict, dtype) -> None:
    if format == "diffusers":
        write_diffusers(reader, path, record, dtype)
    elif reader.network.has_bfl_layout:
        write_bfl(reader, path, record, dtype)
    else:
        raise ValueError(
            f"Black Forest Labs' layout does not include the {reader.network.name}; use "
            "--format=diffusers."
        )


def _write_pipeline(
    readers: dict[str, Reader], folder: Path, format: str, records: dict, dtype
) -> None:
    folder.mkdir()
    for name, reader in readers.items():
        if format == "bfl" and reader.network.has_bfl_layout:
            write_bfl(reader, folder / BFL_FILES[name], records[name], dtype)
        else:
            write_diffusers(reader, folder / reader.network.folder, records[name], dtype)
    if format == "diffusers":
        time = records.get("transformer", {}).get("time", {})
        write_scheduler(folder, from_dict(time, TimeConfig))


def _write_tokenizers(tokenizers: dict[str, str], folder: Path) -> None:
    for name, source in tokenizers.items():
        write_tokenizer(source, folder / TOKENIZERS[name])


def main() -> None:
    options = flags.FLAGS
    output = Path(options.output)
    jax.config.update("jax_platforms", "cpu")  # conversion needs no accelerator
    fingerprints = convert(
        Path(options.input),
        output,
        options.format,
        params=options.params,
        network=options.network,
        dtype=options.dtype,
        lora=Path(options.lora) if options.lora else None,
        verify=_verification() if options.verify else None,
    )
    for name, value in fingerprints.items():
        print(f"{name}: fingerprint {value}")
    print(f"wrote {output}; every bit is equal when read back")


def _verification() -> Callable[[Path, dict[str, Reader]], None]:
    """Returns a function that compares the output with PyTorch.

    Imports PyTorch at once, so that a missing package is reported before any work is done.
    """
    from kontext_jax.weights.verify import verify

    def compare(path: Path, readers: dict[str, Reader]) -> None:
        for line in verify(path, readers):
            print(line, flush=True)

    return compare


if __name__ == "__main__":
    define_flags()
    cli.run("convert", main)
