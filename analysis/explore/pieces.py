"""HTML of the page; every text that comes from a file is escaped here, and nowhere trusted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape

from analysis.explore.expert import Example, Expert, TokenRow
from analysis.explore.figures import COLOURS
from analysis.explore.maps import Side

_LONGEST_TEXT = 24  # characters of a token that are shown
_NEVER_FIRST = "<p>It was no token\u2019s first choice.</p>"
_SHOWN = {"\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d", " ": "\u00b7"}


def header(sides: Sequence[Side], *, notes: Sequence[str]) -> str:
    """What this is, a line for each fact."""
    parts = []
    for number, side in enumerate(sides):
        rows = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in side.facts)
        which = f"<b>{'AB'[number]}</b> " if len(sides) > 1 else ""
        parts.append(f"<section><h2>{which}{escape(side.title)}</h2><dl>{rows}</dl></section>")
    return (
        "<div class='ex'><h1>Experts</h1><div class='ex-sides'>"
        + "".join(parts)
        + "</div>"
        + "".join(note(text) for text in notes)
        + "</div>"
    )


def note(text: str) -> str:
    """A sentence that stands out."""
    return f"<p class='ex ex-note'>{escape(text)}</p>"


def heading(text: str, below: str = "") -> str:
    """A section's heading and what its numbers are."""
    said = f"<p>{escape(below)}</p>" if below else ""
    return f"<div class='ex ex-heading'><h2>{escape(text)}</h2>{said}</div>"


