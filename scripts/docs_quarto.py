"""What nbdev and Quarto take to build the hosted site: nbs/sidebar.yml, and with a folder named a copy of nbs/ in it.

nbdev makes the first cell of a notebook its title and drops what else stands there, and Quarto renders what lies in one
folder. So in the copy each title has a cell of its own, and files outside nbs/ that chapters link to lie beside them.
"""
import json
import os
import re
import shutil
import sys
from pathlib import Path

from docs import NBS, reading_order, ROOT
from docs_render import head_of

def sidebar_yml() -> str:
    "The reading order of `make docs`, as Quarto takes it."
    lines = ['# Written by scripts/docs_quarto.py.', 'website:', '  sidebar:', '    contents:']
    for title, files in reading_order():
        names = [f.relative_to(NBS).as_posix() for f in files]
        if title == 'Start':
            lines += [f'      - {name}' for name in names]
        else:
            lines += [f'      - section: {title.split(":")[0]}', '        contents:']
            lines += [f'          - {name}' for name in names]
    return '\n'.join(lines) + '\n'

def place(file: Path) -> Path:
    "Where a file of the repository lies in the copy, from its root."
    return file.relative_to(NBS) if NBS in file.parents else file.relative_to(ROOT)

def moved_links(text: str, file: Path, wanted: set[Path]) -> str:
    "Markdown of a file with its links as they are in the copy; files outside nbs/ are added to `wanted`."
    def moved(found):
        path, mark, anchor = found[2].partition('#')
        target = (file.parent/path).resolve()
        if not path or ':' in path or not target.is_file() or ROOT not in target.parents:
            return found[0]
        if NBS not in target.parents:
            wanted.add(target)
        return f'{found[1]}{os.path.relpath(place(target), place(file).parent)}{mark}{anchor})'
    return re.sub(r'(\]\()([^)\s]+)\)', moved, text)

def staged(file: Path, wanted: set[Path]) -> str:
    "A notebook of the copy: the title in its own cell, links moved, prose and outputs alike."
    notebook = json.loads(file.read_text(encoding='utf-8'))
    first, *others = notebook['cells']
    title, subtitle, rest = head_of(''.join(first['source']))
    head = first | {'source': f'# {title}\n\n> {subtitle}'}
    body = [first | {'id': 'introduction', 'source': rest.strip()}] if rest.strip() else []
    notebook['cells'] = [head, *body, *others]
    for cell in notebook['cells'][1:]:
        if cell['cell_type'] == 'markdown':
            cell['source'] = moved_links(''.join(cell['source']), file, wanted)
        for data in (o['data'] for o in cell.get('outputs', ()) if 'text/markdown' in o.get('data', {})):
            data['text/markdown'] = moved_links(''.join(data['text/markdown']), file, wanted)
    return json.dumps(notebook, ensure_ascii=False, indent=1)

def stage(out: Path) -> None:
    "The copy of nbs/, and of the files that it links to."
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(NBS, out, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    wanted, done = set(), set()
    for file in NBS.rglob('*.ipynb'):
        if '.ipynb_checkpoints' not in file.parts:
            (out/place(file)).write_text(staged(file, wanted), encoding='utf-8')
    while waiting := wanted - done:
        file = waiting.pop()
        done.add(file)
        (out/place(file)).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == '.md':
            text = moved_links(file.read_text(encoding='utf-8'), file, wanted)
            (out/place(file)).write_text(text, encoding='utf-8')
        else:
            shutil.copy(file, out/place(file))

if __name__ == '__main__':
    (NBS/'sidebar.yml').write_text(sidebar_yml(), encoding='utf-8')
    if sys.argv[1:]:
        stage(Path(sys.argv[1]).resolve())
