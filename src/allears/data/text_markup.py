"""Plain text from the markups that documentation is written in: HTML and other tags, manual pages, and Perl's pod.

Each reader gives paragraphs with an empty line between them. What a page carries beside its text (scripts, navigation,
headers of a site) is left out; code and tables stay, as text.
"""

import re
from html.parser import HTMLParser

_BLOCKS = re.compile(
    r"address|article|aside|blockquote|body|caption|center|dd|div|dl|dt|figcaption|figure|form|h1|h2|h3|h4|h5|"
    r"h6|header|hr|item|li|main|note|ol|p|page|section|steps|table|tbody|terms|title|tr|ul"
)
_LEFT_OUT = re.compile(r"script|style|head|nav|footer|svg|math|button|select|textarea|noscript|info|links")
_NAVIGATION = re.compile(
    r"\b(related|sphinxsidebar|navheader|navfooter|navigation|toc|toctree|headerlink|footer|sidebar|tocset|navsettop"
    r"|navsetbottom|breadcrumbs?|menu|menubar|copyright|searchbox)\b",
    re.I,
)
_VOID = re.compile(r"area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden, self.depth, self.verbatim = "", 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.hidden:
            self.depth += tag == self.hidden
            return
        marks = " ".join(value or "" for name, value in attrs if name in ("class", "id", "role"))
        if not _VOID.fullmatch(tag) and tag != "body" and (_LEFT_OUT.fullmatch(tag) or _NAVIGATION.search(marks)):
            self.hidden, self.depth = tag, 1
        elif tag == "pre":
            self.parts.append("\n\n")
            self.verbatim += 1
        elif tag == "br":
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        elif _BLOCKS.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            self.depth -= tag == self.hidden
            if self.depth == 0:
                self.hidden = ""
        elif tag == "pre":
            self.parts.append("\n\n")
            self.verbatim = max(0, self.verbatim - 1)
        elif _BLOCKS.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html_text(source: str) -> str:
    """The text of HTML, or of XML whose tags stand for paragraphs (Mallard, DocBook)."""
    reader = _Text()
    reader.feed(source)
    reader.close()
    return tidy("".join(reader.parts))


_ROFF_ESCAPES = (
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\f(?:\(..|\[[^]]*\]|.)"), ""),
    (re.compile(r"\\s(?:[-+]?\d|\([-+]?\d\d|\[[^]]*\])"), ""),
    (re.compile(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]"), "'"),
    (re.compile(r"\\\((?:lq|rq|dq)|\\\[(?:lq|rq|dq)\]|\\\*\((?:L|R|lq|rq)\"?|\\\*[qQ]"), '"'),
    (re.compile(r"\\\((?:em|en|hy|mi)|\\\[(?:em|en|hy|mi)\]|\\-"), "-"),
    (re.compile(r"\\\(bu|\\\[bu\]"), "*"),
    (re.compile(r"\\\(ti|\\\[ti\]"), "~"),
    (re.compile(r"\\\(ha|\\\[ha\]"), "^"),
    (re.compile(r"\\\(..|\\\[[^]]*\]|\\\*(?:\(..|\[[^]]*\]|.)|\\[&|^%/,:]|\\[hv]'[^']*'"), ""),
    (re.compile(r"\\[~ 0]"), " "),
    (re.compile(r"\\e|\\\\"), "\\\\"),
)
_ROFF_FONTS = re.compile(r"\.\s*(BR|BI|IR|IB|RB|RI|SB|SM|B|I|R|CW)\b\s*(.*)")
_ROFF_HEADING = re.compile(r"\.\s*(SH|SS)\b\s*(.*)")
_ROFF_BREAK = re.compile(r"\.\s*(PP|P|LP|TP|TQ|HP|IP|RS|RE|sp|br|nf|fi|EX|EE|Pp|It)\b\s*(.*)")
_ROFF_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')


def _unescape(line: str) -> str:
    for pattern, to in _ROFF_ESCAPES:
        line = pattern.sub(to, line)
    return line


def man_text(source: str) -> str:
    """The text of a manual page (roff with the man macros). Macros that make no text, and tables' options, are
    dropped.
    """
    parts: list[str] = []
    filled = True
    for line in source.splitlines():
        if heading := _ROFF_HEADING.match(line):
            parts += ["\n\n", _unescape(heading[2]).strip(' "'), "\n\n"]
        elif fonts := _ROFF_FONTS.match(line):
            words = [quoted or bare for quoted, bare in _ROFF_ARGUMENT.findall(fonts[2])]
            parts.append(_unescape(("" if len(fonts[1]) == 2 and fonts[1] != "SM" else " ").join(words)))
            parts.append(" " if filled else "\n")
        elif stop := _ROFF_BREAK.match(line):
            filled = {"nf": False, "EX": False, "fi": True, "EE": True}.get(stop[1], filled)
            parts.append("\n" if stop[1] == "br" else "\n\n")
            if stop[1] == "IP" and (mark := _ROFF_ARGUMENT.match(stop[2])):
                parts.append(_unescape(mark[1] or mark[2] or "") + " ")
        elif not line.startswith((".", "'")):
            parts.append(_unescape(line) + (" " if filled else "\n") if line.strip() else "\n\n")
    return tidy("".join(parts))


_POD_CODE = re.compile(r"([BCFISX])(?:<<+\s+(.*?)\s+>>+|<([^<>]*)>)", re.S)
_POD_LINK = re.compile(r"L<(?:([^<>|]*)\|)?([^<>|]*)>")
_POD_CHARACTERS = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}


def pod_text(source: str) -> str:
    """The text of Perl's pod: headings and items as paragraphs, formatting codes off. Code after ``=cut`` is left
    out.
    """
    parts: list[str] = []
    inside = False
    for paragraph in re.split(r"\n[ \t]*\n", source):
        command, _, rest = paragraph.partition(" ")
        word = command.split("\n", 1)[0].strip()
        if word.startswith("="):
            inside = word != "=cut"
            if word.startswith(("=head", "=item")):
                parts.append(rest)
        elif inside:
            parts.append(paragraph)
    text = "\n\n".join(parts)
    for _ in range(3):  # codes nest
        text = _POD_CODE.sub(lambda code: "" if code[1] == "X" else code[2] or code[3] or "", text)
        text = _POD_LINK.sub(lambda link: link[1] or link[2], text)
    return tidy(re.sub(r"E<(\w+)>", lambda name: _POD_CHARACTERS.get(name[1], " "), text))


def tidy(text: str) -> str:
    """Line ends as ``\\n``, no spaces at ends of lines, no control characters, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ").replace("\f", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f¶\ufeff]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


READERS = {"html": html_text, "man": man_text, "pod": pod_text, "plain": tidy}
"""Markup to the function that gives its text."""


def markup_of(path: str) -> str:
    """The markup that a member's name stands for: a key of :data:`READERS`."""
    name = path.rpartition("/")[2].removesuffix(".gz").lower()
    if re.search(r"\.(html?|xhtml|page|xml)(\.en)?$", name):
        return "html"
    if re.search(r"\.[1-9](\w{0,6})$", name):
        return "man"
    return "pod" if name.endswith(".pod") else "plain"
