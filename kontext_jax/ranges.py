"""Settings that are numbers, and the least that they may be."""

from typing import Any


def check_least(config: Any, where: str = "", **least: int) -> None:
    """Refuses settings that are too small.

    Args:
      config: whose attributes they are.
      where: what stands before their names, such as "data.".
      least: of each, by name.

    Raises:
      ValueError: one is below; it names it.
    """
    for name, number in least.items():
        if getattr(config, name) < number:
            raise ValueError(f"{where}{name} {getattr(config, name)} must be {number} or more.")
