"""What is trained, and by which loss: one seam for every recipe.

An `Objective` names its players, the networks it trains, in the order in which a step updates
them. One train step (``train_state.py``) serves all objectives and asks none of them what it is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from kontext_jax.optim import OptimConfig
from kontext_jax.types import Batch, Metrics

Network = Any
"""An NNX module, or a dict of them: a pytree of parameters."""


class Sums(NamedTuple):
    """What a loss says beside its value.

    Attributes:
      weight: the step divides all sums by it; where it is 0 the step is skipped.
      metrics: to log, sums as the loss is.
      forwarded: entries added to the inputs of the players after this one, which need not compute
        again what it has at hand; without gradient.
    """

    weight: Float[Array, ""]
    metrics: Metrics
    forwarded: Mapping[str, Any] = {}


@runtime_checkable
class Objective(Protocol):
    """One recipe. Losses and metrics are *sums*, so that microbatches of any weight add up.

    Attributes:
      players: what is trained, in the order of a step's updates.
      generator: the player whose networks make the pictures.
      optim: settings of the players that have an optimizer of their own, and not the run's.
      every: steps from one update of a player to its next, where these are not 1.
    """

    players: tuple[str, ...]
    generator: str
    optim: Mapping[str, OptimConfig]
    every: Mapping[str, int]

    def init(self, key: Key[Array, ""]) -> dict[str, Network]:
        """A new network for each player."""
        ...

    def frozen(self) -> tuple[str, ...]:
        """Names of networks that are used but not trained; ``init_from`` says where they are."""
        ...

    def prepare(self, frozen: dict[str, Network], batch: Batch) -> dict[str, Any]:
        """What all losses need of a batch, without gradient."""
        ...

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """Model FLOPs of a step on this batch, for MFU; 0 where nobody counts them."""
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
          player: whose loss.
          models: the players' networks; those of players before this one are updated already.
          frozen: see `frozen`.
          inputs: what `prepare` made, and what the players before this one handed on.
          key: of this player and step.
          step: steps taken before this one.
        """
        ...
