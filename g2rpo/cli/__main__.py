"`python -m g2rpo.cli`: the command line, for launchers of many processes."
import os
import sys

from g2rpo.cli.main import main

code = main()
if code:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)   # not through torch's own end, which aborts where another process has left the group before
