"""python -m bundlefmt"""

import sys

from bundlefmt.cli import main

sys.exit(main())
