"""``python -m dcn_plugin.mmdet SCRIPT [ARGUMENTS...]``: runs a script with dcn_plugin.mmdet imported first.

For MMDetection's own tools, which pip installs out of reach, in the package's folder ``.mim``; and for mmcv-lite and
scripts that import MMDetection's models before they read a config, whose ``custom_imports`` are then too late:
MMDetection's tools/test.py is one.
"""

import runpy
import sys
from pathlib import Path

import mmdet

import dcn_plugin.mmdet  # noqa: F401

USAGE = """usage: python -m dcn_plugin.mmdet SCRIPT [ARGUMENTS...]

Runs a script with dcn_plugin.mmdet imported first: a file, or else one of the tools that mmdet was installed with, as
  python -m dcn_plugin.mmdet tools/train.py CONFIG
  python -m dcn_plugin.mmdet tools/test.py CONFIG CHECKPOINT"""


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(USAGE)
    if sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return
    del sys.argv[0]
    script = Path(sys.argv[0])
    if not script.is_file():
        script = Path(mmdet.__file__).parent / ".mim" / script
    if not script.is_file():
        sys.exit(f"error: {sys.argv[0]}: no such file, here or among mmdet's tools (such as tools/train.py)")
    sys.argv[0] = str(script)
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
