"""Upload a bundle to the Hugging Face hub, in one commit, after checking every file of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from exaone_export import api
from exaone_export.output import human_bytes, print_json
from exaone_export.progress import choose_progress


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle")
    parser.add_argument(
        "repository", metavar="REPO", help="owner/EXAONE-..., or the name alone for one of your own; made if missing"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(arguments: Namespace) -> int:
    """Push, and print where to."""
    report = api.push(
        arguments.bundle,
        arguments.repository,
        private=arguments.private,
        progress=choose_progress(wanted=not (arguments.quiet or arguments.json)),
    )
    if arguments.json:
        print_json(report, arguments.stdout)
    else:
        print(f"{report.url}: {report.files} files, {human_bytes(report.bytes)}", file=arguments.stdout)
    return 0
