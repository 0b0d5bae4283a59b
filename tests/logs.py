"""What tests read of a run's log."""


def timeless(line: dict) -> dict:
    """What does not depend on how fast the machine was."""
    return {k: v for k, v in line.items() if "per_second" not in k and k != "data_wait"}
