"""Articles of a Wikipedia dump (MediaWiki's XML export), as plain text.

The markup is stripped by regular expressions, which is not exact: templates go with all they say.
"""

import bz2
import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

_DROPPED = re.compile(
    r"<!--.*?-->|<(ref|math|gallery|timeline|source|code|pre|imagemap)\b[^>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL)
_WEB_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]*\s*([^\]]*)\]")
# Files, categories and the same article in other languages are no part of the sentence.
_ELSEWHERE = re.compile(r"\s*:?(?:file|image|category|[a-z]{2,3}(?:-[a-z-]+)?)\s*:", re.IGNORECASE)
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$", re.MULTILINE)
_APPENDIX = re.compile(
    r"^==\s*(?:see also|notes|references|further reading|external links|bibliography|sources|"
    r"footnotes)\s*==\s*$.*",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)


def read_articles(file: Path) -> Iterator[str]:
    """Streams the articles of a dump.

    Args:
        file: ``pages-articles`` XML, plain or as ``.bz2``.

    Yields:
        Plain text of each article; redirects, other pages and empty articles are left out.

    Raises:
        ValueError: if the file cannot be read to its end.
    """
    pages = _pages(file)
    while (page := _next(pages, file)) is not None:
        if page.get("ns") == "0" and "redirect" not in page:
            text = strip_markup(page.get("text", ""))
            if text:
                yield text


def strip_markup(text: str) -> str:
    """Turns wiki markup into plain text, a paragraph a line.

    Example:
        >>> strip_markup("'''Paris''' is the [[capital city|capital]] of [[France]].{{cn|a {{b}}}}")
        'Paris is the capital of France.'
    """
    text = _DROPPED.sub("", text)
    text = _until_stable(_TEMPLATE, "", text)
    text = _until_stable(_TABLE, "", text)
    text = _until_stable(_LINK, _label, text)
    text = _WEB_LINK.sub(r"\1", text)
    text = _APPENDIX.sub("", text)
    text = _HEADING.sub(r"\2", text)
    text = _TAG.sub("", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"__[A-Z]+__", "", text)
    # Brackets lose what a template of pronunciation left.
    text = re.sub(r"\((?:\s*[,;])+\s*", "(", text)
    text = re.sub(r"(?:\s*[,;])+\s*\)", ")", text)
    text = re.sub(r"[^\S\n]*\(\s*\)", "", text)
    text = html.unescape(text).replace("\N{NO-BREAK SPACE}", " ")
    lines = (re.sub(r"^[*#:;]+\s*", "", line).strip() for line in text.splitlines())
    lines = (re.sub(r"[ \t]+", " ", line) for line in lines)
    return "\n".join(line for line in lines if re.search(r"\w", line))


def _label(link: re.Match[str]) -> str:
    if _ELSEWHERE.match(link[1]):
        return ""
    return link[1].rpartition("|")[2]


def _until_stable(pattern: re.Pattern[str], new: object, text: str) -> str:
    """Substitutes from the inside outwards, where one may stand in another."""
    while True:
        text, count = pattern.subn(new, text)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if not count:
            return text


def _next(pages: Iterator[dict[str, str]], file: Path) -> dict[str, str] | None:
    try:
        return next(pages, None)
    except (OSError, EOFError, ET.ParseError) as error:
        raise ValueError(f"{file} cannot be read as a Wikipedia dump ({error})") from error


def _pages(file: Path) -> Iterator[dict[str, str]]:
    """Streams the texts of each page's elements."""
    opened = bz2.open if file.suffix == ".bz2" else open
    with opened(file, "rb") as stream:
        for _, element in ET.iterparse(stream):
            if _name(element) == "page":
                yield {_name(part): part.text or "" for part in element.iter()}
                element.clear()


def _name(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]
