"Kills a child process before, or in the middle of, any operation on the files below a folder."
import json
import os
import resource
import signal
import sys
import warnings

import torch

CHANGES = ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.link', 'os.symlink', 'os.truncate')   # audit events
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)

def size_of(path): return os.path.getsize(path) if os.path.isfile(path) else 0

class Operations:
    """Counts the operations on files below `folder` that this process does, and dies at one of them.

    An operation is [what, path, bytes before, bytes after]; the bytes after are those at the next operation. A kill
    `within` a write comes from the kernel, when the file passes the given size: whatever writes it, Rust included."""

    def __init__(self, folder, kill_at=None, limit=None):
        self.folder, self.kill_at, self.limit, self.done = str(folder), kill_at, limit, []

    def watch(self):
        from safetensors import torch as tensors
        written = tensors.serialize_file
        def serialize_file(flat, path, *more, **options):
            self.count('write', str(path))
            return written(flat, path, *more, **options)
        tensors.serialize_file = serialize_file
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if event == 'open' and isinstance(args[0], (str, bytes)):
            path, mode, flags = os.fsdecode(args[0]), args[1], args[2]
            if set(mode or '') & set('wax+') if mode else flags & WRITING:
                self.count('write', path)
        elif event in CHANGES:
            path = os.fsdecode(args[0]) if not isinstance(args[0], int) else str(args[0])
            inside = event in ('os.remove', 'os.rmdir') and args[-1] not in (-1, None)     # by rmtree, in its folder
            self.count(event, self.folder + '/…/' + path if inside else path)

    def count(self, what, path):
        if not os.path.abspath(path).startswith(self.folder):
            return
        self.close()
        if len(self.done) == self.kill_at:
            if self.limit is None:
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, UNLIMITED[1]))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
        self.done.append([what, path, size_of(path), None])

    def close(self):
        "The operation before this one is over."
        if self.done and self.done[-1][3] is None:
            self.done[-1][3] = size_of(self.done[-1][1])

def in_child(work, operations=None, said=None):
    "Exit code of a forked child that does `work`; the operations that it did come to the file `said`."
    child = os.fork()
    if not child:
        code = 9
        try:
            torch.set_num_threads(1)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            if operations:
                operations.watch()
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                work()
            code = 0
            if said:
                operations.close()
                said.write_text(json.dumps(operations.done))
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def operations_of(work, folder, said):
    "Every operation on files below `folder` of a whole run of `work`."
    assert in_child(work, Operations(folder), said) == 0
    return json.loads(said.read_text())

def moments(done):
    "Where a run may be killed: (operation, bytes); bytes are None before it, else those the file stops at."
    for n, (what, _, before, after) in enumerate(done):
        yield n, None
        if what == 'write' and after and after > before:
            yield n, (before + after)//2
