"""One iteration of every row, before and after: metrics and parameters to the last bit.

    python scripts/same_numbers.py COMMIT

checks out COMMIT beside the working tree, trains one iteration of each row on the embedded default in both,
and compares.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def left_of_right(images, prompts):
    "How much darker the left half of an image is."
    half = images.shape[-1]//2
    return images[..., half:].mean((1, 2, 3)) - images[..., :half].mean((1, 2, 3))

def pieces():
    "What the two layouts of the package call the same things."
    try:
        from g2rpo import METHODS, presets, train
        from g2rpo.training.config import open_policy
        def run(cfg, policy, rewards, prompts): return train(cfg, rewards, prompts, policy=policy).metrics
        return METHODS, presets.tiny, open_policy, run, dict(size='group_size', grad='grad_batch_size')
    except ImportError:
        from g2rpo.config import open_policy, tiny
        from g2rpo.method import METHODS
        from g2rpo.trainer import train
        return METHODS, tiny, open_policy, train, dict(size='group', grad='grad_batch')

NAMES = dict(equivalents='nfe')      # metrics that have another name by now

def fingerprints() -> dict:
    "Row → what one iteration gave."
    methods, tiny, open_policy, train, names = pieces()
    prompts, out = [f'a sign that says "{i:03d}" in red' for i in range(8)], {}
    for name, row in methods.items():
        size = 2 if row.window and row.window.half else 3
        method = replace(row, window=row.window and replace(row.window, size=size), starts=min(row.starts, 2))
        cfg = tiny(iterations=1, T=6, prompts_per_iteration=2, method=method, **{names['size']: 4, names['grad']: 3})
        policy = open_policy(cfg)
        metrics, = train(cfg, policy, dict(r=left_of_right), prompts)
        digest = hashlib.sha256()
        for p in policy.pipe.transformer.parameters():
            digest.update(p.detach().numpy().tobytes())
        kept = {NAMES.get(k, k): v for k, v in metrics.items() if k != 'seconds'}
        out[name] = dict(metrics=kept, parameters=digest.hexdigest())
    return out

def compare(commit: str) -> int:
    "Print a line a row; 1 if any differs."
    with tempfile.TemporaryDirectory() as tmp:
        before = Path(tmp)/'before'
        git = ['git', '-C', str(ROOT), 'worktree']
        subprocess.run([*git, 'add', '--detach', str(before), commit], check=True, capture_output=True)
        try:
            old, new = (ask(tree) for tree in (before, ROOT))
        finally:
            subprocess.run([*git, 'remove', '--force', str(before)], check=True)
    different, both = 0, [name for name in new if name in old]
    print('rows that are new:', ', '.join(name for name in new if name not in old) or 'none')
    print('rows that are gone:', ', '.join(name for name in old if name not in new) or 'none')
    for name in both:
        shared = {k for k in old[name]['metrics'] if k in new[name]['metrics']}
        off = sorted(k for k in shared if old[name]['metrics'][k] != new[name]['metrics'][k])
        same = not off and old[name]['parameters'] == new[name]['parameters']
        different += not same
        print(f'{name:16} {len(shared):3} metrics, parameters {new[name]["parameters"][:12]}  '
              + ('equal to the last bit' if same else f'DIFFERENT: {", ".join(off) or "parameters"}'))
    gone = {k for name in both for k in old[name]['metrics'].keys() - new[name]['metrics'].keys()}
    if gone:
        print('metrics that are no longer there:', ', '.join(sorted(gone)))
    return 1 if different or gone else 0

def ask(tree: Path) -> dict:
    "The fingerprints of the package in `tree`."
    env = os.environ | dict(PYTHONPATH=str(tree), TQDM_DISABLE='1', OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    command = [sys.executable, __file__, '--fingerprints']
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])

if __name__ == '__main__':
    if sys.argv[1:] == ['--fingerprints']:
        print(json.dumps(fingerprints()))
    elif len(sys.argv) == 2:
        sys.exit(compare(sys.argv[1]))
    else:
        sys.exit(__doc__)
