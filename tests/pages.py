"""What tests ask of a report page: of its HTML by a parser, of its looks in a browser."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page's elements, and what is wrong with how they are nested."""

    def __init__(self, text):
        super().__init__()
        self.faults, self.stack, self.elements, self.rows, self.text = [], [], [], [], ""
        self.feed(text)
        self.faults += [f"<{tag}> is never closed" for tag in self.stack]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self.stack[-1:] == [tag]:
            self.stack.pop()
        else:
            self.faults.append(f"</{tag}> within <{self.stack[-1] if self.stack else 'nothing'}>")

    def handle_data(self, data):
        if self.stack[-1:] not in (["style"], ["script"]):
            self.text += data
        if {"th", "td"} & set(self.stack):
            self.rows[-1][-1] += data

    def values(self, *names):
        return [attrs[name] for _, attrs in self.elements for name in names if attrs.get(name)]

    def tags(self, name):
        return [attrs for tag, attrs in self.elements if tag == name]


BROKEN_PICTURES = """[...document.images].filter(i => !i.complete || !i.naturalWidth).length"""
WIDTH = "document.scrollingElement.scrollWidth"  # a phone makes its window as wide as the page
# text of a drawing that is cut off, lies on other text, or is smaller than 9 px
ILLEGIBLE = """[...document.querySelectorAll('.panel svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect(), found = [];
  const texts = [...svg.querySelectorAll('text')]
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  texts.forEach(([said, a], n) => {
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1
        || a.bottom > frame.bottom + 1) found.push('cut: ' + said);
    if (Math.min(a.width, a.height) < 9 && said.length > 1) found.push('small: ' + said);
    texts.slice(n + 1).forEach(([other, b]) => {
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
        found.push('on each other: ' + said + ' / ' + other);
    });
  });
  return found;
})"""
ROWS = "[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent))"
# text that is seen and drawn smaller than 12 px, in drawings too
SMALL = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
  && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).filter(e => {
    const svg = e.closest('svg'), box = svg && svg.viewBox.baseVal.width;
    const scale = box ? svg.getBoundingClientRect().width / box : 1;
    return scale * parseFloat(getComputedStyle(e).fontSize) < 11.99;
  }).map(e => e.outerHTML.slice(0, 160))"""
# text whose contrast with the background it lies on (WCAG 2.1) is below 4.5
FAINT = """(() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = parts(c).map(v => (v /= 255) <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c =
    getComputedStyle(e).backgroundColor; const p = parts(c);
    if (p.length < 4 || p[3] === 1) return c; } return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
    && !e.closest('svg, :disabled')
    && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).flatMap(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    return ratio < 4.5 ? [ratio.toFixed(2) + ' ' + e.outerHTML.slice(0, 99)] : [];
  }); })()"""
UNNAMED = "[...document.images].filter(i => !i.alt).length"
# tables that reach beyond the window and do not scroll
UNFRAMED = """[...document.querySelectorAll('table')].filter(t =>
  t.getBoundingClientRect().right > {width} && !t.closest('.scroll')).length"""
# tables that are wider than their frame, and frames that cannot be scrolled to their end
SCROLLED = """(() => { const wide = [...document.querySelectorAll('.scroll')]
  .filter(f => f.scrollWidth > f.clientWidth + 1); let stuck = 0;
  wide.forEach(f => { f.scrollLeft = 1e6;
    stuck += f.scrollLeft + f.clientWidth < f.scrollWidth - 1; });
  return [wide.length, stuck]; })()"""
BRIGHT = """(() => { const style = getComputedStyle(document.body);
  return [style.backgroundColor, style.color].map(c => Number(c.match(/\\d+/)[0])); })()"""
