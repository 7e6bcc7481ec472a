"Whatever values a config, a method, a ψ or prompts are made of: accepted and the same after a round trip, or refused."

import json
from dataclasses import MISSING, fields, replace

from g2rpo.core.method import Method
from g2rpo.core.psi import load_psi, Psi
from g2rpo.core.rows import METHODS
from g2rpo.core.window import Window
from g2rpo.errors import InputError
from g2rpo.files import strict_json, to_json, write_json
from g2rpo.training.config import Config
from g2rpo.training.prompts import fingerprint, load_prompts
from g2rpo.training.run_dir import config_from_dict, config_to_dict
from hypothesis import given, settings, strategies as st, HealthCheck

whole = st.one_of(st.integers(-3, 20), st.integers(), st.sampled_from([2**63 - 1, 2**63, 10**30]))
number = st.one_of(st.floats(0, 1), st.floats(), whole)
word = st.one_of(
    st.text(max_size=8),
    st.sampled_from(['none', 'half', 'all', 'fp32', 'bf16', 'no', 'flow', 'cps', 'chain', 'gain', '\0', '\ud800']),
)
plain = st.one_of(st.none(), st.booleans(), whole, number, word)
anything = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(word, inner, max_size=3)
    ),
    max_leaves=6,
)
many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

def changes(kind, size=4):
    "Values for some fields of a dataclass: near to what they are, or anything."

    def value(f):
        near = [st.just(f.default)] if f.default is not MISSING else []
        sort = dict(int=whole, float=number, str=word, bool=st.booleans()).get(getattr(f.type, '__name__', ''), plain)
        return st.one_of(*near, sort, anything)

    return st.lists(st.sampled_from([f.name for f in fields(kind)]), max_size=size, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({f.name: value(f) for f in fields(kind) if f.name in names})
    )

def made(make):
    "What a call makes; None if it is refused in one line."
    try:
        return make()
    except InputError as error:
        assert str(error)

@many
@given(changes(Config), changes(Method, 2))
def test_configs(run, method):
    def make():
        row = replace(METHODS['g2rpo'], **method)
        return Config(**dict(method=row) | run)

    cfg = made(make)
    if cfg is not None:
        assert config_from_dict(strict_json(to_json(config_to_dict(cfg, cfg.rewards, 'a')))) == cfg

@many
@given(st.sampled_from(sorted(METHODS)), changes(Method))
def test_methods(row, values):
    method = made(lambda: replace(METHODS[row], **values))
    if method is not None:
        cfg = made(lambda: Config(method=method, T=12, group_size=12))
        assert cfg is None or config_from_dict(strict_json(to_json(config_to_dict(cfg, (), 'a')))).method == method

@many
@given(changes(Window))
def test_windows(values):
    window = made(lambda: Window(**values))
    if window is not None:
        steps = made(lambda: window.steps(10, 0, 3))
        assert steps is None or len(steps) >= 1

@many
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
    st.one_of(st.none(), anything),
    st.sampled_from(['values', 'grid', 'kind']),
)
def test_psi(tmp_path_factory, values, bad, where):
    grid = [1 - i / len(values) for i in range(len(values) + 1)]
    saved = dict(values=values, grid=grid, kind='multiplier')
    if bad is not None:
        saved[where] = bad
    file = tmp_path_factory.getbasetemp() / 'psi.json'
    try:
        file.write_text(json.dumps(saved), encoding='utf-8')
    except (ValueError, TypeError):
        return
    psi = made(lambda: load_psi(file))
    if psi is not None:
        assert psi == Psi(psi.values, psi.grid, psi.kind) and len(psi.grid) == len(psi.values) + 1
        write_json(file, dict(values=psi.values, grid=psi.grid, kind=psi.kind))
        assert load_psi(file) == psi

texts = st.lists(st.text(max_size=20), max_size=6)

@many
@given(texts, st.sampled_from(['txt', 'json', 'jsonl']))
def test_prompts(tmp_path_factory, prompts, kind):
    "Distinct prompts, in order, whatever separators of Unicode they hold; a text file ends a line at a line feed."
    file = tmp_path_factory.getbasetemp() / f'prompts.{kind}'
    lines = [line for p in prompts for line in p.split('\n')] if kind == 'txt' else prompts
    file.write_bytes(
        {'txt': '\n'.join(lines), 'json': json.dumps(lines), 'jsonl': '\n'.join(map(json.dumps, lines))}[kind].encode()
    )
    found = made(lambda: load_prompts(str(file)))
    if found is not None:
        assert found == list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        assert len(fingerprint(found)) == 64

@many
@given(anything)
def test_json(value):
    "What is written is read, unless it cannot be JSON."
    try:
        text = to_json(value)
    except (TypeError, UnicodeEncodeError):
        return
    try:
        assert to_json(strict_json(text)) == text
    except ValueError as error:
        assert 'surrogates' in str(error) or 'there twice' in str(error) or 'digits' in str(error)
