"""``python -m dcn_plugin``, or ``dcn-plugin``: the commands of this package."""

import argparse
import sys

from . import __version__
from .commands import convert_checkpoint, export, inspect, test_exported, visualize


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dcn_plugin", description="Deformable convolution for MMDetection.")
    parser.add_argument("--version", action="version", version=f"dcn_plugin {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    inspect.add_parser(commands)
    convert_checkpoint.add_parser(commands)
    export.add_parser(commands)
    test_exported.add_parser(commands)
    visualize.add_parser(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
