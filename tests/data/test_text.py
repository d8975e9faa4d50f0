import gzip
import json

import debs
import numpy as np
import pytest

from allears.core.errors import CorpusError
from allears.data.text import (
    Deduplicator,
    TextPackage,
    build_text_corpus,
    is_english_prose,
    known_text_packages,
    parse_text_packages,
    read_documents,
)
from allears.data.text_markup import READERS, html_text, man_text, markup_of, pod_text, tidy
from allears.data.tokens import END, encode, read_tokens, train_tokenizer, write_tokens

PROSE = (
    "The name of the file is given in the first line, and the rest of it is read as it is. If there is no such file, "
    "an error is reported to the user, who can then look for it in another place, or on the other side of the wall. "
)


def chapter(number: int) -> str:
    """Prose of its own for each number, longer than the shortest document."""
    words = np.random.default_rng(number).choice(["river", "engine", "letter", "harbour", "winter", "signal"], 60)
    own = " ".join(f"the {word} of the {words[i - 1]} is in it," for i, word in enumerate(words))
    return f"Chapter {number}.\n\n{own}\n\nThe end of chapter {number} is not as long as that."


def test_html_keeps_text_and_drops_what_surrounds_it():
    page = (
        "<html><head><title>Site</title><style>p {}</style></head><body><div class='navheader'>Prev <div>x</div></div>"
        "<h1>Files<a class='headerlink'>¶</a></h1><p>A &lt;file&gt;\n has   <b>bytes</b>.<p>Two<br>lines</p>"
        "<pre>x = 1\n  y = 2</pre><ul><li>one</li><li>two</li></ul><script>var a = '<p>no</p>';</script>"
        "<table><tr><td>a</td><td>b</td></tr></table><footer>Contact</footer></body></html>"
    )
    assert html_text(page) == "Files\n\nA <file> has bytes.\n\nTwo\nlines\n\nx = 1\n  y = 2\n\none\n\ntwo\n\n a b"


def test_man_page_is_filled_text():
    page = (
        '.\\" a comment\n.TH CAT 1 2020\n.SH NAME\ncat \\- join files\n.SH "SEE ALSO"\n.B cat\n.RI [ file ]\n'
        ".PP\nPrints\n\\fIfile\\fP to\n.BR stdout (3),\nas it\\(aqs \\(lqread\\(rq.\n.nf\n$ cat a\n$ cat b\\en\n.fi\n"
        ".IP \\(bu 2\nan item\n"
    )
    assert man_text(page) == (
        "NAME\n\ncat - join files\n\nSEE ALSO\n\ncat [file]\n\n"
        'Prints file to stdout(3), as it\'s "read".\n\n$ cat a\n$ cat b\\n\n\n* an item'
    )


def test_pod_loses_its_codes():
    page = (
        "=head1 NAME\n\nB<perl> - a I<C<language>>\n\n=over 4\n\n=item C<< $a->b >>\n\nSee L<the guide|perlintro>, "
        "L<perlop>; E<lt>tagE<gt>X<index>.\n\n=cut\n\nmy $code;\n\n=head2 More\n\nText"
    )
    assert pod_text(page) == "NAME\n\nperl - a language\n\n$a->b\n\nSee the guide, perlop; <tag>.\n\nMore\n\nText"


def test_tidy_is_idempotent_and_markup_follows_the_name():
    text = tidy("a \t\r\nb\x00\n\n\n\n c\xa0d \n")
    assert text == "a\nb\n\n c d" == tidy(text)
    names = {
        "x/index.html": "html",
        "x/index.html.en": "html",
        "man/man3/a.3ssl.gz": "man",
        "x/a.page": "html",
        "x/perlop.pod": "pod",
        "x/guide.txt.gz": "plain",
        "x/README": "plain",
    }
    assert {name: markup_of(name) for name in names} == names
    assert set(names.values()) == set(READERS)


def test_english_prose_is_told_from_other_things():
    assert is_english_prose(PROSE * 3)
    assert not is_english_prose(PROSE)  # short
    assert not is_english_prose("Der Name der Datei steht in der ersten Zeile und wird nicht gelesen. " * 20)
    assert not is_english_prose("Имя файла дано в первой строке the of and to a in is for that it be on with " * 20)
    assert not is_english_prose("{ 0x1f, 0x2a, 17 }; (&x)->y[99] += the; " * 30)


def test_documents_and_long_paragraphs_are_kept_once():
    unique = Deduplicator()
    long_one = PROSE.strip()
    assert Deduplicator()(long_one) == long_one  # a document of one paragraph
    assert unique(f"One.\n\n{long_one}") == f"One.\n\n{long_one}"
    assert unique(f"one.\n\n{long_one.upper()}") == ""  # the same but for case
    assert unique(f"Two.\n\n{long_one.replace(' ', '  ')}\n\nOne.") == "Two.\n\nOne."
    assert (unique.dropped_documents, unique.dropped_paragraphs) == (1, 1)


def test_a_package_is_read_by_its_rules(tmp_path):
    files = {
        "usr/share/doc/a/one.html": b"<p>One &amp; all</p>",
        "usr/share/doc/a/old/two.html": b"<p>no</p>",
        "usr/share/man/man1/a.1.gz": gzip.compress(b".SH NAME\na \\- b\n"),
        "usr/share/doc/a/latin.html": "<p>caf\xe9</p>".encode("latin-1"),
        "usr/share/doc/a/data.bin": b"\x00",
    }
    deb = debs.make_deb(tmp_path, "a", files)
    package = TextPackage("a", "1.0-1", "0", "MIT", match=r"\.html$|/man/", skip="/old/")
    found = {document.path: document.text for document in read_documents(package, deb)}
    assert found == {
        "usr/share/doc/a/one.html": "One & all",
        "usr/share/man/man1/a.1.gz": "NAME\n\na - b",
        "usr/share/doc/a/latin.html": "café",
    }
    broken = debs.make_deb(tmp_path, "b", {"usr/man/b.1.gz": gzip.compress(b"x" * 99)[:-12]})
    with pytest.raises(CorpusError, match=r"b\.1\.gz is damaged"):
        list(read_documents(TextPackage("b", "1", "0", "MIT", match="man"), broken))


