"""`python -m hici`: what launchers start (`torchrun -m hici`, `accelerate launch -m hici`)."""

import sys

from hici.cli.main import main

sys.exit(main())
