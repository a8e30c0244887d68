"""The command line, `fastirt COMMAND`: a module here for each group of commands."""

from __future__ import annotations

import logging
import os
import sys
from typing import Optional, Sequence

from fastirt import __version__
from fastirt.cli import archives, embed, export, gallery, images, reports, sweep, training
from fastirt.cli.parser import Parser
from fastirt.errors import user_message

COMMANDS = {
    **training.COMMANDS,
    **embed.COMMANDS,
    **gallery.COMMANDS,
    **sweep.COMMANDS,
    **export.COMMANDS,
    **images.COMMANDS,
    **archives.COMMANDS,
    **reports.COMMANDS,
}  # in the order of `fastirt --help`


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point of the `fastirt` command; returns its exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("fastirt").setLevel(logging.INFO)
    args = vars(build_parser().parse_args(argv))
    command = args.pop("command")
    try:
        code = COMMANDS[command].run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of `fastirt … | head`; else Python's exit would raise it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"fastirt {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"fastirt {command}: error: {message}", file=sys.stderr)
        return 2


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="fastirt", description="Train vision transformers for image retrieval.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastirt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    parser.commands = commands
    for command in COMMANDS.values():
        command.add(commands)
    return parser
