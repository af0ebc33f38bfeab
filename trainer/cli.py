"""The `qatapult` command line: collects the commands and turns user errors into one line and exit status 2."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import typer

from qatapult.trainer.recipe.errors import EXIT_STATUS, UserError

# Each module has `register(app)`; none imports torch before its command runs.
COMMAND_MODULES = (
    "qatapult.trainer.commands.train",
    "qatapult.trainer.commands.recipe",
    "qatapult.trainer.commands.teacher",
    "qatapult.trainer.commands.checkpoint",
    "qatapult.trainer.commands.plan",
    "qatapult.trainer.commands.advise",
    "qatapult.trainer.commands.search",
    "qatapult.trainer.commands.report",
    "qatapult.trainer.commands.compare",
    "qatapult.trainer.commands.dashboard",
    "qatapult.trainer.commands.insight",
    "qatapult.trainer.commands.wandb",
    "qatapult.trainer.commands.study",
    "qatapult.trainer.commands.evaluate",
    "qatapult.trainer.commands.export",
    "qatapult.trainer.commands.generate",
    "qatapult.launch.commands",
)

app = typer.Typer(
    name="qatapult",
    help="Quantization-aware training that proves how much accuracy came back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in COMMAND_MODULES:
    importlib.import_module(_module).register(app)


#: What these say when they are imported is for their own developers: kernels of other GPUs, coming deprecations.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def main() -> None:
    """Entry point of the `qatapult` script and of `python -m qatapult.trainer`."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported, but keeps the filters.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to" not in record.msg)
    try:
        app()
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"qatapult: error: {error}", file=sys.stderr)
        sys.exit(EXIT_STATUS)


if __name__ == "__main__":
    main()
