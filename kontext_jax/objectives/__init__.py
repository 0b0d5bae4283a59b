"""Objectives: what is trained, and by which loss.

An `Objective` lists its players, the networks that it trains, in the order in which a step updates
them. One train step (``training/train_state.py``) serves all objectives.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from kontext_jax.optim import OptimConfig
from kontext_jax.types import Batch, Metrics

Network = Any
"""An NNX module, or a dict of modules: a pytree of parameters."""


class Sums(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      weight: divisor of all sums; a step whose weight is 0 is skipped.
      metrics: values to log, as sums like the loss.
      forwarded: entries added to the inputs of later players, without gradient, so that they need
        not recompute them.
    """

    weight: Float[Array, ""]
    metrics: Metrics
    forwarded: Mapping[str, Any] = {}


@runtime_checkable
class Objective(Protocol):
    """One recipe. Losses and metrics are *sums*, so that microbatches of any weight add up.

    Attributes:
      players: names of the trained networks, in the order of a step's updates.
      generator: the player whose networks generate images.
      optim: optimizer settings of the players that do not use the run's.
      every: steps per update, for players that are not updated in every step.
      start: the first step in which a player is updated, for players that start later.
    """

    players: tuple[str, ...]
    generator: str
    optim: Mapping[str, OptimConfig]
    every: Mapping[str, int]
    start: Mapping[str, int]

    def init(self, key: Key[Array, ""]) -> dict[str, Network]:
        """A new network for each player."""
        ...

    def frozen(self) -> tuple[str, ...]:
        """Names of networks that are used but not trained; ``init_from`` has their locations."""
        ...

    def prepare(self, frozen: dict[str, Network], batch: Batch) -> dict[str, Any]:
        """The inputs of all losses, computed from a batch without gradient."""
        ...

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """Model FLOPs of a step on this batch, for MFU; 0 if not modelled."""
        ...

    def loss(
        self,
        player: str,
        models: dict[str, Network],
        frozen: dict[str, Network],
        inputs: dict[str, Any],
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Sums]:
        """The sum of a player's losses.

        Args:
          player: the player.
          models: all players' networks; earlier players are already updated.
          frozen: the networks of `frozen`, by name.
          inputs: the result of `prepare`, and what earlier players forwarded.
          key: random key of this player and step.
          step: number of steps before this one.
        """
        ...
