"""Bad input, some 1,400 cases made of small lists: each ends in exit code 2 and one line, and leaves nothing.

The rows of the table are what people type, edit and copy: numbers, ψ files, configs, metrics, weights, model folders,
prompts, rewards, paths, evaluations, checkpoints of scorers. All run in this process, through the command line.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from bench import refused, spoil
from g2rpo.cli.flags import CALIBRATION_FIELDS, CONFIG_FIELDS, METHOD_FIELDS
from safetensors.torch import load_file, save_file

# ---- numbers: fields × values that no field of the type can have

NO_NUMBER = ['', 'x', 'nan', 'inf', '-1', '1e999', '0x10', '1,2']
WRONG = {  # type of a field → values
    'int': NO_NUMBER + ['1.5', '9' * 30],
    'float': NO_NUMBER,
    'bool': ['', 'maybe', '1', 'True'],
    'tuple[int, ...]': ['', 'x', 'nan', '1,,2', '1.5', '-1'],
    'tuple[float, ...]': ['', 'x', 'nan', '1,,2', '-inf,1', '1' * 400],
    'tuple[int, ...] | str': ['', 'x', 'nan', '1,,2', '9' * 30, '-1'],
    'float | tuple[float, ...]': ['', 'x', 'nan', '-1', 'inf'],
    'Window': [
        '',
        'x',
        'size=x',
        'size=0',
        'moves=up',
        'every=0',
        'size=1=2',
        'size=99999',
        'size',
        'most=1',
        'size=nan',
    ],
    'Psi': ['', '/nowhere.json', 'prompts.txt', '.', os.devnull, 'n' * 300],
    'Method': ['', 'dpo', 'tests_no_such:ROW', 'math:pi', ':', 'math:', 'g2rpo '],
}
CHOICES = (
    'mix',
    'precision',
    'scorer_precision',
    'dtype',
    'encoder_dtype',
    'gather_dtype',
    'tracker',
    'explore',
    'form',
    'placement',
    'credit',
    'normalise',
    'update',
    'kl',
)

def typed_values():
    "(flag, value) of each field of the run and of its method."
    for field in (*CONFIG_FIELDS, *METHOD_FIELDS):
        kind = field.annotation.removesuffix(' | None')
        name = '--' + field.name.replace('_', '-')
        values = WRONG.get(kind, [])
        if field.name in CHOICES:
            values = ['', 'nonsense', 'None', ' ']
        if field.name == 'weights':
            values = [*values, '1,1', '-1']
        yield from ((name, value) for value in values)

@pytest.mark.parametrize('flag, value', [*typed_values()])
def test_numbers(here, tmp_path, capfd, flag, value):
    refused(capfd, [*here.train, '--out', str(tmp_path / 'out'), f'{flag}={value}'], tmp_path)

@pytest.mark.parametrize(
    'flag, value',
    [('--' + f.name, v) for f in CALIBRATION_FIELDS for v in WRONG.get(f.annotation, [])]
    + [('--kind', 'x'), ('--criterion', ''), ('--T', '10001'), ('--start', '1,2')],
)
def test_calibrations(here, tmp_path, capfd, flag, value):
    words = f'calibrate --model {here.mini} --prompts prompts.txt --rewards shade:dark --trajectories 2 --rounds 2'
    refused(capfd, [*words.split(), '--out', str(tmp_path / 'psi.json'), f'{flag}={value}'], tmp_path)

# ---- JSON: what stands where a file of the package should

BROKEN = {  # name → content of a JSON file
    'empty': '',
    'null': 'null',
    'list': '[]',
    'number': '1',
    'text': '"x"',
    'cut': '{"seed": 0',
    'junk': 'not JSON',
    'object': '{}',
    'latin': b'{"a": "caf\xe9"}',
    'deep': '[' * 100_000,
    'deep object': '{"a":' * 200 + '1' + '}' * 200,
    'digits': '{"a": ' + '9' * 5000 + '}',
    'infinite': '{"a": Infinity}',
    'NaN': '[NaN]',
    'huge': '{"a": 1e999}',
    'twice': '{"a": 1, "a": 2}',
    'half': '{"a": "\\ud800"}',
    'zeros': bytes(1000),
    'utf-16': '{}'.encode('utf-16'),
}
PLACES = ('folder', 'pipe', 'device', 'no link', 'loop')  # what may stand in a file's place

def put(file, what):
    "Something else in the place of a file."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    if what == 'folder':
        file.mkdir()
    elif what == 'pipe':
        os.mkfifo(file)
    else:
        file.symlink_to({'device': '/dev/zero', 'no link': 'nowhere', 'loop': file.name}[what])

def replaced(file, what):
    "A file with a content of `BROKEN`, or one of `PLACES` in its place."
    put(file, what) if what in PLACES else spoil(file, BROKEN[what])
    return file

PSI = dict(values=[0.5] * 4, grid=[1.0, 0.75, 0.5, 0.25, 0.0], kind='multiplier')
BAD_PSI = [
    dict(values=['a'] * 4),
    dict(values=None),
    dict(values=[[0.5]] * 4),
    dict(values=[0.5] * 3),
    dict(values=[0.0] * 4),
    dict(values=[-1.0] * 4),
    dict(values=[None] * 4),
    dict(values=[True] * 4),
    dict(values={}),
    dict(values='0.50.50.50.5'),
    dict(grid=None),
    dict(grid=[1.0] * 5),
    dict(grid=[0.0, 0.25, 0.5, 0.75, 1.0]),
    dict(grid=['x'] * 5),
    dict(grid=[2.0, 1.0, 0.5, 0.2, 0.0]),
    dict(grid=[1.0, 0.75, 0.5, 0.25]),
    dict(kind=None),
    dict(kind='x'),
    dict(kind=1),
    dict(kind=['multiplier']),
]

@pytest.mark.parametrize('what', [*BROKEN, *PLACES])
def test_psi_files(here, tmp_path, capfd, what):
    file = replaced(tmp_path / 'psi.json', what)
    refused(capfd, [*here.train, '--out', str(tmp_path / 'out'), '--method', 'dense_grpo', '--psi', str(file)])
    assert not (tmp_path / 'out').exists()

@pytest.mark.parametrize('change', BAD_PSI, ids=str)
def test_psi_values(here, tmp_path, capfd, change):
    file = spoil(tmp_path / 'psi.json', json.dumps(PSI | change))
    words = [*here.train[:-1], 'shade:dark', '--method', 'dense_grpo', '--granularities', '1', '--psi', str(file)]
    said = refused(capfd, [*words, '--out', str(tmp_path / 'out')], tmp_path)
    assert 'psi' in said

NO_VALUES = {('toml', 'empty'), ('yaml', 'object'), ('json', 'object')}  # nothing is typed by them

@pytest.mark.parametrize(
    'suffix, what', [(s, w) for s in ('json', 'toml', 'yaml') for w in (*BROKEN, *PLACES) if (s, w) not in NO_VALUES]
)
def test_files_of_values(here, tmp_path, capfd, suffix, what):
    "What YAML and TOML take for values, such as an empty file, is typed nothing."
    file = replaced(tmp_path / f'a.{suffix}', what)
    refused(capfd, [*here.train, '--config', str(file), '--out', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()

BAD_VALUES = [
    'lr: [1, 2]',
    'lr: {a: 1}',
    'seed: "x"',
    'no_such: 1',
    'method: 3',
    'method: {eta: x}',
    '1: 2',
    'lr: .nan',
    'lr: .inf',
    'model: ""',
    'model: {a: 1}',
    'prompts: [[1]]',
    'a: &x [1]\nb: *x',
    'seed: 2020-01-01',
    'iterations: null',
    'rewards: null',
    '? [1]\n: 2',
    'lr: !!python/object:os.system 1',
    'model: "a\\0b"',
]

@pytest.mark.parametrize('text', BAD_VALUES)
def test_values_in_files(here, tmp_path, capfd, text):
    file = spoil(tmp_path / 'a.yaml', text)
    refused(capfd, [*here.train[:1], '--config', str(file), '--out', str(tmp_path / 'out')], tmp_path)

# ---- the folder of a run

RUN_COMMANDS = {  # name → words, with RUN for the folder of a copy
    'evaluate': 'evaluate RUN --scorers colour --T 2 --seeds 0 --out OUT',
    'sample': 'sample RUN --T 2 --out OUT',
    'export': 'export RUN OUT',
    'resume': 'train --out RUN --resume --override iterations=3',
    'report': 'report RUN --out OUT/report.html',
}

def run_command(name, run, out):
    return [w.replace('RUN', str(run)).replace('OUT', str(out)) for w in RUN_COMMANDS[name].split()]

def after(here, tmp_path, capfd, command, harm, run='run'):
    "The line in which a command ends after a harm to a copy of a run, which it leaves as it is."
    folder = here.copy(run, tmp_path / 'run')
    harm(folder)
    said = refused(capfd, run_command(command, folder, tmp_path / 'out'), folder)
    assert not (tmp_path / 'out').exists()
    return said

@pytest.mark.parametrize('what', [*BROKEN, *PLACES])
@pytest.mark.parametrize('command', ['evaluate', 'export', 'resume', 'report'])
def test_config_of_a_run(here, tmp_path, capfd, command, what):
    said = after(here, tmp_path, capfd, command, lambda run: replaced(run / 'config.json', what))
    assert 'config.json' in said

BAD_KEYS = [
    dict(lr='x'),
    dict(lr=None),
    dict(seed=1.5),
    dict(seed=True),
    dict(rewards='shade:dark'),
    dict(rewards=[1]),
    dict(T=0),
    dict(method=None),
    dict(method=[]),
    dict(method={}),
    dict(more=1),
    dict(lr=-1),
    dict(processes='1'),
    dict(model='a\0b'),
    dict(prompts_sha256=1),
    dict(seed=7),
    dict(height=25),
    dict(shift='3'),
    dict(model=''),
]

@pytest.mark.parametrize('change', BAD_KEYS, ids=str)
@pytest.mark.parametrize('command', ['evaluate', 'resume'])
def test_keys_of_a_config(here, tmp_path, capfd, command, change):
    stored = json.loads((here.folder / 'run' / 'config.json').read_text())
    del stored['sha256']  # as one that is written by hand
    after(here, tmp_path, capfd, command, lambda run: spoil(run / 'config.json', json.dumps(stored | change)))

@pytest.mark.parametrize('key', ['lr', 'method', 'rewards', 'keep', 'T', 'model'])
def test_a_key_that_is_missing(here, tmp_path, capfd, key):
    stored = json.loads((here.folder / 'run' / 'config.json').read_text())
    del stored[key], stored['sha256']
    said = after(here, tmp_path, capfd, 'evaluate', lambda run: spoil(run / 'config.json', json.dumps(stored)))
    assert f'{key} is missing' in said

LINES = {  # name → what becomes of the two lines of metrics
    'junk': lambda a, b: [a, 'junk'],
    'null': lambda a, b: [a, 'null'],
    'swapped': lambda a, b: [b, a],
    'doubled': lambda a, b: [a, a, b],
    'first gone': lambda a, b: [b],
    'last gone': lambda a, b: [a],
    'blank': lambda a, b: [a, '', b],
    'conflict': lambda a, b: ['<<<<<<< HEAD', a, b],
    'nothing': lambda a, b: [],
    'cut': lambda a, b: [a, b[:50]],
    'digit': lambda a, b: [a.replace('"nfe": 4', '"nfe": 5'), b],
    'NaN': lambda a, b: [a, '{"iteration": NaN}'],
    'key': lambda a, b: [a, b.replace('"nfe"', '"nfo"')],
    'type': lambda a, b: [a, b.replace('"iteration": 1', '"iteration": "1"')],
}

@pytest.mark.parametrize('what', LINES)
@pytest.mark.parametrize('command', ['resume', 'report'])
def test_lines_of_metrics(here, tmp_path, capfd, command, what):
    def harm(run):
        lines = LINES[what](*(run / 'metrics.jsonl').read_text().splitlines())
        spoil(run / 'metrics.jsonl', ''.join(f'{line}\n' for line in lines))

    said = after(here, tmp_path, capfd, command, harm)
    assert 'metrics.jsonl' in said or what == 'nothing'

@pytest.mark.parametrize('what', PLACES)
@pytest.mark.parametrize('command', ['resume', 'report'])
def test_metrics_that_are_no_file(here, tmp_path, capfd, command, what):
    if (command, what) == ('report', 'folder'):
        pass
    after(here, tmp_path, capfd, command, lambda run: put(run / 'metrics.jsonl', what))

def tensors_changed(change):
    "A change of the tensors of the file of weights, with its metadata kept."

    def harm(run):
        from safetensors import safe_open

        (file,) = (run / 'weights').glob('*.safetensors')
        tensors, about = load_file(file), safe_open(file, 'pt').metadata()
        change(tensors)
        file.unlink()
        save_file(tensors, file, about)

    return harm

def bytes_changed(change):
    "A change of the bytes of the file of weights."

    def harm(run):
        (file,) = (run / 'weights').glob('*.safetensors')
        spoil(file, bytes(change(bytearray(file.read_bytes()))))

    return harm

def flipped(raw):
    raw[-100] ^= 1
    return raw

def manifest_gone(harm):
    def both(run):
        harm(run)
        (run / 'weights' / 'manifest.json').unlink()

    return both

WEIGHTS = {
    'gone': lambda run: shutil.rmtree(run / 'weights'),
    'file gone': lambda run: [f.unlink() for f in (run / 'weights').glob('*.safetensors')],
    'manifest gone': lambda run: (run / 'weights' / 'manifest.json').unlink(),
    'bit': bytes_changed(flipped),
    'cut': bytes_changed(lambda raw: raw[:-1]),
    'half': bytes_changed(lambda raw: raw[: len(raw) // 2]),
    'empty': bytes_changed(lambda raw: b''),
    'zeros': bytes_changed(lambda raw: bytes(len(raw))),
    'header': bytes_changed(lambda raw: b'\xff' * 8 + raw[8:]),
    'more': bytes_changed(lambda raw: raw + b'0'),
    'tensor gone': tensors_changed(lambda t: t.pop(min(t))),
    'tensor more': tensors_changed(lambda t: t.update(x=torch.ones(1))),
    'reshaped': tensors_changed(lambda t: t.update({min(t): t[min(t)].reshape(-1, 1)})),
    'half precision': tensors_changed(lambda t: t.update({k: v.half() for k, v in t.items()})),
    'pickle beside': lambda run: spoil(run / 'weights' / 'diffusion_pytorch_model.bin', b'x'),
    'index beside': lambda run: spoil(run / 'weights' / 'diffusion_pytorch_model.safetensors.index.json', '{}'),
    'other': lambda run: spoil(run / 'weights' / 'more.safetensors', b'x'),
}

@pytest.mark.parametrize('what', WEIGHTS)
@pytest.mark.parametrize('run', ['run', 'lora'])
def test_weights_of_a_run(here, tmp_path, capfd, run, what):
    after(here, tmp_path, capfd, 'evaluate', WEIGHTS[what], run)

@pytest.mark.parametrize('command', ['sample', 'export'])
@pytest.mark.parametrize('what', ['gone', 'bit', 'manifest gone', 'tensor gone', 'pickle beside'])
def test_weights_that_are_shared(here, tmp_path, capfd, command, what):
    after(here, tmp_path, capfd, command, WEIGHTS[what])

@pytest.mark.parametrize('what', [*BROKEN, *PLACES])
def test_manifest_of_weights(here, tmp_path, capfd, what):
    after(here, tmp_path, capfd, 'evaluate', lambda run: replaced(run / 'weights' / 'manifest.json', what))

@pytest.mark.parametrize('what', [*BROKEN, *PLACES])
def test_panel_of_a_run(here, tmp_path, capfd, what):
    after(here, tmp_path, capfd, 'resume', lambda run: replaced(run / 'panel.json', what))

@pytest.mark.parametrize('what', [*BROKEN, *PLACES])
def test_evaluation_of_a_run(here, tmp_path, capfd, what):
    after(here, tmp_path, capfd, 'export', lambda run: replaced(run / 'evaluation.json', what))

def other_run(run):
    "The checkpoint of another run, whole, in place of its own."
    shutil.rmtree(run / 'checkpoints')
    shutil.copytree(run.parents[1] / 'x', run / 'checkpoints')

RUN_HARMS = {
    'config gone': lambda run: (run / 'config.json').unlink(),
    'checkpoint renamed': lambda run: (run / 'checkpoints' / '000002').rename(run / 'checkpoints' / '000007'),
    'checkpoints damaged': lambda run: [spoil(f, 'x') for f in (run / 'checkpoints').rglob('state.json')],
    'metrics gone': lambda run: (run / 'metrics.jsonl').unlink(),
}

@pytest.mark.filterwarnings('ignore:the checkpoint')
@pytest.mark.parametrize('what', RUN_HARMS)
def test_resuming_what_is_not_whole(here, tmp_path, capfd, what):
    after(here, tmp_path, capfd, 'resume', RUN_HARMS[what])

def test_a_checkpoint_of_another_run(here, tmp_path, capfd):
    def harm(run):
        shutil.rmtree(run / 'checkpoints')
        shutil.copytree(here.folder / 'lora' / 'checkpoints', run / 'checkpoints')

    after(here, tmp_path, capfd, 'resume', harm)

# ---- models

def part_changed(part, change):
    def harm(model):
        (file,) = (model / part).glob('*.safetensors')
        tensors = load_file(file)
        change(tensors)
        file.unlink()
        save_file(tensors, file, dict(format='pt'))

    return harm

PARTS = ('transformer', 'vae', 'text_encoder', 'text_encoder_2')
MODELS = {
    **{f'{part} lacks one': part_changed(part, lambda t: t.pop(max(t))) for part in PARTS},
    **{f'{part} has more': part_changed(part, lambda t: t.update(more=torch.ones(2))) for part in PARTS},
    **{f'{part} reshaped': part_changed(part, lambda t: t.update({max(t): torch.ones(3, 3, 3)})) for part in PARTS},
    **{
        f'{part} gone': (lambda part: lambda model: shutil.rmtree(model / part))(part)
        for part in (*PARTS, 'tokenizer', 'tokenizer_2', 'scheduler')
    },
    **{
        f'{part} empty': (lambda part: lambda model: [f.unlink() for f in (model / part).iterdir()])(part)
        for part in (*PARTS, 'tokenizer', 'tokenizer_2', 'scheduler')
    },
    **{
        f'{part} cut': (
            lambda part: lambda model: [spoil(f, f.read_bytes()[:-99]) for f in (model / part).glob('*.safetensors')]
        )(part)
        for part in PARTS
    },
    **{
        f'config of {part}: {what}': (lambda part, what: lambda model: replaced(model / part / 'config.json', what))(
            part, what
        )
        for part in PARTS
        for what in ('empty', 'null', 'list', 'object', 'deep', 'pipe', 'no link')
    },
    **{
        f'index: {what}': (lambda what: lambda model: replaced(model / 'model_index.json', what))(what)
        for what in (*BROKEN, *PLACES)
    },
    **{
        f'null index of {part}': (
            lambda part: (
                lambda model: (
                    spoil(
                        model
                        / part
                        / ('model' if 'text' in part else 'diffusion_pytorch_model').__add__('.safetensors.index.json'),
                        '{"metadata": null, "weight_map": null}',
                    )
                    and [f.unlink() for f in (model / part).glob('*.safetensors')]
                )
            )
        )(part)
        for part in PARTS
    },
    'another class': lambda model: spoil(model / 'model_index.json', '{"_class_name": "StableDiffusionPipeline"}'),
    'class of a list': lambda model: spoil(model / 'model_index.json', '{"_class_name": ["FluxPipeline"]}'),
    'own code': lambda model: spoil(
        model / 'model_index.json',
        (model / 'model_index.json').read_text().replace('"FluxTransformer2DModel"', '"NoSuchModel"'),
    ),
    'other library': lambda model: spoil(
        model / 'model_index.json',
        (model / 'model_index.json')
        .read_text()
        .replace('"diffusers",\n    "FluxTransformer2DModel"', '"os",\n    "system"'),
    ),
    'odd transformer': lambda model: spoil(
        model / 'transformer' / 'config.json',
        json.dumps(json.loads((model / 'transformer' / 'config.json').read_text()) | dict(num_layers=3)),
    ),
    'heads': lambda model: spoil(
        model / 'transformer' / 'config.json',
        json.dumps(json.loads((model / 'transformer' / 'config.json').read_text()) | dict(attention_head_dim=-1)),
    ),
}

@pytest.mark.slow
@pytest.mark.parametrize('what', MODELS)
def test_model_folders(here, tmp_path, capfd, what):
    model = Path(shutil.copytree(here.mini, tmp_path / 'model', copy_function=os.link))
    MODELS[what](model)
    words = [w.replace(here.mini, str(model)) for w in here.train]
    refused(capfd, [*words, '--out', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()

# ---- prompts

PROMPT_FILES = {  # name of the file → content
    **{f'{name}.json': content for name, content in BROKEN.items()},
    **{f'{name}.jsonl': content for name, content in BROKEN.items()},
    'empty.txt': '',
    'blank.txt': '\n \n\n',
    'latin.txt': b'caf\xe9',
    'utf-16.txt': 'a b'.encode('utf-16'),
    'nul.txt': 'a\0b',
    'long.txt': 'x' * 10_000_000,
    'zeros.txt': bytes(5000),
    'mixed.json': '["a", 1]',
    'nested.json': '[["a"]]',
    'keys.json': '[{"a": "b"}]',
    'nulls.json': '[null]',
    'bool.jsonl': '"a"\ntrue\n',
    'junk.jsonl': '"a"\njunk\n',
    'long.json': json.dumps(['x' * 100_000]),
    'NaN.jsonl': '"a"\nNaN',
    'few.txt': 'one prompt',
    'other.csv ': '',
}

@pytest.mark.parametrize('name', PROMPT_FILES)
def test_prompt_files(here, tmp_path, capfd, name):
    file = spoil(tmp_path / name, PROMPT_FILES[name])
    refused(capfd, [*here.train, '--prompts', str(file), '--out', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()

@pytest.mark.parametrize('what', PLACES)
def test_prompts_that_are_no_file(here, tmp_path, capfd, what):
    put(tmp_path / 'p.txt', what)
    refused(capfd, [*here.train, '--prompts', str(tmp_path / 'p.txt'), '--out', str(tmp_path / 'out')])

# ---- rewards

REWARD_CODE = '''
import torch
number, text, none, empty = 3, 'x', None, ()
class Odd:
    def __init__(self): raise ValueError('no')
def one(images): return images.mean((1, 2, 3))
def three(images, prompts, more): return images.mean((1, 2, 3))
def raises(images, prompts): raise ValueError('first line\\nsecond line')
def exits(images, prompts): raise SystemExit(0)
def quits(images, prompts): quit()
def asserts(images, prompts): assert False
def odd_error(images, prompts): raise type('Odd', (BaseException,), {})('own')
def imaginary(images, prompts): return torch.complex(images.mean((1, 2, 3)), images.mean((1, 2, 3)))
def scalar(images, prompts): return images.mean()
def matrix(images, prompts): return images.mean((2, 3))
def fewer(images, prompts): return images.mean((1, 2, 3))[1:]
def nothing(images, prompts): pass
def texts(images, prompts): return prompts
def nan(images, prompts): return images.mean((1, 2, 3))*float('nan')
def infinite(images, prompts): return images.mean((1, 2, 3)) + float('inf')
def large(images, prompts): return [1e300]*len(images)
def ragged(images, prompts): return [[1.], [1., 2.]]
def objects(images, prompts): return [object()]*len(images)
def mapping(images, prompts): return dict(a=1)
def deep(images, prompts): return deep(images, prompts)
def yields(images, prompts): yield 1.
'''
BAD_MODULES = dict(
    syntax_error='def f(:',
    raises_error='raise RuntimeError("no")',
    exits_quietly='raise SystemExit(0)',
    quits_itself='exit()',
    imports_nothing='import no_such_package',
    recursion='def f(): f()\nf()',
    asserts_false='assert False',
    own_error='class E(BaseException): pass\nraise E("x")',
    zeros='\0',
    unicode_error='x = "\\ud800"; x.encode()',
)
NAMES = [
    name
    for line in REWARD_CODE.split('\n')
    if line.startswith(('def ', 'class '))
    for name in [line.split()[1].split('(')[0].rstrip(':')]
] + ['number', 'text', 'none', 'empty', 'missing', '', '__doc__', 'torch']

@pytest.fixture
def odd_rewards(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'odd_rewards_here.py').write_text(REWARD_CODE)
    for name, code in BAD_MODULES.items():
        (tmp_path / f'bad_{name}.py').write_text(code)
    return tmp_path

@pytest.mark.parametrize(
    'name',
    [f'odd_rewards_here:{name}' for name in NAMES]
    + [f'bad_{name}:f' for name in BAD_MODULES]
    + [
        'no_such_module:f',
        ':f',
        ':',
        'a:b:c',
        '..a:b',
        'os.path',
        'shade',
        'shade:dark,shade:dark',
        ',',
        ' ',
        'nonsense',
        'colour,colour',
        'math:sqrt',
        'builtins:exit',
        'hps21',
        'unified_reward',
        'geneval',
    ],
)
def test_rewards(here, odd_rewards, capfd, name):
    said = refused(capfd, [*here.train[:-1], name, '--out', str(odd_rewards / 'out')])
    assert not (odd_rewards / 'out').exists() and 'second line' not in said

@pytest.mark.parametrize('name', ['raises', 'exits', 'nan_later', 'shape', 'complex_later'])
def test_rewards_that_fail_later_keep_what_was_done(here, tmp_path, capfd, monkeypatch, name):
    "Exit code 1, a checkpoint of all whole iterations, and weights of them."
    monkeypatch.syspath_prepend(tmp_path)
    ends = dict(
        raises='raise ValueError("later\\nmore")',
        exits='raise SystemExit(0)',
        nan_later='return None',
        shape='return images',
        complex_later='return images.mean((1, 2, 3))*1j',
    )
    (tmp_path / f'later_{name}.py').write_text(
        f'calls = 0\ndef f(images, prompts):\n    global calls\n    calls += 1\n'
        f'    if calls > 6:\n        {ends[name]}\n'
        '    return 1 - images.mean((1, 2, 3))\n'
    )
    out = tmp_path / 'out'
    words = [*here.train[:-1], f'later_{name}:f', '--iterations', '50', '--save-every', '40', '--out', str(out)]
    said = refused(capfd, words, code=1)
    done = len((out / 'metrics.jsonl').read_text().splitlines())
    assert f'later_{name}:f' in said and 0 < done < 50
    assert [int(f.name) for f in (out / 'checkpoints').iterdir()] == [done] and (
        out / 'weights' / 'manifest.json'
    ).exists()

# ---- paths

PATHS = [
    '',
    'n' * 300,
    '/dev/null',
    '/dev/null/x',
    'prompts.txt',
    'prompts.txt/x',
    'a/' * 3000,
    'run',
    '/proc/x',
    '\udcff\udcfe',
]

COMMANDS = (
    'train --out',
    'calibrate --rewards shade:dark --prompts prompts.txt --trajectories 2 --rounds 2 --out',
    'evaluate',
    'report',
    'evaluate run --scorers colour --T 2 --seeds 0 --out',
    'sample',
    'export run',
)
GOOD = {('evaluate', 'run'), ('report', 'run'), ('sample', 'run')}  # there is a run of that name
TO_RUN = 'evaluate run --scorers colour --T 2 --seeds 0 --out'  # writes into it, as it may

@pytest.mark.parametrize(
    'command, path', [(c, p) for c in COMMANDS for p in PATHS if (c, p) not in {*GOOD, (TO_RUN, 'run')}], ids=ascii
)
def test_paths(here, capfd, command, path):
    train = [*here.train[1:], '--iterations', '1'] if command.startswith('train') else []
    words = command.split()
    model = ['--model', here.mini] if words[0] == 'calibrate' else []
    refused(capfd, [words[0], *train, *model, *words[1:], path], here.folder)

@pytest.mark.parametrize('value', ['/dev/null', 'prompts.txt', 'n' * 300], ids=lambda v: v[:12])
def test_cache(here, tmp_path, capfd, value):
    refused(capfd, [*here.train, '--iterations', '1', '--cache', value, '--out', str(tmp_path / 'out')])

# ---- evaluate, sample

@pytest.mark.parametrize(
    'words',
    [
        '--height -1',
        '--height 25',
        '--height 99999999',
        '--width -48',
        '--width 1',
        '--height x',
        '--seeds 0,0',
        '--seeds -1',
        '--seeds x',
        '--seeds 9' * 1 + '9' * 30,
        '--seeds 0,,1',
        '--scorers colour,colour',
        '--scorers nonsense',
        '--scorers shade:none',
        '--scorers , ',
        '--T 0',
        '--T -5',
        '--T x',
        '--T 99999999',
        '--precision fp8',
        '--device tpu',
        *([] if torch.cuda.is_available() else ['--device cuda']),
        *([] if torch.backends.mps.is_available() else ['--device mps']),
        '--prompts nowhere',
        '--prompts .',
        '--prompts /dev/null',
        '--unknown 1',
        '--seeds nan',
    ],
)
def test_evaluate(here, tmp_path, capfd, words):
    base = [] if '--scorers' in words else ['--scorers', 'colour']
    refused(capfd, ['evaluate', 'run', *base, *words.split(), '--out', str(tmp_path / 'out')], tmp_path)

@pytest.mark.parametrize('option', ['--prompts', '--scorers', '--out', '--seeds', '--precision', '--T', '--device'])
def test_empty_options(here, capfd, option):
    refused(capfd, ['evaluate', 'run', option, ''], here.folder)

@pytest.mark.parametrize(
    'words', ['--n 0', '--n -3', '--n x', '--T 0', '--seeds 0,0', '--seeds -1', '--height -1', '--prompts nowhere']
)
def test_sample(here, tmp_path, capfd, words):
    refused(capfd, ['sample', 'run', *words.split(), '--out', str(tmp_path / 'out')], tmp_path)

@pytest.mark.parametrize(
    'words',
    [
        '',
        '--nope',
        'nope',
        'train',
        '--debug',
        'train --out',
        'evaluate',
        'resume x',
        'report',
        'train --out x --resume y',
        'train --out x --override a=b',
        'train --out x --resume --override seed=1',
        'train --out x --resume --override lr',
    ],
)
def test_words(here, capfd, words):
    refused(capfd, words.split(), here.folder)

# ---- checkpoints of scorers

class Bad:
    "A pickle that would run something."

    def __reduce__(self):
        return os.system, ('touch ran',)

PICKLES = {
    'empty': b'',
    'junk': b'not a pickle',
    'zeros': bytes(4096),
    'list': [1],
    'nothing': {},
    'no key': dict(w=torch.ones(1)),
    'none': None,
    'numbers': dict(state_dict={1: torch.ones(1)}),
    'values': dict(state_dict=dict(w=1)),
    'code': dict(state_dict=Bad()),
    'empty state': dict(state_dict={}),
    'other weights': dict(state_dict=dict(w=torch.ones(2))),
}

@pytest.mark.parametrize('what', PICKLES)
def test_convert(here, tmp_path, capfd, monkeypatch, what):
    monkeypatch.setenv('G2RPO_ASSETS', str(tmp_path / 'assets'))
    file, content = tmp_path / 'HPS_v2.1_compressed.pt', PICKLES[what]
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    refused(capfd, ['convert', 'hps21', str(file)])
    assert not (tmp_path / 'assets').exists() and not (here.folder / 'ran').exists()

@pytest.mark.parametrize(
    'words',
    [
        'hps21 /nowhere',
        'hps21 .',
        'hps21 /dev/null',
        'nothing .',
        '.. .',
        'hps21 prompts.txt',
        'hpdv2_test prompts.txt --out x',
        'hps21 a b',
        'hpdv2_test /nowhere',
        'hpdv2_test .',
        'hpdv2_test /dev/null',
        'bert_vocab prompts.txt',
        'clip prompts.txt',
    ],
)
def test_convert_words(here, tmp_path, capfd, monkeypatch, words):
    monkeypatch.setenv('G2RPO_ASSETS', str(tmp_path / 'assets'))
    refused(capfd, ['convert', *words.split()], here.folder)
    assert not (tmp_path / 'assets').exists()

@pytest.mark.parametrize('assets', ['prompts.txt', '/dev/null', 'n' * 300], ids=lambda v: v[:12])
def test_assets_that_are_no_folder(here, tmp_path, capfd, monkeypatch, assets):
    monkeypatch.setenv('G2RPO_ASSETS', assets)
    torch.save(dict(state_dict=dict(w=torch.ones(1))), tmp_path / 'HPS_v2.1_compressed.pt')
    refused(capfd, ['convert', 'hps21', str(tmp_path)])
    refused(capfd, [*here.train[:-1], 'hps21', '--out', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()
