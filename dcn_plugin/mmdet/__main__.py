"""``python -m dcn_plugin.mmdet SCRIPT [ARGUMENTS...]``: runs a script with dcn_plugin.mmdet imported first.

For mmcv-lite and scripts that import MMDetection's models before they read a config, whose ``custom_imports`` are then
too late: MMDetection's tools/test.py is one.
"""

import runpy
import sys
from pathlib import Path

import dcn_plugin.mmdet  # noqa: F401


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m dcn_plugin.mmdet SCRIPT [ARGUMENTS...]")
    del sys.argv[0]
    if not Path(sys.argv[0]).is_file():
        sys.exit(f"error: {sys.argv[0]}: no such file")
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
