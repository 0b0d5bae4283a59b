"""What all commands share: quiet libraries, and one clear sentence for a user's mistake."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging


def check_config_file(argv: list[str]) -> None:
    """Says so in one line if there is no such file; ml_collections would list all it tried."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = (value if equals else following).split(":")[0]
            if (equals or following) and not Path(path).is_file():
                raise ValueError(f"there is no config file {path}.")


class UserError(Exception):
    """Something only the user can mend; the message says what and how."""


GO_ON = ("encode", "evaluate", "train")
"""The commands that, given again after they were stopped, go on where they were."""

TAKERS = {"Config": "train", "EvalConfig": "evaluate"}
"""The kinds of config, and the command of each."""


def check_config(config: Any, kind: type) -> None:
    """Says so in one sentence if the config is for another command.

    Raises:
      UserError: it is not of this kind.
    """
    if not isinstance(config, kind):
        made = type(config).__name__
        command = TAKERS.get(made)
        raise UserError(
            f"--config makes the kind {made}, not {kind.__name__}: "
            + (f"run kontext_jax.{command} with it." if command else "give another file.")
        )


def join_processes() -> None:
    """Joins the processes of a pod or cluster."""
    import jax  # takes a second, which a mistake in the flags need not wait for

    # It would take SIGTERM for itself: `training.preemption` listens, other commands just end.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize()


def run(name: str, body: Callable[[], None]) -> None:
    """Parses the flags and runs the command.

    Its exit code is 1 after any error that it names, and 130 where the user stopped it.
    ``--verbosity=1`` shows where an error came from.
    """

    def main(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell all they do
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; flags look like --name=value.")
            body()
        except (UserError, ImportError, OSError, ValueError) as error:
            if flags.FLAGS.verbosity > 0:
                raise
            sys.exit(f"{name}: {error}")

    def parse(argv: list[str]) -> list[str]:
        try:
            check_config_file(argv)
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            # ml_collections hands on the whole traceback of a config file; its end says it all.
            sys.exit(f"{name}: {str(error.args[0] if error.args else error).splitlines()[-1]}")

    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        hint = "; the same command goes on." if name in GO_ON else "."
        sys.stdout.flush()
        print(f"{name}: stopped{hint}", file=sys.stderr, flush=True)
        # All is closed by now, and Python's own way out crashes where XLA was compiling.
        os._exit(130)