def test_shipped_table_is_whole():
    table = known_text_packages()
    assert len(table) > 40 and {"manpages", "linux-doc-6.1", "anarchism"} <= set(table)
    for package in table.values():
        assert len(package.sha256) == 16 and package.licence and package.match
    with pytest.raises(CorpusError, match="unknown"):
        parse_text_packages("[[package]]\nname='a'\nversion='1'\nsha256='0'\nlicence='x'\nmatch='y'\nmarkup='tex'")
    with pytest.raises(CorpusError, match="mach"):
        parse_text_packages("[[package]]\nname='a'\nversion='1'\nsha256='0'\nlicence='x'\nmach='y'")
    with pytest.raises(CorpusError, match="sealed"):
        TextPackage("codec2-examples", "1", "0", "x", "y")


@pytest.fixture
def two_packages(tmp_path):
    pytest.importorskip("tokenizers")
    files = {f"doc/{n}.txt": chapter(n).encode() for n in range(30)}
    one = debs.make_deb(tmp_path / "debs", "one", files)
    copies = {"doc/copy.txt": files["doc/3.txt"], "doc/code.txt": b"{ 1, 2, 3 };\n" * 90}
    two = debs.make_deb(tmp_path / "debs", "two", copies | {"doc/new.txt": chapter(99).encode()})
    return {
        name: TextPackage(name, "1.0-1", debs.sha256(deb), "MIT", match=r"\.txt$")
        for name, deb in (("one", one), ("two", two))
    }


def test_corpus_is_built_and_read_back(two_packages, tmp_path):
    build = {"packages": two_packages, "vocabulary": 300, "validation_share": 0.2}
    report = build_text_corpus(tmp_path / "corpus", tmp_path / "debs", **build)
    assert {row["package"]: row["documents"] for row in report.sources} == {"one": 30, "two": 1}
    assert report.train_documents + report.val_documents == 31 and report.val_documents > 1
    data = read_tokens(tmp_path / "corpus")
    assert data.report == report and len(data.train) == report.train_tokens and len(data.val) == report.val_tokens
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "corpus" / "tokenizer.json"))
    assert tokenizer.token_to_id(END) == report.end and tokenizer.get_vocab_size() == report.vocabulary == 300
    splits = {}
    for name, ids in (("train", data.train), ("val", data.val)):
        assert ids[-1] == report.end
        pieces = np.split(ids, np.flatnonzero(ids == report.end) + 1)[:-1]
        splits[name] = {tokenizer.decode(piece[:-1].tolist()) for piece in pieces}
    assert splits["train"] | splits["val"] == {tidy(chapter(n)) for n in [*range(30), 99]}
    assert not splits["train"] & splits["val"]
    assert data.val_bytes_per_token == pytest.approx(sum(map(len, splits["val"])) / len(data.val))
    again = build_text_corpus(tmp_path / "again", tmp_path / "debs", **build)
    assert again == report
    cut = build_text_corpus(tmp_path / "cut", tmp_path / "debs", max_train_tokens=2000, **build)
    assert 2000 <= cut.train_tokens < report.train_tokens and cut.val_tokens == report.val_tokens


def test_wrong_packages_and_files_are_refused(two_packages, tmp_path):
    with pytest.raises(CorpusError, match="only='three': not in the table"):
        build_text_corpus(tmp_path, tmp_path / "debs", packages=two_packages, only=["three"])
    wrong = {"one": TextPackage("one", "1.0-1", "beef", "MIT", match="txt")}
    with pytest.raises(CorpusError, match="package 'one'"):
        build_text_corpus(tmp_path, tmp_path / "debs", packages=wrong)
    with pytest.raises(CorpusError, match="the val split is empty"):
        build_text_corpus(tmp_path, tmp_path / "debs", packages=two_packages, validation_share=0.0)
    with pytest.raises(CorpusError, match=r"holds no corpus\.json"):
        read_tokens(tmp_path)
    write_tokens(tmp_path, [chapter(1)], [chapter(2)], [], 300)
    described = json.loads((tmp_path / "corpus.json").read_text())
    described["sha256"]["val"] = "0" * 64
    (tmp_path / "corpus.json").write_text(json.dumps(described))
    with pytest.raises(CorpusError, match=r"val\.bin\.xz: does not belong"):
        read_tokens(tmp_path)
    (tmp_path / "train.bin.xz").write_bytes(b"nothing")
    with pytest.raises(CorpusError, match=r"train\.bin\.xz: cannot be read"):
        read_tokens(tmp_path)


def test_any_bytes_have_an_encoding_that_gives_them_back():
    pytest.importorskip("tokenizers")
    tokenizer = train_tokenizer([PROSE], 280)
    texts = ["naïve 漢字 \t\n  x", "", "\x7f🙂"]
    ids, count, size = encode(tokenizer, texts)
    assert count == 3 and size == sum(len(text.encode()) for text in texts)
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.token_to_id(END)) + 1)[:-1]
    assert [tokenizer.decode(piece[:-1].tolist()) for piece in pieces] == texts
    with pytest.raises(ValueError, match="vocabulary: 256 given"):
        train_tokenizer([PROSE], 256)
