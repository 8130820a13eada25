"""Quantize a float bundle by a recipe, the same as `export --quantize` does on the way."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from exaone_export import api
from exaone_export.commands.export import OUT_HELP, RECIPE_HELP, print_made
from exaone_export.progress import choose_progress


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a float bundle, made by `exaone-export export`")
    parser.add_argument("out", metavar="OUT", help=OUT_HELP)
    parser.add_argument(
        "--quantize", default="int4", metavar="int8|int4|RECIPE.toml", help=f"{RECIPE_HELP} (default: int4)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT; it stays valid until the new one is done")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped, or fail")
    parser.add_argument("--keep-partial", action="store_true", help="keep what is done if it is interrupted")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that quantize (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(arguments: Namespace) -> int:
    """Quantize, and print what was written."""
    report = api.quantize(
        arguments.bundle,
        arguments.out,
        recipe=arguments.quantize,
        force=arguments.force,
        resume=arguments.resume,
        keep_partial=arguments.keep_partial,
        threads=arguments.threads,
        progress=choose_progress(wanted=not (arguments.quiet or arguments.json)),
    )
    print_made(report, arguments)
    return 0
