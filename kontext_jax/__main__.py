"""The ``kontext`` command: ``kontext train ...`` is ``python -m kontext_jax.train ...``."""

import runpy
import sys

COMMANDS = {
    "build": ("kontext_jax.data.build", "build a data set of (target, contexts, prompt) triples"),
    "train": ("kontext_jax.train", "train an autoencoder, a transformer or a few-step student"),
    "encode": ("kontext_jax.encode", "cache latents, or a teacher's samples"),
    "sample": ("kontext_jax.sample", "generate or edit one image"),
    "evaluate": ("kontext_jax.evaluate", "sweep checkpoints and samplers over benchmarks"),
    "compile": (
        "kontext_jax.compile",
        "compile a train step ahead of time: memory, FLOPs, time",
    ),
    "convert": ("kontext_jax.convert", "convert weights to and from diffusers, BFL and LoRA files"),
}
"""The module and the summary of each verb."""


def usage() -> str:
    """The verbs, one per line."""
    lines = [f"  {verb:10}{summary}" for verb, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kontext VERB [--flag=value ...]",
            "",
            *lines,
            "",
            "kontext VERB --help has the flags.",
        ]
    )


def main() -> None:
    """Runs the verb's module as a program, with the remaining arguments."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(usage())
        return
    if verb not in COMMANDS:
        sys.exit(f"kontext: there is no verb {verb!r}; the verbs are {', '.join(COMMANDS)}.")
    sys.argv = [f"kontext {verb}", *arguments]
    runpy.run_module(COMMANDS[verb][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
