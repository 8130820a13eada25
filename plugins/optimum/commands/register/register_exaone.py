"""`optimum-cli export exaone`: the same export as `exaone-export export`, under optimum's command line.

optimum loads every file of its namespace folder `optimum.commands.register` each time `optimum-cli` starts, so this
one imports argument parsers only. The folder must never hold an `__init__.py` (PEP 420).
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from exaone_export.cli import add_noise_flags, run_command, supervise
from exaone_export.commands import export


class ExportExaoneCommand(BaseOptimumCLICommand):
    """`optimum-cli export exaone --model SOURCE OUT`, with the flags of `exaone-export export`."""

    COMMAND = CommandInfo(name="exaone", help="Export EXAONE 4.0 and 4.5 to ONNX, with int8 and int4 quantization.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the flags: optimum's names for source and output, ours for the rest."""
        parser.add_argument("-m", "--model", dest="source", required=True, metavar="SOURCE", help=export.SOURCE_HELP)
        parser.add_argument("out", metavar="OUT", help=export.OUT_HELP)
        export.add_options(parser)
        add_noise_flags(parser)
        parser.set_defaults(run=export.run)

    def run(self) -> None:
        """Export, and leave with the exit code that `exaone-export export` would have."""
        raise SystemExit(supervise(lambda: run_command(self.args), json=self.args.json))


REGISTER_COMMANDS = [(ExportExaoneCommand, ExportCommand)]
