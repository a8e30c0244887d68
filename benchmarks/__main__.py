"""python -m benchmarks loss [flags]"""

from __future__ import annotations

import argparse
import sys

from benchmarks import loss

PARTS = {"loss": loss}  # name: module with `add_flags(parser)` and `main(args) -> exit code`


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measurements beside their limits.")
    parts = parser.add_subparsers(dest="part", required=True, metavar="|".join(PARTS))
    for name, module in PARTS.items():
        module.add_flags(parts.add_parser(name, help=module.__doc__.splitlines()[0]))
    args = parser.parse_args(argv)
    return PARTS[args.part].main(args)


if __name__ == "__main__":
    sys.exit(main())
