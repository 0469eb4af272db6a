"""HTML frame and style sheet shared by report.html and compare.html."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from infini_train.report.plotting import css_colours

_FONTS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif'
_STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --border: #dfe4ea; --prompt: #5d6778; --mark: #e3f0f9; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --border: #2b333f; --prompt: #9ea9b9; --mark: #1c3346; DARK }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 FONTS; -webkit-text-size-adjust: 100%; }
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
header { margin-bottom: 2rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 3rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
.kind { color: var(--muted); font-size: 0.85rem; margin: 0 0 0.25rem; }
.lead { font-size: 1.1rem; max-width: 46rem; margin: 0; text-wrap: pretty; }
.intro, .missing { color: var(--muted); max-width: 46rem; margin: 0 0 1rem; }
.missing { font-style: italic; }
.note { border-left: 3px solid var(--emptied); background: var(--surface); padding: 0.5rem 0.9rem; margin: 0.75rem 0;
  font-size: 0.92rem; border-radius: 0 6px 6px 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.86em; }
.cards { display: flex; flex-wrap: wrap; gap: 0.9rem; margin: 0 0 1rem; }
.card { flex: 1 1 13.5rem; background: var(--surface); border: 1px solid var(--border); border-radius: 10px;
  padding: 0.9rem 1.1rem; }
.card dt { font-size: 0.85rem; color: var(--muted); }
.card dd { margin: 0; font-size: 0.82rem; line-height: 1.4; color: var(--muted); }
.card .value { font-size: 1.9rem; line-height: 1.3; font-weight: 600; letter-spacing: -0.02em; color: var(--ink);
  font-variant-numeric: tabular-nums; }
.card.with-memory .value { color: var(--with-memory); }
.card.emptied .value { color: var(--emptied); }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--surface); border: 1px solid var(--border); border-radius: 10px;
  padding: 1.1rem 1.2rem; min-width: 0; display: flex; flex-direction: column; }
figure.wide { grid-column: 1 / -1; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; }
.plot text { font-family: FONTS !important; }
figcaption { margin-top: 0.7rem; font-size: 0.92rem; line-height: 1.5; color: var(--muted); max-width: 54rem; }
.sample, .config { background: var(--surface); border: 1px solid var(--border); border-radius: 10px;
  padding: 1.1rem 1.2rem; margin: 0; line-height: 1.6; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
.sample .prompt { color: var(--prompt); }
.sample ins { text-decoration: none; background: var(--mark); border-radius: 3px; }
.config { margin-top: 0.75rem; overflow-x: auto; }
.terms { display: grid; grid-template-columns: max-content 1fr; gap: 0.4rem 1.2rem; margin: 0; font-size: 0.92rem; }
.terms dt { font-weight: 600; }
.terms dd { margin: 0; color: var(--muted); }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; margin: 1.5rem 0; }
th, td { padding: 0.35rem 0.5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 46rem) {
  main { padding: 1.75rem 1rem 3rem; }
  .charts { grid-template-columns: minmax(0, 1fr); }
  .card { flex-basis: 9.5rem; }
  figure { padding: 0.9rem; }
  .wide .plot svg { min-width: 36rem; }
  .terms { grid-template-columns: 1fr; gap: 0; }
  .terms dd { margin-bottom: 0.6rem; }
}
@media print { body { background: none; } figure, .card { break-inside: avoid; } }
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table of text cells. Cells are escaped; a table wider than the page scrolls."""
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="table"><table><tr>{names}</tr>{cells}</table></div>'


def page(kind: str, title: str, lead: str, body: str) -> str:
    """Return the complete HTML document. All arguments are HTML already.

    Args:
        kind: kind of the document, such as `training report`.
        title: heading.
        lead: first paragraph.
        body: sections below it.
    """
    light, dark = css_colours()
    style = _STYLE.replace("LIGHT", light).replace("DARK", dark).replace("FONTS", _FONTS)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – {kind}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<p class="kind">infini-train {kind}</p>
<h1>{title}</h1>
<p class="lead">{lead}</p>
</header>
{body}
</main>
</body>
</html>
"""
