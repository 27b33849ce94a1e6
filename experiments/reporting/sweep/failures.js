// Failed rows by message. The trials of a message are written out when it is opened.

const MOST_LISTED = 200;

function failureGroups(rows) {
  const statuses = column("status"), groups = new Map();
  const ok = statuses.kind === "text" ? statuses.values.indexOf("ok") : -1;
  for (const i of rows) {
    if (codesOf("status")[i] === ok) continue;
    const message = textAt("message", i) || "no message recorded";
    const form = message.replace(/\d+/g, "#");
    if (!groups.has(form)) groups.set(form, { message, rows: [] });
    groups.get(form).rows.push(i);
  }
  return [...groups.values()].sort((a, b) => b.rows.length - a.rows.length);
}

function failedTrials(group) {
  const lines = group.rows.slice(0, MOST_LISTED).map((i) => make("tr", {},
    make("th", { scope: "row" }, make("code", {}, textAt("trial", i))),
    make("td", { class: "text" }, textAt("label", i) || GAP), make("td", { class: "text" }, textAt("message", i) || GAP)));
  const more = group.rows.length - lines.length;
  return [make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Failed trials" },
    make("table", {}, make("thead", {}, make("tr", {}, ...["trial", "label", "message"].map((text) => make("th", { scope: "col", class: "left" }, text)))), make("tbody", {}, ...lines))),
    more > 0 ? quiet(`and ${count(more)} more; filter to see them.`) : ""];
}

function showFailures(rows) {
  const groups = failureGroups(rows);
  if (!groups.length) return body("failures").replaceChildren(quiet("No row that passes the filter failed."));
  body("failures").replaceChildren(...groups.map((group) => {
    const trials = new Set(group.rows.map((i) => codesOf("trial")[i])).size;
    const details = make("details", {}, make("summary", {}, make("b", {}, plural(trials, "trial")), ` ${group.message}`));
    details.ontoggle = () => { if (details.open && details.children.length === 1) details.append(...failedTrials(group)); };
    return details;
  }));
}
