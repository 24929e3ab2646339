"""``fastkd COMMAND …`` and ``python -m fastkd COMMAND …``: the same as ``python -m fastkd.COMMAND …``."""

import runpy
import sys

COMMANDS = {
    "write": "turn a source of images into a data set",
    "score": "run the teacher over the training images and store its logits",
    "prune": "select the samples to keep",
    "label": "store the teacher's logits of the kept samples in the views that students see",
    "train": "build what is missing, and train a student",
    "check": "verify checksums, and compare stored logits with the teacher",
    "export": "export a student for use elsewhere, or the kept samples as a data set",
    "predict": "classify images with a trained student",
    "study": "train a grid of students over several seeds, and compare them with baselines",
    "report": "make a page with charts about one or more runs",
    "artifacts": "list artifacts, and delete those that nothing needs",
    "recipes": "list, show or copy the recipes that ship with fastkd",
    "bench": "benchmarks: savings, loader, step and more",
    "doctor": "report what this machine has and what it lacks",
}
"""The commands, each a module of the same name, in the order in which one meets them."""


def usage() -> str:
    """Return what ``fastkd --help`` prints."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    start = "usage: fastkd COMMAND …\n\nKnowledge distillation on pruned data with stored teacher logits.\n\nCommands:"
    return "\n".join([start, *lines, "", "fastkd COMMAND --help describes a command."])


def main() -> None:
    """Run the command that the first argument names, as ``python -m`` does; only its module is imported."""
    name = sys.argv[1] if sys.argv[1:] else ""
    if name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"fastkd.{name}", run_name="__main__", alter_sys=True)
        return
    from fastkd import console

    with console.lasting_streams():
        if name not in ("", "-h", "--help"):
            console.error(f"{name}: no such command; fastkd --help lists them")
            sys.exit(2)
        print(usage(), flush=True)
        sys.exit(0 if name else 2)


if __name__ == "__main__":
    main()
