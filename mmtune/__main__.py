"""`python -m mmtune`, and `torchrun -m mmtune`, as the command `mmtune`."""

import sys

from mmtune.cli import main

sys.exit(main())
