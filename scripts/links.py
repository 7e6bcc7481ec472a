"End each chapter with links to the one before and the one after; with --check only say which lack them."
import json
import re
import sys
from os.path import relpath
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = re.compile(r'(← )?\[[^\]]*\]\([^)]*\)( · \[[^\]]*\]\([^)]*\))?( →)?')   # a cell that this script wrote

def chapters() -> list[Path]:
    "All chapters in reading order: those that lie in no folder first, then the folders as they import one another."
    sys.path.insert(0, str(ROOT))
    from g2rpo.structure import FOLDERS
    places = [ROOT/'nbs', *(ROOT/'nbs'/folder for folder in FOLDERS)]
    return [chapter for place in places for chapter in sorted(place.glob('[0-9][0-9]_*.ipynb'))]

def link(cells: dict[Path, list], here: Path, there: Path) -> str:
    "A link from one chapter to another, by its title."
    title = re.match('# (.*)', ''.join(cells[there][0]['source']))[1]
    return f'[{title}]({Path(relpath(there, here.parent)).as_posix()})'

def is_links(cell: dict) -> bool:
    "Whether a cell holds nothing but links to neighbours."
    text = ''.join(cell['source'])
    return cell['cell_type'] == 'markdown' and ('←' in text or '→' in text) and bool(LINKS.fullmatch(text))

def linked(cells: list[dict], text: str) -> list[dict]:
    "The cells of a chapter with `text` as the last one, and no other cell of links."
    if cells and is_links(cells[-1]) and ''.join(cells[-1]['source']) == text:
        return cells
    kept = [cell for cell in cells if not is_links(cell)]
    return [*kept, dict(cell_type='markdown', id='links', metadata={}, source=[text])]

def main(check: bool) -> int:
    "1 if links are missing or lead elsewhere and only that was asked."
    files = chapters()
    books = {file: json.loads(file.read_text(encoding='utf-8')) for file in files}
    cells, wrong = {file: book['cells'] for file, book in books.items()}, []
    for before, file, after in zip([None, *files], files, [*files[1:], None]):
        back = [f'← {link(cells, file, before)}'] if before else []
        on = [f'{link(cells, file, after)} →'] if after else []
        found = linked(cells[file], ' · '.join(back + on))
        if found is not cells[file]:
            wrong.append(file.relative_to(ROOT).as_posix())
            if not check:
                text = json.dumps(books[file] | dict(cells=found), indent=1, ensure_ascii=False, sort_keys=True)
                file.write_text(text + '\n', encoding='utf-8')
    if check and wrong:
        print(f'links of {", ".join(wrong)} are out of date; run: make export', file=sys.stderr)
    return int(check and bool(wrong))

if __name__ == '__main__':
    sys.exit(main('--check' in sys.argv))
