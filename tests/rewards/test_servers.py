"Servers that are slow, broken, wrong or malicious; keys, proxies and redirects; the protocol of Flow-GRPO's servers."
import io
import json
import pickle
import shutil
import socket
import subprocess
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from g2rpo.errors import InputError, RunStopped
from g2rpo.rewards.flow_grpo_server import FlowGrpoServer
from g2rpo.rewards.geneval import GenEval
from g2rpo.rewards.load import load_rewards, REWARD_LOADERS, scorer_hashes
from g2rpo.rewards.server import probe_server, Server
from g2rpo.rewards.unified_reward import UnifiedReward
from helpers import free_port
from PIL import Image

KEY = 'sesame-1234'
ANSWER = b'{"good": true}'

@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch):
    "Neither proxies nor addresses from outside."
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'no_proxy', 'NO_PROXY',
                 'G2RPO_TEST_KEY', 'G2RPO_GENEVAL', 'G2RPO_GENEVAL_TASKS', 'G2RPO_UNIFIED_REWARD',
                 'G2RPO_FLOW_GRPO_GENEVAL', 'G2RPO_FLOW_GRPO_DEQA'):
        monkeypatch.delenv(name, raising=False)

def server_at(address, **changes):
    "A server that is asked without patience."
    return Server(address, **dict(variable='G2RPO_TEST', timeout=2., pause=.01) | changes)

