"""`python -m input_workers` is `input-workers`."""

import sys

from input_workers.cli import main

sys.exit(main())