def numbers_table(values_LE: Sequence[Sequence[float]], *, unit: str, name: str) -> str:
    """The numbers of a map, for those who read rather than look; folded away."""
    head = "".join(f"<th scope='col'>{e}</th>" for e in range(len(values_LE[0])))
    rows = "".join(
        f"<tr><th scope='row'>{layer}</th>{''.join(f'<td>{_number(v)}</td>' for v in values)}</tr>"
        for layer, values in enumerate(values_LE)
    )
    return (
        f"<details class='ex ex-numbers' data-map='{escape(name)}'><summary>These numbers as a "
        f"table</summary><div class='ex-scroll'><table><caption>{escape(name)}, {escape(unit)}; "
        f"rows are layers, columns experts</caption><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def expert_panel(expert: Expert, vocabulary: Sequence[str] | None, *, title: str) -> str:
    """Everything of an expert: what it takes, in what text, domains, partners, positions."""
    where = f"Layer {expert.layer}, expert {expert.expert}"
    if not expert.num_tokens:
        return (
            f"<div class='ex ex-expert'><h3>{where} <small>{escape(title)}</small></h3>"
            f"{note('No token of this trace chose it: here it is dead.')}</div>"
        )
    facts = (
        f"{expert.num_tokens:,} tokens chose it ({expert.load:.2f} times the even share), "
        f"{expert.num_first:,} of them first; mean weight {expert.weight:.3f}."
    )
    return (
        f"<div class='ex ex-expert' data-layer='{expert.layer}' data-expert='{expert.expert}'>"
        f"<h3>{where} <small>{escape(title)}</small></h3><p>{facts}</p><div class='ex-cards'>"
        + _tokens(
            expert.by_lift, vocabulary, name="by-lift", title="Token ids by lift",
            about=f"its share of the id\u2019s tokens over its share of all, of ids seen "
            f"{expert.least_count} times or more; first choices",
        )
        + _tokens(
            expert.by_count, vocabulary, name="by-count", title="Token ids by count",
            about="tokens whose first choice it was",
        )
        + _domains(expert)
        + _partners(expert)
        + _positions(expert)
        + "</div>"
        + _examples(expert, vocabulary)
        + "</div>"
    )  # fmt: skip


def token_text(token: int, vocabulary: Sequence[str] | None) -> str:
    """Escaped text of a token id, white space made visible; its number where it has no text."""
    text = vocabulary[token] if vocabulary is not None and token < len(vocabulary) else ""
    if not text:
        return f"<i>id&nbsp;{token}</i>"
    text = text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "\u2026"
    return escape("".join(_shown(character) for character in text))


def _shown(character: str) -> str:
    return _SHOWN.get(character, character if character.isprintable() else "\ufffd")


def _tokens(
    rows: Sequence[TokenRow], vocabulary: Sequence[str] | None, *, name: str, title: str,
    about: str,
) -> str:  # fmt: skip
    lines = "".join(
        f"<tr data-token='{row.token}'><td class='ex-token'>{token_text(row.token, vocabulary)}"
        f"</td><td>{row.lift:.2f}\u00d7</td><td>{row.num_first:,}</td><td>{row.num_tokens:,}</td>"
        "</tr>"
        for row in rows
    )
    table = (
        "<table><thead><tr><th>token</th><th>lift</th><th>first choice</th><th>in all</th></tr>"
        f"</thead><tbody>{lines}</tbody></table>"
    )
    return _card(name, title, about, table if rows else _NEVER_FIRST)


def _domains(expert: Expert) -> str:
    top = max([row.high if math.isfinite(row.high) else row.share for row in expert.domains] +
              [expert.even_share]) * 1.08  # fmt: skip
    lines = []
    for row in expert.domains:
        has_interval = math.isfinite(row.low) and math.isfinite(row.high)
        whisker = (
            f"<span class='ex-whisker' style='left:{100 * row.low / top:.2f}%;"
            f"width:{100 * (row.high - row.low) / top:.2f}%'></span>" if has_interval else ""
        )  # fmt: skip
        between = f" ({row.low:.1%} to {row.high:.1%})" if has_interval else " (no interval)"
        lines.append(
            f"<div class='ex-bar' data-domain='{escape(row.name)}'><span>{escape(row.name)}</span>"
            f"<span class='ex-track'><span class='ex-fill' style='width:"
            f"{100 * row.share / top:.2f}%'></span>{whisker}<span class='ex-mark' style='left:"
            f"{100 * expert.even_share / top:.2f}%'></span></span>"
            f"<span>{row.share:.1%}<small>{between}</small></span></div>"
        )
    about = (
        "of a domain\u2019s tokens, the part that chose it, and 95 % of draws of the documents; "
        f"the line is the even share, {expert.even_share:.1%}"
    )
    return _card("domains", "Domains", about, "".join(lines))


def _partners(expert: Expert) -> str:
    if not expert.partners:
        return _card("partners", "Chosen together", "", "<p>A token chooses one expert here.</p>")
    shown = expert.partners[:8]
    top = max(max(row.share, row.chance) for row in shown) * 1.08
    lines = "".join(
        f"<div class='ex-bar' data-partner='{row.expert}'><span>expert {row.expert}</span>"
        f"<span class='ex-track'><span class='ex-fill' style='width:{100 * row.share / top:.2f}%'>"
        f"</span><span class='ex-mark' style='left:{100 * row.chance / top:.2f}%'></span></span>"
        f"<span>{row.share:.1%} <small>chance {row.chance:.1%}</small></span></div>"
        for row in shown
    )
    about = (
        "of its tokens, the part that chose the other too; the line is chance at the same loads"
        + (f"; {len(shown)} of {len(expert.partners)}" if len(shown) < len(expert.partners) else "")
    )
    return _card("partners", "Chosen together", about, lines)


def _positions(expert: Expert) -> str:
    top = max([row.lift for row in expert.positions] + [1.0]) * 1.08
    lines = "".join(
        f"<div class='ex-bar' data-position='{row.first}'>"
        f"<span>{_range(row.first, row.last)}</span>"
        f"<span class='ex-track'><span class='ex-fill' style='width:{100 * row.lift / top:.2f}%'>"
        f"</span><span class='ex-mark' style='left:{100 / top:.2f}%'></span></span>"
        f"<span>{row.lift:.2f}\u00d7 <small>{row.num_tokens:,} tokens</small></span></div>"
        for row in expert.positions
    )
    about = "its share of first choices there over its share of all; the line is 1"
    return _card("positions", "Position in the document", about, lines)


def _range(first: int, last: int | None) -> str:
    if last is None:
        return f"{first:,} on"
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _examples(expert: Expert, vocabulary: Sequence[str] | None) -> str:
    seen = Counter(number for example in expert.examples for number in example.experts)
    seen.pop(expert.expert, None)
    others = [number for number, _ in seen.most_common(len(COLOURS) - 1)]
    colours = {expert.expert: COLOURS[1]} | dict(
        zip(others, [c for c in COLOURS if c != COLOURS[1]], strict=False)
    )
    legend = "".join(
        f"<span class='ex-key' style='--c:{colours[number]}'>expert {number}</span>"
        for number in [expert.expert, *others]
    ) + ("<span class='ex-key'>others</span>" if len(seen) > len(others) else "")
    lines = "".join(_example(example, colours, vocabulary) for example in expert.examples)
    about = (
        "the tokens that it took with most weight, one of a document, framed; colour and number "
        "under each token: its first choice in this layer"
    )
    body = f"<div class='ex-legend'>{legend}</div>{lines}"
    return _card("examples", "In context", about, body)


def _example(example: Example, colours: dict[int, str], vocabulary: Sequence[str] | None) -> str:
    words = []
    for n, (token, number) in enumerate(zip(example.tokens, example.experts, strict=True)):
        colour = f" style='--c:{colours[number]}'" if number in colours else ""
        chosen = " ex-chosen" if n == example.centre else ""
        words.append(
            f"<span class='ex-word{chosen}'{colour}>{token_text(token, vocabulary)}"
            f"<sub>{number}</sub></span>"
        )
    where = (
        f"{escape(example.domain)}, document {example.document:,}, position {example.position:,}"
    )
    where += f", step {example.step:,}" if example.step else ""
    return (
        f"<div class='ex-example'><p>{''.join(words)}</p>"
        f"<small>weight {example.weight:.3f} \u00b7 {where}</small></div>"
    )


def _card(name: str, title: str, about: str, body: str) -> str:
    return (
        f"<section class='ex-card' data-card='{name}'><h4>{title}</h4>"
        f"<p class='ex-about'>{about}</p>{body}</section>"
    )


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "none"
