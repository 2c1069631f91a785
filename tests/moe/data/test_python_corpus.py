"""moe/data/python_corpus.py: what any Python gives, by domain, without leaks between the splits."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import islice

import pytest

from moe.data.corpus import Document, read_documents
from moe.data.python_corpus import reference_text


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(read_documents(["builtin:python"], on_skip=lambda origin, reason: None))


def test_every_domain_has_text_and_code_has_most(documents: list[Document]) -> None:
    size = Counter[str]()
    for document in documents:
        size[document.domain] += len(document.text.encode())
    assert set(size) == {"code", "reference", "prose"}
    assert size["code"] > 5_000_000
    assert size["code"] > size["reference"] > 500_000
    assert size["prose"] > 20_000
    assert sum(size.values()) < 30_000_000


def test_docstrings_share_the_group_of_their_source(documents: list[Document]) -> None:
    group_of_code = {d.origin: d.group for d in documents if d.domain == "code"}
    docstrings = [d for d in documents if d.origin.endswith("#docstrings")]
    assert len(docstrings) > 300
    for document in docstrings:
        assert document.group == group_of_code[document.origin.removesuffix("#docstrings")]


def test_tests_packages_and_generated_tables_are_left_out(documents: list[Document]) -> None:
    origins = [d.origin for d in documents if d.domain == "code"]
    assert "stdlib/argparse.py" in origins
    assert "stdlib/pydoc_data/topics.py" not in origins
    assert not [o for o in origins if "/test/" in o or "/tests/" in o or "site-packages" in o]
    assert "stdlib/encodings/cp1252.py" not in origins
    assert "stdlib/encodings/utf_8.py" in origins
    assert not [o for o in origins if "_sysconfigdata" in o]


def test_each_topic_is_a_document(documents: list[Document]) -> None:
    topics = {d.origin: d.text for d in documents if "topics.py#" in d.origin}
    assert len(topics) > 50
    assert '"while"' in topics["stdlib/pydoc_data/topics.py#while"]


def test_texts_of_one_package_share_a_group(documents: list[Document]) -> None:
    for document in documents:
        if document.domain == "prose" and not document.origin.startswith("stdlib/"):
            assert document.group == "package/" + document.origin.split("/")[0]


def test_the_order_is_fixed_and_nothing_is_imported(documents: list[Document]) -> None:
    modules = set(sys.modules)
    again = read_documents(["builtin:python"], on_skip=lambda origin, reason: None)
    assert list(islice(again, 300)) == documents[:300]
    assert not {"this", "antigravity", "turtle", "idlelib"} & (set(sys.modules) - modules)


def test_reference_text_has_signatures_of_public_names() -> None:
    source = '''
"""The module."""
class Shape:
    """A shape."""
    def area(self, scale: float = 1.0) -> float:
        """Its area."""
    def _private(self):
        """Hidden."""
    def __len__(self):
        """Its corners."""
async def wait():
    """Waits."""
def undocumented(): pass
'''
    assert reference_text(source, module="geo") == (
        "module geo\n\nThe module.\n\nclass geo.Shape\n\nA shape.\n\n"
        "geo.Shape.area(self, scale: float=1.0)\n\nIts area.\n\n"
        "geo.Shape.__len__(self)\n\nIts corners.\n\ngeo.wait()\n\nWaits.\n"
    )
    assert reference_text("def broken(:", module="geo") == ""
    assert reference_text("x = 1", module="geo") == ""
