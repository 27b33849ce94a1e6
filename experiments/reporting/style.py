"""The page's inline style sheet and its few lines of script."""

CSS = """
:root { color-scheme: light dark;
  --bg: #ffffff; --fg: #1c2024; --muted: #62686f; --rule: #dfe3e7; --soft: #f5f7f9;
  --accent: #0b62c4; --accent-soft: #e6f0fb; --worse: #b4483a; --grey: #7d858d; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #14171a; --fg: #e5e8eb; --muted: #9aa2aa; --rule: #2d3338; --soft: #1b1f23;
  --accent: #6cb0ff; --accent-soft: #17304b; --worse: #e88a7c; --grey: #8b939b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 28px 72px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 24px 0 4px; }
p { margin: 6px 0; max-width: 78ch; }
p.sub, .quiet, figcaption { color: var(--muted); }
p.lead { font-size: 18px; line-height: 1.5; margin: 20px 0 18px; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr));
  border: 1px solid var(--rule); border-radius: 8px; margin: 16px 0; overflow: hidden; }
.tile { padding: 14px 18px; box-shadow: 0 0 0 0.5px var(--rule); }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.tile.key b { color: var(--accent); }
.tile span { color: var(--muted); font-size: 13px; line-height: 1.4; display: block; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; color: var(--muted); border-bottom: 1px solid var(--grey);
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--bg); padding-left: 2px; z-index: 1; }
tbody th { font-weight: 400; }
.full { width: 100%; }
.wide th, .wide td { padding-left: 5px; padding-right: 5px; }
tr.group td { color: var(--muted); font-size: 12px; padding-top: 12px; position: static; }
tr.group span { position: sticky; left: 2px; }
tr.best th { font-weight: 600; color: var(--accent); }
td.left, th.left { text-align: left; }
td.text { text-align: left; white-space: normal; min-width: 220px; max-width: 62ch;
  overflow-wrap: anywhere; }
td.sum, th.sum { border-left: 1px solid var(--rule); }
td.low { font-weight: 700; background: var(--accent-soft); }
td.gap, .muted { color: var(--muted); }
td small { display: block; color: var(--muted); font-size: 11px; font-weight: 400; }
.worse { color: var(--worse); } .good { color: var(--accent); }
figure { margin: 14px 0 6px; } figure .scroll { margin: 0; }
figcaption { font-size: 13px; max-width: 78ch; margin-top: 4px; }
.note { border-left: 3px solid var(--accent); background: var(--soft); padding: 10px 16px;
  margin: 16px 0; border-radius: 0 6px 6px 0; }
.note ul { margin: 0; padding-left: 18px; }
.note.bad { border-left-color: var(--worse); }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); font-size: 14px; }
.switch { display: inline-flex; border: 1px solid var(--rule); border-radius: 6px;
  overflow: hidden; margin: 8px 0 0; }
.switch button { font: inherit; font-size: 13px; border: 0; background: none; color: var(--muted);
  padding: 4px 12px; cursor: pointer; }
.switch button[aria-pressed="true"] { background: var(--accent-soft); color: var(--accent);
  font-weight: 600; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; margin: 10px 0;
  font-size: 14px; }
.facts dt { color: var(--muted); } .facts dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; height: auto; overflow: visible;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg text { fill: var(--fg); font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--muted); } svg .strong { font-weight: 600; }
svg text.strong { fill: var(--fg); }
svg line { stroke-width: 1; } svg .axis { stroke: var(--grey); } svg .grid { stroke: var(--rule); }
svg .reference { stroke: var(--grey); stroke-dasharray: 4 3; }
svg .leader { stroke: var(--grey); stroke-dasharray: 1 3; opacity: 0.8; }
svg .link { stroke: var(--accent); stroke-width: 2; opacity: 0.55; }
svg .link.worse { stroke: var(--worse); }
svg .bar { stroke: var(--grey); stroke-width: 2; } svg .bar.thin { stroke-width: 1; }
svg .bar.best { stroke: var(--accent); }
svg .curve { fill: none; stroke-width: 1.6; } svg .curve.other { stroke: var(--grey); }
svg .curve.best { stroke: var(--accent); stroke-width: 2.6; }
svg circle.best, svg polygon.best, svg rect.best { fill: var(--accent); }
svg circle.other, svg polygon.other { fill: var(--grey); }
svg .hollow { fill: var(--bg); stroke: var(--grey); stroke-width: 1.8; }
svg rect.fill { fill: var(--grey); opacity: 0.75; }
svg rect.fill.best { fill: var(--accent); opacity: 1; }
svg rect.fill.worse { fill: var(--worse); opacity: 0.75; }
@media (max-width: 640px) { main { padding: 22px 16px 48px; } h1 { font-size: 23px; }
  p.lead { font-size: 16px; } .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 8px; } }
@media print { .switch { display: none; } .scroll { overflow: visible; } }
"""

# Swaps the error table for the table of differences to source; without script both show.
SCRIPT = """
for (const box of document.querySelectorAll("[data-views]")) {
  const views = [...box.querySelectorAll("[data-view]")];
  const bar = document.createElement("div");
  bar.className = "switch";
  const show = (k) => {
    views.forEach((view, i) => { view.hidden = i !== k; });
    [...bar.children].forEach((button, i) => button.setAttribute("aria-pressed", i === k));
  };
  views.forEach((view, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = view.dataset.view;
    button.onclick = () => show(i);
    bar.append(button);
  });
  box.prepend(bar);
  show(0);
}
"""
