"`python -m g2rpo.cli`, which launchers of many processes call."
import sys

from .main import main

sys.exit(main())
