"""Manual pages of the command line, made of its own help texts (pure but for the text that it is given)."""

import re
from collections.abc import Iterable, Iterator
from typing import Final

import click

from phaul_client.cli.outcomes import MEANINGS

_ENVIRONMENT: Final = (
    ("PHAUL_DAEMON", "The phauld to ask, where --daemon does not say it."),
    ("PHAUL_TLS_DIR, PHAUL_TLS_NAME", "As --tls-dir and --tls-name."),
    ("NO_COLOR", "If it is set, progress has no colours."),
)
_OTHER_STATUS: Final = {
    "wait": [("N", "That of what it waited for, 128 + N after signal N."), ("1", "It moved away, or is not known.")]
}
_ESCAPES: Final = {"\\": r"\e", "-": r"\-", "~": r"\(ti", "^": r"\(ha", "`": r"\(ga"}


def roff(text: str) -> str:
    """Text as troff takes it: nothing in it is a request."""
    lines = "".join(_ESCAPES.get(each, each) for each in text).split("\n")
    return "\n".join(rf"\&{line}" if line[:1] in (".", "'") else line for line in lines)


def pages(group: click.Group, version: str) -> Iterator[tuple[str, str]]:
    """File name and content of a page for the group and one for each of its commands."""
    name = group.name or ""
    yield f"{name}.1", page(group, name, version, see=[f"{name}-{each}" for each in group.commands])
    for each, found in group.commands.items():
        full = f"{name} {each}"
        yield f"{name}-{each}.1", page(found, full, version, see=[name])


def page(made: click.Command, full_name: str, version: str, see: list[str]) -> str:
    """One page."""
    context = click.Context(made, info_name=full_name)
    help_text = (made.help or "").strip()
    summary = help_text.partition("\n")[0]
    title = full_name.replace(" ", "-")
    lines = [f'.TH {roff(title.upper())} 1 "" "phaul {version}" "phaul"', ".SH NAME"]
    lines += [f"{roff(title)} \\- {roff(summary.rstrip('.'))}", ".SH SYNOPSIS", f".B {roff(full_name)}"]
    lines += [roff(" ".join(made.collect_usage_pieces(context))), ".SH DESCRIPTION", *_paragraphs(help_text)]
    if isinstance(made, click.Group):
        lines.append(".SH COMMANDS")
        for name, each in made.commands.items():
            lines += [".TP", f".B {roff(name)}", roff(each.get_short_help_str(200))]
    lines.append(".SH OPTIONS")
    for parameter in made.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            lines += [".TP", f".B {roff(record[0])}", roff(record[1]) or "\\&"]
    for section in re.split(r"\n\s*\n", (made.epilog or "").replace("\b", "").strip()):
        heading, _, body = section.strip().partition("\n")
        if heading:
            lines += [f".SH {roff(heading.rstrip(':').upper())}", ".nf", roff(body.rstrip()), ".fi"]
    if not isinstance(made, click.Group):  # its help ends with them
        usual = [(str(int(code)), f"{text}.") for code, text in MEANINGS.items()]
        lines += definitions("EXIT STATUS", _OTHER_STATUS.get(made.name or "", usual))
    lines += definitions("ENVIRONMENT", _ENVIRONMENT)
    references = ", ".join(f"\\fB{roff(each)}\\fR(1)" for each in see)
    return "\n".join([*lines, ".SH SEE ALSO", references, ""])


def definitions(heading: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A section of words and what each means."""
    yield f".SH {roff(heading)}"
    for word, meaning in rows:
        yield from (".TP", f".B {roff(word)}", roff(meaning))


def _paragraphs(text: str) -> Iterator[str]:
    for each in re.split(r"\n\s*\n", text):
        yield ".PP"
        yield roff(" ".join(each.replace("\b", "").split()))
