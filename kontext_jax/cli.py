"""What all commands share: quiet libraries, and one clear sentence for a user's mistake."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging


def _check_config_file(argv: list[str]) -> None:
    """Says so in one line if there is no such file; ml_collections would list all it tried."""
    for argument in argv:
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=").split(":")[0]
            if not Path(path).is_file():
                raise ValueError(f"there is no config file {path}.")


class UserError(Exception):
    """Something only the user can mend; the message says what and how."""


def run(name: str, body: Callable[[], None]) -> None:
    """Parses the flags and runs the command; its exit code is 1 after any error that it names.

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
            _check_config_file(argv)
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            # ml_collections hands on the whole traceback of a config file; its end says it all.
            sys.exit(f"{name}: {str(error.args[0] if error.args else error).splitlines()[-1]}")

    app.run(main, flags_parser=parse)
