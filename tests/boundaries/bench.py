"A folder in which commands are typed: a model, prompts, rewards, and runs that are finished."
import os
import shutil
import time
from pathlib import Path

from g2rpo.cli.main import main
from helpers import PROMPTS

SECONDS = 10     # that a refusal may take
REWARDS = '''
calls = 0
def dark(images, prompts): return 1 - images.mean((1, 2, 3))
'''
SHORT = '--T 4 --group-size 3 --prompts-per-iteration 2 --precision no --granularities 1,2 --save-every 1'
WATCHED = '--panel colour --panel-prompts prompts.txt --panel-size 2 --panel-every 1'

class Bench:
    "The folder, and how its runs are made."
    def __init__(self, folder, mini):
        self.folder, self.mini = folder, str(mini)
        self.train = f'train --model {mini} {SHORT} --prompts prompts.txt --rewards shade:dark'.split()

    def fill(self):
        "Make what the tests spoil copies of: a run with a panel, one of LoRA, an evaluation."
        (self.folder/'shade.py').write_text(REWARDS)
        (self.folder/'prompts.txt').write_text('\n'.join(PROMPTS[:4]))
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            assert main([*self.train, *WATCHED.split(), '--iterations', '2', '--out', 'run']) == 0
            assert main([*self.train, '--iterations', '1', '--lora-rank', '2', '--out', 'lora']) == 0
            assert main('evaluate run --scorers colour --T 2 --seeds 0'.split()) == 0
        finally:
            os.chdir(here)
        return self

    def copy(self, source, to):
        "A copy of a folder, of links until files are changed by `spoil`."
        return Path(shutil.copytree(self.folder/source, to, copy_function=os.link))

def spoil(file, content):
    "Put other content in place of a file, without changing what it was linked with."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file

def files_in(folder):
    "Files of a folder that may not be there, except locks."
    return sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file() and f.suffix != '.lock')

def refused(capfd, argv, out=None, code=2):
    "Run a command that must end in one line and leave `out` as it was; the line."
    before, began = out and files_in(out), time.time()
    capfd.readouterr()
    ended = main(argv)
    said, took = capfd.readouterr().err, time.time() - began
    assert ended == code, (argv, ended, said)
    assert said.startswith('g2rpo: ') and said.count('\n') == 1 and said.endswith('\n') and len(said) < 1200, said
    assert 'unexpected' not in said, said
    assert not out or files_in(out) == before, files_in(out)
    assert took < SECONDS, f'{took:.1f} s'
    return said
