"""What all commands share: quiet libraries, one sentence per error, and exit codes."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from kontext_jax.files import check_local, locked


class UserError(Exception):
    """An error that only the user can fix; the message says what is wrong and how to fix it."""

    exit_code = 1


RESUMABLE = ("encode", "evaluate", "train")
"""Commands that resume where they stopped when they are started again."""

COMMAND_OF_CONFIG = {"Config": "train", "EvalConfig": "evaluate"}
"""The command that takes a kind of config."""


def check_config_file(argv: list[str]) -> None:
    """Refuses a config file that does not exist; ml_collections would list every path it tried.

    Raises:
      ValueError: there is no such file.
    """
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = (value if equals else following).split(":")[0]
            if (equals or following) and not Path(path).is_file():
                raise ValueError(f"there is no config file {path}.")


def check_local_flags(argv: list[str]) -> None:
    """Refuses URLs as values of flags, prompts excepted; see `files.check_local`.

    Raises:
      ValueError: a flag has one.
    """
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and name.strip("-") != "prompt":
            check_local(name, value if equals else following)


def check_config(config: Any, kind: type) -> None:
    """Refuses a config that is for another command.

    Raises:
      UserError: it is not of this kind.
    """
    if not isinstance(config, kind):
        name = type(config).__name__
        command = COMMAND_OF_CONFIG.get(name)
        raise UserError(
            f"--config returns {name}, not {kind.__name__}: "
            + (f"run kontext_jax.{command} with it." if command else "give another file.")
        )


def join_processes() -> None:
    """Joins the processes of a pod or cluster."""
    import jax  # takes a second, which an error in the flags need not wait for

    # JAX would catch SIGTERM itself: `training.preemption` does, and other commands just end.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize()


def lock(workdir: Path) -> AbstractContextManager[None]:
    """Holds the lock of a job's workdir, on its first process; see `files.locked`."""
    import jax

    return locked(workdir) if jax.process_index() == 0 else nullcontext()


def say(line: str) -> None:
    """Prints a line, once per job: on its first process."""
    import jax

    if jax.process_index() == 0:
        print(line, flush=True)


def run(name: str, body: Callable[[], None]) -> None:
    """Parses the flags and runs the command.

    The exit code is 1 after an error, 75 (EX_TEMPFAIL) if the run was preempted and has saved its
    state, and 130 after Ctrl-C. ``--verbosity=1`` shows the traceback of an error.
    """

    def main(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax and TFDS log every step they take
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; flags look like --name=value.")
            body()
        except (UserError, ImportError, OSError, ValueError) as error:
            if flags.FLAGS.verbosity > 0:
                raise
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", UserError.exit_code))

    def parse(argv: list[str]) -> list[str]:
        try:
            check_config_file(argv)
            check_local_flags(argv)
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            # ml_collections includes the whole traceback of a config file; its last line is enough.
            sys.exit(f"{name}: {str(error.args[0] if error.args else error).splitlines()[-1]}")

    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        hint = "; the same command resumes it." if name in RESUMABLE else "."
        sys.stdout.flush()
        print(f"{name}: stopped{hint}", file=sys.stderr, flush=True)
        # Everything is closed by now, and a normal exit crashes while XLA is compiling.
        os._exit(130)