class Reply(BaseHTTPRequestHandler):
    "Notes each request and answers with status, headers and body by its server's function `reply` of the body."
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.server.seen.append((self.path, dict(self.headers), body))
        status, headers, answer = self.server.reply(body)
        self.send_response(status)
        for name, value in ({'Content-Length': len(answer)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *args): pass

@contextmanager
def http_server(reply):
    "A server of HTTP; yields its address and what it saw."
    http = ThreadingHTTPServer(('127.0.0.1', 0), Reply)
    http.reply, http.seen, http.handle_error = reply, [], lambda *args: None
    threading.Thread(target=http.serve_forever, args=(.01,), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{http.server_port}', http.seen
    finally:
        http.shutdown()
        http.server_close()

def good(body): return 200, {}, ANSWER

@contextmanager
def raw_server(*conversations, wrap=lambda connection: connection):
    "A server that sends literal pieces, one conversation for each connection; the last is repeated."
    listener, ended = socket.create_server(('127.0.0.1', 0)), threading.Event()
    def serve():
        for n in range(1000):
            try:
                connection, _ = listener.accept()
                with wrap(connection) as talking:
                    data = b''
                    while not data.endswith(b'}'):      # the end of a JSON question
                        data += talking.recv(2**16)
                    for piece in conversations[min(n, len(conversations) - 1)]():
                        talking.sendall(piece)
                        if ended.is_set():
                            return
            except OSError:
                if ended.is_set():
                    return
    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f'127.0.0.1:{listener.getsockname()[1]}'
    finally:
        ended.set()
        listener.close()

def http_answer(body, length=None):
    "The bytes of an answer."
    return b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % (length or len(body)) + body

def dripping(start, seconds=30):
    "A beginning, and then a byte each 50 ms."
    def pieces():
        yield start
        for _ in range(seconds*20):
            time.sleep(.05)
            yield b'x'
    return pieces

def stopped(ask, kind=RunStopped):
    "What an error says, in one line."
    with pytest.raises(kind) as caught:
        ask()
    assert '\n' not in str(caught.value)
    return str(caught.value)

OK = b'HTTP/1.1 200 OK\r\n'

@pytest.mark.parametrize('start', [b'', OK + b'X: ', OK + b'\r\n', http_answer(b'{', 10_000)])
def test_the_time_is_that_of_the_whole_answer(start):
    "Answers that drip in the status line, in a header, in a body without and with a length."
    with raw_server(dripping(start)) as address:
        began = time.monotonic()
        said = stopped(lambda: server_at(f'http://{address}', timeout=.4, tries=2).post('/', {}))
        assert .8 <= time.monotonic() - began < 2
    assert 'no whole answer in 0.4 s' in said and 'in 2 tries' in said

def test_an_answer_has_a_size():
    def endless():
        yield b'HTTP/1.1 200 OK\r\n\r\n'
        while True:
            yield b'0'*2**16
    with raw_server(endless) as address:
        assert 'more than 1,000,000 bytes' in stopped(lambda: server_at(f'http://{address}', limit=10**6).post('/', {}))

@pytest.mark.parametrize('fault', [
    http_answer(ANSWER[:-4], len(ANSWER)),                     # IncompleteRead
    b'hello\r\n\r\n', b'',                                     # BadStatusLine, RemoteDisconnected
    http_answer(b'{"good": "\xff"}'), http_answer(b'{"good"'),  # no UTF-8, no JSON
    http_answer(b'['*100_000),                                 # JSON too deep to read
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n',
    b'HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n', b'HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n'])
def test_common_faults_are_tried_again(fault):
    "Twice the fault, then an answer; and a line if it stays."
    with raw_server(lambda: [fault], lambda: [fault], lambda: [http_answer(ANSWER)]) as address:
        assert server_at(f'http://{address}').post('/', {}) == dict(good=True)
    with raw_server(lambda: [fault]) as address:
        assert 'gave no answer in 3 tries' in stopped(lambda: server_at(f'http://{address}').post('/', {}))

def test_redirects_are_not_followed():
    with http_server(good) as (elsewhere, seen_elsewhere):
        for status in (301, 302, 303, 307, 308):
            with http_server(lambda body: (status, dict(Location=elsewhere), b'')) as (address, seen):
                said = stopped(lambda: server_at(address).post('/', {}))
            assert 'redirects are not followed' in said and len(seen) == 1
        assert seen_elsewhere == []

def test_this_machine_is_never_asked_through_a_proxy(monkeypatch):
    with http_server(good) as (proxy, by_proxy), http_server(good) as (address, direct):
        for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'all_proxy'):
            monkeypatch.setenv(name, proxy)
        port = address.rsplit(':', 1)[1]
        for host in ('127.0.0.1', 'localhost'):
            assert server_at(f'http://{host}:{port}').post('/', {}) == dict(good=True)
        assert (len(by_proxy), len(direct)) == (0, 2)
        assert server_at('http://judge.invalid').post('/ask', {}) == dict(good=True)     # others are, as set
        assert by_proxy[0][0] == 'http://judge.invalid/ask'
        monkeypatch.setenv('no_proxy', 'judge.invalid')
        stopped(lambda: server_at('http://judge.invalid', tries=1).post('/ask', {}))
        assert len(by_proxy) == 1

def test_a_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv('G2RPO_TEST_KEY', f'{KEY}\n')
    def echo(body): return 500, {}, json.dumps(seen[-1][1]).encode()
    with http_server(echo) as (address, seen):
        server = server_at(address)
        judge = UnifiedReward(server)
        said = stopped(lambda: server.post('/', {})) + stopped(lambda: probe_server(judge), InputError)
    assert all(headers['Authorization'] == f'Bearer {KEY}' for _, headers, _ in seen)
    assert KEY not in said + repr(judge) + judge.id + str(scorer_hashes(dict(unified_reward=judge)))
    with http_server(lambda body: (401, {}, b'who are you?')) as (address, seen):
        assert 'set G2RPO_OTHER_KEY' in stopped(lambda: server_at(address, variable='G2RPO_OTHER').post('/', {}))
    assert len(seen) == 1 and 'Authorization' not in seen[0][1]      # each server has its own
    monkeypatch.setenv('G2RPO_TEST_KEY', f'{KEY}\r\nX-Other: 1')
    said = stopped(lambda: server.post('/', {}), InputError)
    assert 'G2RPO_TEST_KEY holds no API key' in said and KEY not in said

def test_addresses_hold_no_password():
    said = stopped(lambda: server_at(f'http://me:{KEY}@127.0.0.1'), InputError)
    assert 'G2RPO_TEST' in said and KEY not in said
    assert "G2RPO_TEST='127.0.0.1:80' is not the address" in stopped(lambda: server_at('127.0.0.1:80'), InputError)

def test_https_is_verified_and_cut(tmp_path, monkeypatch):
    "A certificate that nobody vouches for is refused; with one that is trusted, the time holds as well."
    import ssl
    if not shutil.which('openssl'):
        pytest.skip('openssl makes the certificate')
    pem, key = tmp_path/'cert.pem', tmp_path/'key.pem'
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes',
                    '-keyout', key, '-out', pem, '-days', '2', '-subj', '/CN=localhost',
                    '-addext', 'subjectAltName=DNS:localhost'], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    def tls(connection): return context.wrap_socket(connection, server_side=True)
    with raw_server(lambda: [http_answer(ANSWER)], dripping(b'HTTP/1.1 200 OK\r\n\r\n'), wrap=tls) as address:
        server = server_at(f'https://localhost:{address.rsplit(":", 1)[1]}', tries=1, timeout=.5)
        with monkeypatch.context() as trusting:
            trusting.setenv('SSL_CERT_FILE', str(pem))
            assert server.post('/', {}) == dict(good=True)
            assert 'no whole answer in 0.5 s' in stopped(lambda: server.post('/', {}))
        assert 'certificate' in stopped(lambda: server.post('/', {}))

