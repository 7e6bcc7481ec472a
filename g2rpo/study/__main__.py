"`python -m g2rpo.study`: one job of a description, for launchers of many processes."
import os
import signal
import sys

def leave(*_):
    "Ask to be queued again; from the first line on, while what is imported below takes its seconds."
    os._exit(75)

if __name__ == '__main__':
    for number in filter(None, (signal.SIGTERM, getattr(signal, 'SIGHUP', None))):
        signal.signal(number, leave)
    from g2rpo.study.launch import run_from_file
    code = run_from_file(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)   # not through torch's own end, which aborts where another process has left the group before
