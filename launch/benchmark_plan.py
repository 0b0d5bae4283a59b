"""Times planning at the size a lab has: a synthetic index, its plan, the first row and a late one.

    python launch/benchmark_plan.py                          # two million examples
    python launch/benchmark_plan.py --examples=100000000     # 4.5 GB on disk

The index describes images of FLUX.1 Kontext's 17 sizes: 40 % of the examples without a context,
45 % with one, 10 % with two and 5 % with three. Prompts are read as bytes; their lengths are
log-normal, with a median of 200 for captions and 60 for instructions, and cut at 512. A row holds
four images of the largest size, four examples and 1024 text tokens.

The first process sorts the examples and packs their classes; the second finds the result on disk,
as every other process and every later start do. Both read row 0 and the first row of step 1,000,000
of 64 rows. Seconds begin with opening the index, after modules are imported. Memory is the peak of
the resident set, which includes the pages of mapped files; in brackets, before opening the index.
"""

import json
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from kontext_jax.data.index import Index, index_path
from kontext_jax.data.layout import Cache
from kontext_jax.data.packing import PackingConfig
from kontext_jax.data.pipeline import DataConfig, shapes_of
from kontext_jax.data.plan import Plan
from kontext_jax.data.text import Tokenizer
from kontext_jax.geometry import KONTEXT_SIZES

FLAGS = flags.FLAGS
flags.DEFINE_integer("examples", 2_000_000, "Number of examples.", lower_bound=1)
flags.DEFINE_string("folder", None, "Where to write; by default the system's temporary folder.")

DATA = DataConfig(packing=PackingConfig(image_tokens=16640, text_tokens=1024, max_examples=4))
CONTEXTS = (0.4, 0.45, 0.1, 0.05)  # share of examples with 0, 1, 2 and 3 contexts
LATE_ROW = 64 * 1_000_000
BLOCK = 2**20  # examples written at a time


def write_index(folder: Path, total: int) -> None:
    """Writes an index of ``total`` examples, column by column."""
    folder.mkdir(parents=True)
    height_width = np.array(KONTEXT_SIZES, np.int32)[:, ::-1]
    tables = [np.indices((17,) * (1 + n)).reshape(1 + n, -1).T for n in range(4)]
    starts = np.cumsum([0, *map(len, tables)])
    lengths = np.repeat([1, 2, 3, 4], np.diff(starts))
    np.save(folder / "shape_ends.npy", np.cumsum(lengths, dtype=np.uint64))
    np.save(folder / "sizes.npy", height_width[np.concatenate([t.ravel() for t in tables])])
    kinds = {"ids": ("u1", 9), "id_ends": ("<u8", 1), "categories": ("<u2", 1)}
    kinds |= {"shapes": ("<u4", 1), "prompt_bytes": ("<u4", 1), "digests": ("<u8", 1)}
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (width * total,))
        for name, (dtype, width) in kinds.items()
    }
    rng = np.random.default_rng(0)
    for start in range(0, total, BLOCK):
        number = np.arange(start, min(start + BLOCK, total))
        block = slice(start, start + len(number))
        digits = number[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")
        files["ids"][9 * start : 9 * (start + len(number))] = digits.ravel()
        files["id_ends"][block] = 9 * (number + 1)
        contexts = rng.choice(4, size=len(number), p=CONTEXTS)
        files["categories"][block] = contexts > 0
        files["shapes"][block] = rng.integers(starts[contexts], starts[contexts + 1])
        median = np.where(contexts, 60, 200)
        files["prompt_bytes"][block] = median * np.exp(rng.normal(0, 0.6, len(number)))
        files["digests"][block] = rng.integers(2**63, size=len(number))
    meta = {"records": total, "digest": f"synthetic {total}", "categories": ["caption", "edit"]}
    (folder / "index.json").write_text(json.dumps(meta))


def peak_memory() -> float:
    """Peak of this process's resident set in MB."""
    [kilobytes] = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024 / 1e6


def make_plan(folder: Path) -> str:
    """Plans the rows and reads two of them; returns what to print."""
    Tokenizer(DATA.text)  # imports transformers
    before, start, cpu = peak_memory(), time.perf_counter(), time.process_time()
    index = Index.load(index_path(folder, "train"))
    cache = Cache((folder / "plans",), "benchmark")
    plan = Plan(shapes_of(index, DATA), index.ids, DATA.packing, DATA.geometry, 0, cache)
    planned, cpu = time.perf_counter(), time.process_time() - cpu
    first = plan[0]
    row = time.perf_counter()
    late = plan[LATE_ROW]
    end = time.perf_counter()
    layout = plan._layout
    return (
        f"plan {planned - start:.3f} s ({cpu:.3f} s of CPU time), "
        f"row 0 {1e3 * (row - planned):.2f} ms, row {LATE_ROW} {1e3 * (end - row):.2f} ms, "
        f"memory {peak_memory():.0f} MB ({before:.0f} MB)\n"
        f"  {plan.num_rows} rows, fill {plan.fill:.4f}, text fill {plan.text_fill:.4f}, "
        f"{layout.starts.shape[1] - 1} classes, {len(layout.templates.repeats)} templates\n"
        f"  fingerprint {plan.fingerprint()}, rows {first} and {late}"
    )


def main(argv):
    del argv
    total = FLAGS.examples
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as name:
        folder = Path(name)
        write_index(index_path(folder, "train"), total)
        print(f"{total} examples")
        for start in ("first", "later"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(f"{start}: {pool.apply(make_plan, (folder,))}", flush=True)


if __name__ == "__main__":
    app.run(main)
