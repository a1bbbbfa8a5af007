"""`python -m phaul_client.cli`."""

import sys

from phaul_client.cli.app import main

sys.exit(main())