# Judges

def said_by_judge(message):
    "A judge's answer as an OpenAI-compatible server gives it."
    return lambda body: (200, {}, json.dumps(dict(choices=[dict(message=dict(content=message))])).encode())

def judged(message, prompt='a cat'):
    "The score that UnifiedReward reads from a message."
    with http_server(said_by_judge(message)) as (address, seen):
        return UnifiedReward(server_at(address), size=16)(torch.rand(1, 3, 16, 16), [prompt]).item()

def test_scores_are_read_whole_and_from_their_own_line():
    caption = 'a sign that says "Final Score: 5"'
    assert judged('Final Score: 4.5') == 4.5
    assert judged(f'The caption asks for {caption}.\nFinal Score: 2', caption) == 2
    assert judged(f'Final Score: 2\n\nbecause the caption is {caption}', caption) == 2
    for refused in ('Final Score: 10', 'Final Score: 1000', 'Final Score: 6', 'Final Score: 0', 'Final Score: -3',
                    f'The caption asks for {caption}', 'Final Score: 3 of 5 or so', '', 'Final Score: nan'):
        assert 'gave no score from 1 to 5' in stopped(lambda: judged(refused))
    began = time.monotonic()
    stopped(lambda: judged('Final Score:' + ' '*50_000))
    assert time.monotonic() - began < 1

# One request before a training

def test_a_missing_variable_is_named(monkeypatch, tmp_path):
    named = {'unified_reward': 'G2RPO_UNIFIED_REWARD', 'flow_grpo_deqa': 'G2RPO_FLOW_GRPO_DEQA'}
    rules = ('', '_graded', '_strict')
    named |= {f'geneval{rule}': 'G2RPO_GENEVAL' for rule in rules}
    named |= {f'flow_grpo_geneval{rule}': 'G2RPO_FLOW_GRPO_GENEVAL' for rule in rules}
    for name, variable in named.items():
        assert name in REWARD_LOADERS
        assert f'{variable} is not set' in stopped(lambda: load_rewards([name]), InputError)
        monkeypatch.setenv(variable, 'http://127.0.0.1:9')
        if 'geneval' in name:
            assert 'G2RPO_GENEVAL_TASKS is not set' in stopped(lambda: load_rewards([name]), InputError)
        monkeypatch.delenv(variable)

def test_a_probe_names_variable_address_and_reason():
    task = dict(tag='counting', prompt='a photo of a dog', include=[{'class': 'dog', 'count': 1}])
    tasks, jpeg_only = {task['prompt']: task}, dict(answer='scores')
    address = f'http://127.0.0.1:{free_port()}'
    for make in (UnifiedReward, lambda s: GenEval(s, tasks), lambda s: FlowGrpoServer(s, tasks=tasks, **jpeg_only)):
        said = stopped(lambda: probe_server(make(server_at(address))), InputError)
        assert f'G2RPO_TEST={address} cannot be used as' in said and 'refused' in said and 'in 1 try' in said
        with http_server(lambda body: (404, {}, b'no\nsuch\x1b[31m model')) as (there, seen):
            said = stopped(lambda: probe_server(make(server_at(there))), InputError)
        assert '404 no such [31m model' in said and len(seen) == 1
        with http_server(good) as (there, seen):
            said = stopped(lambda: probe_server(make(server_at(there))), InputError)
        assert f'G2RPO_TEST={there}' in said
    with http_server(said_by_judge('Final Score: 3')) as (there, seen):
        assert probe_server(UnifiedReward(server_at(there))) == 3
    detections = dict(detections=[{'class': 'dog', 'box': [0, 0, 9, 9], 'score': .95, 'color': 'red'}])
    with http_server(lambda body: (200, {}, json.dumps(detections).encode())) as (there, seen):
        assert probe_server(GenEval(server_at(there), tasks)) == 1

# Flow-GRPO's protocol

TASKS = {task['prompt']: task for task in (
    dict(tag='color_attr', prompt='a brown giraffe', include=[{'class': 'giraffe', 'count': 1, 'color': 'brown'}]),
    dict(tag='counting', prompt='two dogs', include=[{'class': 'dog', 'count': 2}],
         exclude=[{'class': 'dog', 'count': 3}]))}

