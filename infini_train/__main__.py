"""`python -m infini_train` is the same as `infini-train`."""

import sys

from infini_train.cli import main

sys.exit(main())
