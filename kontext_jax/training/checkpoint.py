"""Saving a run and restoring it, onto any mesh and any number of processes.

A checkpoint holds the train state, the position in the data, the resolved config and the latest
metrics. Arrays have readable names (``transformer/double_blocks/img_attn/qkv/kernel``), so that one
network can be read without the others and without the code that wrote it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from kontext_jax.settings import Settings, check_least
from kontext_jax.training.train_state import TrainState
from kontext_jax.tree_paths import by_name, look_up, paths_of

COUNTERS = ("step", "skipped", "skipped_in_a_row")
TREES = ("params", "opt_state", "ema")
CHUNK_BYTES = 128 * 2**20


@dataclass(kw_only=True, unsafe_hash=True)
class CheckpointConfig(Settings):
    """When to save, and which checkpoints to keep. The last step is always saved.

    Attributes:
      every: steps between checkpoints.
      keep: number of latest checkpoints to keep.
      keep_every: checkpoints at multiples of this many steps are kept forever; 0 for none.
    """

    every: int = 1000
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self):
        check_least(self, "checkpoint.", every=1, keep=1)
        if self.keep_every < 0 or (self.keep_every and self.keep_every % self.every):
            raise ValueError(
                f"checkpoint.keep_every {self.keep_every} must be 0 or a multiple of "
                f"checkpoint.every {self.every}, since there are no checkpoints in between."
            )


class Checkpointer:
    """Reads and writes ``workdir/checkpoints``; saving overlaps with training."""

    def __init__(
        self, workdir: Path, config: CheckpointConfig | None = None, step: int | None = None
    ):
        """Opens the checkpoints. ``step`` selects the one to read; the default is the latest."""
        self._step = step
        self.folder = Path(workdir).absolute() / "checkpoints"
        items = {name: ocp.PyTreeCheckpointHandler() for name in TREES}
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=items
            | {name: ocp.JsonCheckpointHandler() for name in ("counters", "data", "meta")},
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep if config else None,
                keep_period=(config.keep_every or None) if config else None,
                create=config is not None,
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Mapping, meta: Mapping) -> None:
        """Starts saving; the next `save`, or `close`, waits until it is done.

        Args:
          state: the train state.
          data: the loader's state.
          meta: the resolved config and the latest metrics, as JSON.
        """
        trees = {name: _chunked(getattr(state, name)) for name in TREES}
        counters = {name: int(getattr(state, name)) for name in COUNTERS}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                **trees,
                counters=ocp.args.JsonSave(counters),
                data=ocp.args.JsonSave(dict(data)),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )

    def restore(self, abstract: TrainState, shardings: TrainState) -> tuple[TrainState, dict]:
        """(train state, loader's state) of the checkpoint, with the given shardings.

        Raises:
          ValueError: names or shapes of the checkpoint's arrays differ from ``abstract``.
        """
        step = self.step()
        trees = {
            name: self._restore_tree(step, name, getattr(abstract, name), getattr(shardings, name))
            for name in TREES
        }
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(counters=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()),
        )
        counters = {
            name: jax.device_put(jax.numpy.int32(read.counters[name]), getattr(shardings, name))
            for name in COUNTERS
        }
        return TrainState(**counters, **trees), read.data

    def restore_network(self, player: str, abstract, shardings, params: str = "ema"):
        """One player's network, from its averaged ("ema") or raw ("params") parameters."""
        restored = self._restore_tree(self.step(), params, {player: abstract}, {player: shardings})
        return restored[player]

    def meta(self) -> dict[str, Any]:
        """The config and the metrics of the checkpoint."""
        read = self._manager.restore(
            self.step(), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )
        return read.meta

    def close(self) -> None:
        """Waits until everything is saved."""
        self._manager.close()

    def step(self) -> int:
        """The step of the checkpoint that is read.

        Raises:
          FileNotFoundError: there is no checkpoint, or none of the selected step.
        """
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"There is no checkpoint in {self.folder}.")
        if self._step is not None and self._step not in steps:
            kept = ", ".join(map(str, steps))
            raise FileNotFoundError(f"{self.folder} has steps {kept}, but not {self._step}.")
        return steps[-1] if self._step is None else self._step

    def _restore_tree(self, step: int, item: str, abstract, shardings):
        wanted = by_name(
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
            )
        )
        self._check(step, item, wanted)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    item: ocp.args.PyTreeRestore(
                        wanted,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                        partial_restore=True,
                    )
                }
            ),
        )[item]
        leaves = [look_up(restored, path) for path in paths_of(abstract)]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def _check(self, step: int, item: str, wanted: dict) -> None:
        """Compares names and shapes; Orbax would silently crop or pad arrays of other shapes."""
        stored = self._manager.item_metadata(step)[item].tree
        shapes = {path: look_up(wanted, path).shape for path in paths_of(wanted)}
        wrong = []
        for path, shape in shapes.items():
            array = look_up(stored, path)
            if array is None:
                wrong.append(f"{'/'.join(path)} is missing")
            elif tuple(array.shape) != tuple(shape):
                wrong.append(f"{'/'.join(path)} is {tuple(array.shape)}, not {tuple(shape)}")
        players = {path[0] for path in shapes}
        extra = {path for path in paths_of(stored) if path[0] in players} - set(shapes)
        wrong += [f"{'/'.join(path)} is unexpected" for path in sorted(extra)]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise ValueError(
                f"Checkpoint {self.folder / str(step)} does not match the configured networks: in "
                f"{item}, {'; '.join(wrong[:5])}{more}. Use the config of its run, or start a new "
                "--workdir."
            )


def _chunked(tree) -> ocp.args.PyTreeSave:
    """Save arguments that chunk large arrays, and stacked arrays by layer.

    A single layer can then be read without the others. Layer axes precede the named axes. All other
    axes are left to Orbax, which would chunk an explicitly listed axis into single indices, even
    those of a bias.
    """

    def save_args_of(variable):
        axes = variable.get_metadata().get("axes") if isinstance(variable, nnx.Variable) else None

        def args(array):
            stacked = axes is not None and array.ndim > len(axes)
            return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())

        return jax.tree.map(args, variable)

    save_args = jax.tree.map(
        save_args_of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return ocp.args.PyTreeSave(by_name(tree), save_args=by_name(save_args))
