"""The parser of the command line, and what each command adds to it."""

from __future__ import annotations

import argparse
from typing import Any, Callable, NamedTuple, NoReturn

from fastirt.config.option_values import suggestion


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    commands: argparse._SubParsersAction

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """Parse; the command of an unknown flag reports it, with a suggestion."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self.commands.choices.get(getattr(parsed, "command", None), self)
            known = [name for action in parser._actions for name in action.option_strings]
            flags = [word for word in unknown if word.startswith("-")] or unknown[:1]
            similar = suggestion(flags[0], known)
            parser.error(f"unknown: {' '.join(flags)}" + (f"; did you mean {similar}?" if similar else ""))
        return parsed


class Command(NamedTuple):
    """A command: `add` adds its parser, `run` takes its flags and returns the exit code."""

    add: Callable[[Any], Parser]
    run: Callable[[dict[str, Any]], int]
