"""Where the numbers come from: the choice of hyper-parameters and the run's provenance."""

from collections.abc import Sequence
from html import escape
from typing import Any

from experiments import provenance
from experiments.reporting import sections
from experiments.reporting.rows import Row


def _params(values: Any) -> str:
    if isinstance(values, dict):
        return ", ".join(f"{key} = {_plain(value)}" for key, value in values.items()) or "none"
    return _plain(values)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, dict):
        return "{" + _params(value) + "}"
    return str(value)


def selection_html(selection: dict[str, Any], validated: Sequence[str]) -> str:
    """How the hyper-parameters were chosen, with the chosen and the tried values.

    Args:
      selection: the content of ``selection.json``; empty if there is none.
      validated: the names of the validation corruptions that have rows.
    """
    parts = ["<h2>How the hyper-parameters were chosen</h2>"]
    if not selection:
        text = "No selection.json lies beside the results, so the chosen values are not shown here."
        if validated:
            text += f" Rows of the validation corruptions ({', '.join(validated)}) are shown above."
        return parts[0] + f"<p>{escape(text)}</p>"
    on = f" ({', '.join(validated)})" if validated else ""
    what = "clean validation images" if validated == ["clean"] else f"validation corruptions{on}"
    parts.append(
        f"<p>Hyper-parameters were chosen on the {escape(what)} only; no reported domain was used "
        "to choose anything.</p>"
    )
    if selection.get("note"):
        parts.append(f'<p class="quiet">{escape(str(selection["note"]))}</p>')
    chosen = selection.get("chosen")
    chosen = chosen if isinstance(chosen, dict) else {}
    if chosen:
        body = [
            f'<tr><th scope="row">{escape(str(method))}</th>'
            f'<td class="text">{escape(_params(values))}</td></tr>'
            for method, values in chosen.items()
        ]
        parts.append(sections.table(sections.heads(["method", "chosen"], (0, 1)), body))
    tried = selection.get("tried")
    tried = [one for one in tried if isinstance(one, dict)] if isinstance(tried, list) else []
    if tried:
        order = {str(one.get("method")): None for one in tried}

        def rank(one: dict[str, Any]) -> tuple[int, float]:
            error = one.get("error")
            value = error if isinstance(error, (int, float)) else float("inf")
            return list(order).index(str(one.get("method"))), value

        body = []
        for one in sorted(tried, key=rank):
            error, name = one.get("error"), str(one.get("method"))
            shown = f"{100 * error:.2f}" if isinstance(error, (int, float)) else "–"
            mark = chosen.get(name) == one.get("params")
            body.append(
                f'<tr{" class=best" if mark else ""}><th scope="row">{escape(name)}</th>'
                f'<td class="text">{escape(_params(one.get("params")))}</td><td>{shown}</td>'
                f'<td class="left">{"chosen" if mark else ""}</td></tr>'
            )
        names = ["method", "values", "validation error (%)", ""]
        parts.append(
            f"<details><summary>All {len(tried)} settings that were tried</summary>"
            f"{sections.table(sections.heads(names, (0, 1)), body)}</details>"
        )
    return "".join(parts)


def run_facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, escaped, of what a ``run.json`` holds."""
    facts: list[tuple[str, str]] = []
    command = run.get("command")
    if command:
        text = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        facts.append(("command", f"<code>{escape(text)}</code>"))
    if run.get("device"):
        count = run.get("device_count")
        facts.append(("device", escape(f"{run['device']}" + (f" × {count}" if count else ""))))
    versions = run.get("versions")
    if isinstance(versions, dict):
        facts.append(("versions", escape(", ".join(f"{k} {v}" for k, v in versions.items()))))
    if run.get("commit"):
        facts.append(("commit", f"<code>{escape(str(run['commit']))}</code>"))
    if run.get("started"):
        facts.append(("started", escape(str(run["started"]))))
    for name in ("parts", "runs"):
        if isinstance(run.get(name), list) and len(run[name]) > (name == "runs"):
            facts.append((name, _origins(run[name])))
    known = {*provenance.ORIGIN, "parts", "runs"}
    facts += [(escape(key), escape(_plain(v))) for key, v in run.items() if key not in known]
    return facts


def _origins(origins: Sequence[Any]) -> str:
    """Several programs as a list that opens: what each was, and where and when it ran."""
    items = []
    for one in origins:
        if isinstance(one, dict):
            names = ("folder", "test", "command", "device", "commit", "started")
            shown = ", ".join(str(one[name]) for name in names if one.get(name))
            items.append(f"<li>{escape(shown)}</li>")
    return f"<details><summary>{len(items)}</summary><ul>{''.join(items)}</ul></details>"


def facts_html(facts: Sequence[tuple[str, str]]) -> str:
    """A list of names and values that are escaped already."""
    listed = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts)
    return f'<dl class="facts">{listed}</dl>'


def provenance_html(run: dict[str, Any], rows: Sequence[Row]) -> str:
    """Where the numbers come from: command, device, versions, commit, checkpoints.

    Args:
      run: the content of ``run.json``; empty if there is none.
      rows: every row of the results file.
    """
    facts = run_facts(run)
    prints: dict[str, set[int]] = {}
    for row in rows:
        if row.checkpoint:
            prints.setdefault(row.checkpoint, set()).add(row.seed)
    for name, seeds in prints.items():
        label = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"
        value = f'<code>{escape(name)}</code> <span class="muted">({label})</span>'
        facts.append(("checkpoint", value))
    lost = sum(not row.ok for row in rows)
    facts.append(("rows", f"{len(rows) - lost} ok, {lost} failed"))
    missing = "" if run else '<p class="quiet">No run.json lies beside the results.</p>'
    return f"<h2>Provenance</h2>{missing}{facts_html(facts)}"
