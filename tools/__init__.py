"""What maintainers run, from this repository's folder, with the package that is installed.

The installed package has the native core. The source tree beside this folder has none, and would
hide it.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.sort(key=lambda entry: Path(entry).resolve() == _ROOT)  # stable: last, if it is there