def literal_geneval(body):
    "The request is unpickled, JPEG files are opened, the answer is a pickle; failures are a traceback with status 500."
    try:
        data = pickle.loads(body)
        pictures = [Image.open(io.BytesIO(file), formats=['jpeg']).convert('L') for file in data['images']]
        assert len(pictures) == len(data['meta_datas']) <= 64
        light = [sum(p.histogram()[128:])/(p.width*p.height) for p in pictures]
        strict = [float(x > .9) for x in light]
        own = [0. if data['only_strict'] else x for x in strict]
        groups = {key: [x if task['tag'] == key else -10. for x, task in zip(strict, data['meta_datas'])]
                  for key in ('single_object', 'counting', 'color_attr')}
        answer = dict(scores=[x - .25 for x in light], rewards=own, strict_rewards=strict,
                      group_rewards=groups, group_strict_rewards=groups)
        return 200, {}, pickle.dumps(answer)
    except Exception:
        return 500, {}, traceback.format_exc().encode()

def pictures(n):
    "Black and white in turn."
    return torch.arange(n).remainder(2).float()[:, None, None, None].expand(n, 3, 16, 16)

def test_flow_grpos_geneval_server():
    prompts = [list(TASKS)[i % 2] for i in range(130)]
    white = torch.arange(130).remainder(2).float()
    with http_server(literal_geneval) as (address, seen):
        server = server_at(address)
        graded = FlowGrpoServer(server, 'scores', TASKS)(pictures(130), prompts)
        asked = [pickle.loads(body) for _, _, body in seen]
        rewards = {name: FlowGrpoServer(server, name, TASKS)(pictures(130), prompts)
                   for name in ('rewards', 'strict_rewards')}
    assert torch.equal(graded, white - .25) and all(torch.equal(r, white) for r in rewards.values())
    assert sorted(len(data['images']) for data in asked) == [2, 64, 64]
    assert all(data.keys() == {'images', 'meta_datas', 'only_strict'} and data['only_strict'] for data in asked)
    assert all(task == TASKS[task['prompt']] for data in asked for task in data['meta_datas'])
    assert {path for path, _, _ in seen} == {'/'}

def test_flow_grpos_deqa_server():
    def deqa(body): return 200, {}, pickle.dumps(dict(outputs=[.5]*len(pickle.loads(body)['images'])))
    with http_server(deqa) as (address, seen):
        assert FlowGrpoServer(server_at(address), 'outputs')(pictures(3), ['p']*3).tolist() == [.5]*3

class Malicious:
    "Makes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

def test_a_malicious_answer_does_not_run(tmp_path):
    bad = Malicious(tmp_path/'was run')
    for answer in (bad, dict(scores=[bad]), dict(scores=[1.], more={'deep': [(bad,)]})):
        for protocol in range(6):
            data = pickle.dumps(answer, protocol)
            with http_server(lambda body: (200, {}, data)) as (address, seen):
                reward = FlowGrpoServer(server_at(address, tries=1), 'scores', TASKS)
                said = stopped(lambda: reward(pictures(1), ['two dogs']))
            assert 'no pickle of plain data' in said
    assert list(tmp_path.iterdir()) == []
    pickle.loads(data)['scores']                             # the pickles of this test would have run
    assert [f.name for f in tmp_path.iterdir()] == ['was run']

def doubling():
    "A pickle of a list in a list, twice each, a hundred deep: small, and endless when written out."
    value = [0.]
    for _ in range(100):
        value = [value, value]
    return value

@pytest.mark.parametrize('answer, word', [
    (pickle.dumps([1.]), "no list 'scores'"), (pickle.dumps(dict(rewards=[1.])), "no list 'scores'"),
    (pickle.dumps(dict(scores=[1., 1.])), '2 scores for 1 pictures'), (pickle.dumps(dict(scores=['1'])), 'no finite'),
    (pickle.dumps(dict(scores=[float('nan')])), 'no finite'), (pickle.dumps(dict(scores=[2**9999])), 'no finite'),
    (pickle.dumps(dict(scores=doubling())), '2 scores for 1 pictures'), (pickle.dumps(doubling()), "no list 'scores'"),
    (b'{"scores": [1.0]}', 'no pickle of plain data'), (b'', 'no pickle of plain data'),
    (pickle.dumps(dict(scores=[1.]))[:-3], 'no pickle of plain data')])
def test_a_wrong_answer_is_one_line(answer, word):
    with http_server(lambda body: (200, {}, answer)) as (address, seen):
        reward = FlowGrpoServer(server_at(address, tries=1), 'scores', TASKS)
        assert word in stopped(lambda: reward(pictures(1), ['two dogs']))

def test_a_failure_of_flow_grpos_server_is_told():
    "Its traceback, of which the last line says most."
    with http_server(literal_geneval) as (address, seen):
        server = server_at(address)
        reward = replace(FlowGrpoServer(server, 'outputs'), server=replace(server, tries=2))
        said = stopped(lambda: reward(pictures(1), ['two dogs']))
    assert "KeyError: 'meta_datas'" in said and 'in 2 tries' in said
