"""What tests of pages share."""

from html.parser import HTMLParser

import pytest

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, its text, and whether its tags match."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        """Note an element, and that it is to be closed."""
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        """Note an element that closes itself."""
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        """Refuse a tag that closes another element than the last."""
        assert self.open.pop() == name

    def handle_data(self, data):
        """Note text, except style."""
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        """The text of the page, blanks run together."""
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="session")
def page_of():
    """Reads a page's source; an assertion fails if its tags do not match."""
    return Page
