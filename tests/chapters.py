"Run by test_chapters: the cells of a notebook, in a process that has the libraries already."
import json
import os
import sys
from multiprocessing import get_context
from pathlib import Path

PRELOADED = ['torch', 'diffusers', 'transformers', 'accelerate', 'peft', 'matplotlib.pyplot', 'IPython',
             'g2rpo.training.trainer', 'g2rpo.plan.doctor', 'g2rpo.study.reproduction', 'torch.distributed.checkpoint']

def run_cells(path, log):
    "All code cells from the notebook's own folder, as Jupyter runs them; what they print goes to `log`."
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell
    matplotlib.use('agg')
    os.chdir(Path(path).parent)
    sys.argv = ['chapter']
    shell = InteractiveShell.instance()
    shell.history_manager.enabled = False        # nothing of it is stored
    for cell in json.loads(Path(path).read_text())['cells']:
        if cell['cell_type'] == 'code' and not shell.run_cell(''.join(cell['source']), store_history=True).success:
            sys.stdout.flush()
            os._exit(1)
    sys.stdout.flush()
    os._exit(0)

def run_chapter(path, log):
    "Exit code of the process that ran a chapter."
    context = get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_cells, args=(str(path), str(log)))
    process.start()
    process.join()
    return process.exitcode
