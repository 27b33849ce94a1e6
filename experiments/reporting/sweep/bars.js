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
  return [...found].sort((a, b) => a[0] - b[0]).map(([domain, here]) => {
    const stats = [...here].sort((a, b) => a[0] - b[0]).map(([method, means]) => [method, means.stat()]);
    const most = Math.max(...stats.map(([, stat]) => stat.seeds));
    for (const [, stat] of stats) stat.partial = stat.seeds < most;
    return { name: columns.domain.values[domain], stats };
  });
}

function bar(method, stat, top) {
  const name = columns.method ? columns.method.values[method] : "";
  const fill = make("span", { class: data.baselines.includes(name) ? "fill base" : "fill" });
  fill.style.width = `${(100 * stat.mean) / top}%`;
  const track = make("span", { class: "track", "aria-hidden": "true" }, fill);
  if (stat.stderr !== null) {
    const from = Math.max(0, stat.mean - stat.stderr);
    const line = make("span", { class: "spread" });
    line.style.left = `${(100 * from) / top}%`;
    line.style.width = `${(100 * (Math.min(top, stat.mean + stat.stderr) - from)) / top}%`;
    track.append(line);
  }
  const spread = stat.stderr === null ? "" : ` ± ${percent(stat.stderr)}`;
  const tip = `${name}: ${percent(stat.mean, 2)} %${spread}, ${plural(stat.seeds, "seed")}, ${plural(stat.rows, "row")}`;
  return make("tr", { title: tip }, make("th", { scope: "row" }, name), make("td", { class: "bar" }, track),
    make("td", {}, percent(stat.mean) + (stat.partial ? "†" : ""), make("span", { class: "muted" }, spread)));
}

function showBars(rows) {
  const found = domainStats(rows);
  if (!found.length) return body("bars").replaceChildren(quiet("No row that passes the filter has an error."));
  const reach = Math.max(...found.flatMap((one) => one.stats.map(([, stat]) => stat.mean + (stat.stderr || 0))));
  const top = reach || 1;
  const panels = found.map((one) => make("figure", { class: "panel" }, make("h3", {}, one.name),
    make("table", { class: "bars", "aria-label": `Mean error (%) on ${one.name}` }, make("tbody", {}, ...one.stats.map(([method, stat]) => bar(method, stat, top))))));
  const base = found.some((one) => one.stats.some(([method]) => data.baselines.includes(columns.method.values[method])));
  const partial = found.some((one) => one.stats.some(([, stat]) => stat.partial));
  body("bars").replaceChildren(
    quiet(`Bars begin at 0 and end at ${percent(top)} %${base ? "; hollow: the model itself, not adapted" : ""}.${partial ? " †: over fewer seeds than other methods there." : ""}`),
    make("div", { class: "panels" }, ...panels));
}
