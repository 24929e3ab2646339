"""``fastkd COMMAND …`` and ``python -m fastkd COMMAND …``: the same as ``python -m fastkd.COMMAND …``."""

import runpy
import sys

COMMANDS = {
    "write": "convert images to a data set",
    "score": "run the teacher on the training images and store its logits",
    "prune": "select the samples to keep",
    "label": "store the teacher's logits of the augmented views of the kept samples",
    "train": "train a student; missing artifacts are built first",
    "check": "verify checksums, and compare stored logits with the teacher",
    "export": "export a student (ONNX, torch.export), or the kept samples as a data set",
    "predict": "classify images with a trained student",
    "study": "train a grid of students over several seeds, and compare them with baselines",
    "report": "write an HTML page with charts about one or more runs",
    "artifacts": "list artifacts, and delete unneeded ones",
    "recipes": "list, show or copy the included recipes",
    "bench": "benchmarks: savings, loader, step and more",
    "doctor": "describe this machine, and list missing dependencies",
}
"""The commands, in order of use. Each is a module of the same name."""


def usage() -> str:
    """Return the text of ``fastkd --help``."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    start = "usage: fastkd COMMAND …\n\nKnowledge distillation on pruned data with stored teacher logits.\n\nCommands:"
    return "\n".join([start, *lines, "", "fastkd COMMAND --help describes a command."])


def main() -> None:
    """Run the command that the first argument names, like ``python -m``; only its module is imported."""
    name = sys.argv[1] if sys.argv[1:] else ""
    if name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"fastkd.{name}", run_name="__main__", alter_sys=True)
        return
    from fastkd import console

    with console.safe_streams():
        if name not in ("", "-h", "--help"):
            console.error(f"{name}: no such command; fastkd --help lists them")
            sys.exit(2)
        print(usage(), flush=True)
        sys.exit(0 if name else 2)


if __name__ == "__main__":
    main()
