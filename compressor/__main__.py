"""`python -m compressor`: the command `compress`, safe from what lies in the working directory.

Python puts the working directory first on the path for `-m`. A `passes/`, `targets/` or `click.py` there
would be imported instead of the real one, so that entry moves to the end before anything else is imported.
"""

import os
import sys

try:
    here = ["", os.getcwd()]
except FileNotFoundError:  # the directory was deleted
    here = [""]
if sys.path and sys.path[0] in here:
    sys.path.append(sys.path.pop(0))

from compressor.cli import main

if __name__ == "__main__":
    sys.exit(main())
