"""What is trained, and by which loss: one seam for every recipe.

An `Objective` names its players, the networks it trains, in the order in which a step updates
them. One train step (``train_state.py``) serves all objectives and asks none of them what it is.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Key

from kontext_jax.types import Batch, Metrics

Network = Any
"""An NNX module, or a dict of them: a pytree of parameters."""


@runtime_checkable
class Objective(Protocol):
    """One recipe. Losses and metrics are *sums*, so that microbatches of any weight add up."""

    players: tuple[str, ...]

    def init(self, key: Key[Array, ""]) -> dict[str, Network]:
        """A new network for each player."""
        ...

    def frozen(self) -> tuple[str, ...]:
        """Names of networks that are used but not trained; ``init_from`` says where they are."""
        ...

    def prepare(self, frozen: dict[str, Network], batch: Batch) -> Any:
        """What the losses need of a batch, without gradient."""
        ...

    def flops(self, batch: Batch) -> Float[Array, ""]:
        """Model FLOPs of a step on this batch, for MFU; 0 where nobody counts them."""
        ...

    def loss(
        self,
        player: str,
        models: dict[str, Network],
        frozen: dict[str, Network],
        inputs: Any,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Metrics]]:
        """(sum of losses, (weight, sums of metrics)); the step divides sums by the weight."""
        ...
