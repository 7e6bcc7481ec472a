"`python -m g2rpo.cli`: the command line, for launchers of many processes."
import sys

from g2rpo.cli.main import main

sys.exit(main())
