"What must hold of a built site: every link and anchor leads somewhere, every formula is drawn."
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

QUIET = ('pre', 'code', 'script', 'style', 'title')         # where a dollar or a backslash is one
VOID = ('img', 'link', 'meta', 'input', 'br', 'hr', 'col', 'wbr', 'source')

class Reader(HTMLParser):
    "Anchors, links and text that looks like LaTeX of one page."
    def __init__(self):
        super().__init__()
        self.anchors, self.links, self.latex, self.inside = set(), [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]
        if tag not in VOID:
            self.inside.append(tag)

    def handle_endtag(self, tag):
        while tag in self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not set(QUIET) & set(self.inside):
            self.latex += [line.strip() for line in data.splitlines() if re.search(r'\$|\\[a-zA-Z{}]', line)]

@cache
def read_page(file: Path, changed: int) -> Reader:
    "A page, read once as long as it does not change."
    reader = Reader()
    text = file.read_text(encoding='utf-8')
    reader.feed(re.sub('<pre class="code">.*?</pre>', '', text, flags=re.S))     # highlighted code holds no links
    return reader

def page_of(file: Path) -> Reader: return read_page(file, file.stat().st_mtime_ns)

def leads_nowhere(out: Path, page: Path, link: str) -> bool:
    "Whether a link inside the site has no page, no anchor, or leaves the site."
    path, _, anchor = link.partition('#')
    target = Path(os.path.normpath(page.parent/unquote(path))) if path else page
    if not target.is_file() or out not in target.parents:
        return True
    return bool(anchor) and target.suffix == '.html' and unquote(anchor) not in page_of(target).anchors

def problems(out: Path) -> list[str]:
    "A line for each link that leads nowhere and each formula that is still LaTeX."
    out, found = out.resolve(), []
    for page in sorted(out.rglob('*.html')):
        name, reader = page.relative_to(out).as_posix(), page_of(page)
        inside = dict.fromkeys(link for link in reader.links if not re.match(r'[a-z][a-z+.-]*:|//', link))
        found += [f'{name}: link {link} leads nowhere' for link in inside if leads_nowhere(out, page, link)]
        found += [f'{name}: LaTeX is left in the text: {text[:80]}' for text in reader.latex]
    return found
