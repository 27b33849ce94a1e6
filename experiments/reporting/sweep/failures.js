// Failed rows by message. The trials of a message are written out when it is opened.

const MOST_LISTED = 200;

function failureGroups(rows) {
  const statuses = codesOf("status"), groups = new Map();
  const ok = column("status").values.indexOf("ok");
  for (const i of rows) {
    if (statuses[i] === ok) continue;
    const message = textAt("message", i) || "no message recorded";
    const form = message.replace(/\d+/g, "#");
    if (!groups.has(form)) groups.set(form, { message, rows: [] });
    groups.get(form).rows.push(i);
  }
  return [...groups.values()].sort((a, b) => b.rows.length - a.rows.length);
}

function failedTrials(group) {
  const text = (name, i) => make("td", { class: "text" }, textAt(name, i) || GAP);
  const lines = group.rows.slice(0, MOST_LISTED).map((i) => make("tr", {},
    make("th", { scope: "row" }, make("code", {}, textAt("trial", i))),
    text("label", i), text("message", i)));
  const more = group.rows.length - lines.length;
  const heads = ["trial", "label", "message"].map((name) => head(name, "left"));
  return [scrollingTable("Failed trials", heads, lines),
    more > 0 ? quiet(`and ${count(more)} more; filter to see them.`) : ""];
}

function showFailures(rows) {
  const groups = failureGroups(rows);
  const box = body("failures");
  if (!groups.length) return box.replaceChildren(quiet("No row that passes the filter failed."));
  box.replaceChildren(...groups.map((group) => {
    const trials = plural(new Set(group.rows.map((i) => codesOf("trial")[i])).size, "trial");
    const summary = make("summary", {}, make("b", {}, trials), `: ${group.message}`);
    const details = make("details", {}, summary);
    details.ontoggle = () => {
      if (details.open && details.children.length === 1) details.append(...failedTrials(group));
    };
    return details;
  }));
}
