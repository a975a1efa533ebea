"""Reports as a browser would see them: their elements and texts, and that nothing in them is alive."""

import html.parser
import re

VOID = {"meta", "br", "input", "img", "link", "base"}
ADDRESSES = {"href", "src", "action", "data", "poster", "xlink:href", "srcset", "formaction", "ping", "background"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><style>*{display:none}</style></svg></title><b>bold</b>",
    '<img src=x onerror="alert(1)">',
    "\" onmouseover=alert(1) x='",
    "{{ 7 * 7 }}{% include 'page.css' %}{# gone #}",
    "<svg><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>",
    "nul \x00 bell \x07 escape \x1b[31m",
    "bidi \u202egnp.exe\u202c \u2066x\u2069",
    "&lt;b&gt; &#60;script&#62; <!-- comment",
    "half \ud800 pair, wide \U0001f600",
    "w" * 5000,
    "many\nlines\r\n\tand <iframe src=//evil.example></iframe>",
]


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text outside the style sheet, as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def charts(self) -> dict[str, list[int]]:
        """Points of each curve, by the chart's title."""
        found: dict[str, list[int]] = {}
        title = ""
        for _, attributes in self.elements:
            if attributes.get("class") == "chart":
                title = str(attributes["aria-label"]).split(".")[0]
            if "data-points" in attributes:
                found.setdefault(title, []).append(int(str(attributes["data-points"])))
        return found


def assert_inert(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"script", "img", "iframe", "object", "embed", "link", "base", "form", "input", "video", "audio"}
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, name)
            if name in ADDRESSES:
                assert value and re.fullmatch(r"#part-\d+|[\w./%+-]+/report\.html", value), (tag, name, value)
    policies = [a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'; style-src 'sha256-")
    assert sum(tag == "style" for tag, _ in page.elements) == 1
