// Mean error per domain and method, with its standard error over the seeds.

function domainStats(rows) {
  const methods = codesOf("method"), domains = codesOf("domain");
  const errors = numbersOf("error"), seeds = numbersOf("seed");
  const found = new Map();
  for (const i of rows) {
    if (Number.isNaN(errors[i]) || domains[i] < 0) continue;
    if (!found.has(domains[i])) found.set(domains[i], new Map());
    const here = found.get(domains[i]);
    if (!here.has(methods[i])) here.set(methods[i], new SeedMeans());
    here.get(methods[i]).add(seeds[i], errors[i]);
  }
  const inOrder = (map) => [...map].sort((a, b) => a[0] - b[0]);
  return inOrder(found).map(([domain, here]) => {
    const stats = inOrder(here).map(([method, means]) => ({ method, ...means.stat() }));
    const most = Math.max(...stats.map((stat) => stat.seeds));
    for (const stat of stats) stat.partial = stat.seeds < most;
    return { name: columns.domain.values[domain], stats };
  });
}

function isBaseline(method) {
  return method >= 0 && data.baselines.includes(columns.method.values[method]);
}

function track(stat, top) {
  const fill = make("span", { class: isBaseline(stat.method) ? "fill base" : "fill" });
  fill.style.width = `${(100 * stat.mean) / top}%`;
  const element = make("span", { class: "track", "aria-hidden": "true" }, fill);
  if (stat.stderr !== null) {
    const from = Math.max(0, stat.mean - stat.stderr);
    const to = Math.min(top, stat.mean + stat.stderr);
    const line = make("span", { class: "spread" });
    line.style.left = `${(100 * from) / top}%`;
    line.style.width = `${(100 * (to - from)) / top}%`;
    element.append(line);
  }
  return element;
}

function bar(stat, top) {
  const name = stat.method < 0 ? GAP : columns.method.values[stat.method];
  const spread = stat.stderr === null ? "" : ` ± ${percent(stat.stderr)}`;
  const over = `${plural(stat.seeds, "seed")}, ${plural(stat.rows, "row")}`;
  return make("tr", { title: `${name}: ${percent(stat.mean, 2)} %${spread}, ${over}` },
    make("th", { scope: "row" }, name),
    make("td", {}, track(stat, top)),
    make("td", {}, percent(stat.mean) + (stat.partial ? "†" : ""),
      make("span", { class: "muted" }, spread)));
}

function panel(one, top) {
  const lines = make("tbody", {}, ...one.stats.map((stat) => bar(stat, top)));
  const label = `Mean error (%) on ${one.name}`;
  const table = make("table", { class: "bars", "aria-label": label }, lines);
  return make("figure", { class: "panel" }, make("h3", {}, one.name), table);
}

function showBars(rows) {
  const found = domainStats(rows);
  const box = body("bars");
  if (!found.length) {
    return box.replaceChildren(quiet("No row that passes the filter has an error."));
  }
  const all = found.flatMap((one) => one.stats);
  const top = Math.max(...all.map((stat) => stat.mean + (stat.stderr || 0))) || 1;
  const base = all.some((stat) => isBaseline(stat.method));
  const partial = all.some((stat) => stat.partial);
  const legend = [
    `Bars begin at 0 and end at ${percent(top)} %`,
    base ? "; hollow: the model itself, not adapted" : "",
    partial ? ". †: over fewer seeds than other methods there." : ".",
  ];
  box.replaceChildren(quiet(legend.join("")),
    make("div", { class: "panels" }, ...found.map((one) => panel(one, top))));
}
