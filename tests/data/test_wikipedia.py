import bz2

import pytest

from ssvq_jax.data.wikipedia import read_articles, strip_markup

PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
DUMP = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{}</mediawiki>'.format(
    "".join(
        [
            PAGE.format("Anarchism", 0, "", "''Anarchism'' &amp;mdash; a [[philosophy]]."),
            PAGE.format("Anarchy", 0, '<redirect title="Anarchism" />', "#REDIRECT [[Anarchism]]"),
            PAGE.format("Talk:Anarchism", 1, "", "Is it?"),
            PAGE.format("Empty", 0, "", "{{stub}}"),
            PAGE.format("Autism", 0, "", "A &lt;b&gt;disorder&lt;/b&gt;.&lt;ref&gt;x&lt;/ref&gt;"),
        ]
    )
)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic'' it's", "Bold and italic it's"),
        ("[[France]] and [[Paris, France|Paris]]s", "France and Pariss"),
        ("a[[File:x.jpg|thumb|The [[cat|Cat]] of [some] one]]b", "ab"),
        ("x [[Category:Cats]] [[de:Katze]] [[zh-min-nan:Niau]]", "x"),
        ("[http://x.org the site], [https://y.org]", "the site,"),
        ("{{a|{{b|c}}|[[d]]}}text{{e}}", "text"),
        ("one\n{| class=x\n|-\n| a || b\n{|\n| c\n|}\n|}\ntwo", "one\ntwo"),
        ("a<ref name=x>b</ref>c<ref name=y />d<!-- e -->f<br/>g <b>h</b>", "acdfg h"),
        ("in <math>x^2</math>", "in"),
        ("== Heading ==\ntext\n* item\n## deep", "Heading\ntext\nitem\ndeep"),
        ("text\n== References ==\n* a book\n== Rest ==\nx", "text"),
        ("Achilles ({{IPA|x}}; {{lang|grc|y}}, ''Akhilleus'', {{z}})", "Achilles (Akhilleus)"),
        ("a ({{b}}) c&nbsp;&ndash; 2&lt;3", "a c \N{EN DASH} 2<3"),
        ("\n\n  a  \t b\n\n---\n", "a b"),
    ],
)
def test_strip_markup(markup, text):
    assert strip_markup(markup) == text


@pytest.mark.parametrize("suffix", [".xml", ".bz2"])
def test_articles_of_a_dump(suffix, tmp_path):
    file = tmp_path / f"dump{suffix}"
    content = DUMP.encode()
    file.write_bytes(bz2.compress(content) if suffix == ".bz2" else content)
    assert list(read_articles(file)) == ["Anarchism \N{EM DASH} a philosophy.", "A disorder."]


def test_damaged_dumps(tmp_path):
    whole = DUMP.encode()
    for name, content in {
        "cut.xml": whole[:-20],
        "cut.bz2": bz2.compress(whole)[:-20],
        "other.bz2": whole,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a Wikipedia dump"):
            list(read_articles(tmp_path / name))
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_articles(tmp_path / "none.xml"))
