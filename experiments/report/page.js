// Joins the kept libraries: the filter, the means of intervals.py, vega's charts, DataTables.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Names of settings are anyone's: none may be found on a prototype.
const rows = Array.from({ length: data.rows }, (_, i) => Object.assign(Object.create(null), { i }));
for (const [name, { raw, values, codes }] of Object.entries(data.columns)) {
  rows.forEach((row, i) => { row[name] = raw ? raw[i] : codes[i] < 0 ? null : values[codes[i]]; });
}
const title = (name) => data.titles[name] || name;
const number = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
  : String(Number(value.toPrecision(Math.abs(value) < 10 ? 2 : 3))).replace("-", "−"));
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
function deviation(values) {
  const middle = mean(values);
  return Math.sqrt(values.reduce((a, b) => a + (b - middle) ** 2, 0) / (values.length - 1));
}

// Half a 95 % interval and what it is over, as _half of intervals.py.
function halfOf(means, parts, measure) {
  const t = data.t95[means.length - 2] || 1.96, draws = data.replicates[measure];
  const seeds = means.length > 1 ? t * deviation(means) / Math.sqrt(means.length) : NaN;
  if (draws && parts.every((part) => part.every((row) => draws[row.i]))) {
    const drawn = draws[parts[0][0].i].map((_, r) => (
      mean(parts.map((part) => mean(part.map((row) => draws[row.i][r]))))));
    if (!(seeds >= 1.96 * deviation(drawn))) return [1.96 * deviation(drawn), "instances"];
  }
  return [seeds, means.length > 1 ? "seeds" : "no interval: one seed, no instances"];
}

// As summarize of intervals.py; `also` are plain means of other columns.
function summarize(list, by, measure, peers = [], also = []) {
  const groups = new Map(), most = new Map();
  for (const row of list) {
    if (row[measure] == null || by.some((name) => row[name] == null)) continue;
    const key = by.map((name) => row[name]).join("\0"), seed = row.seed ?? -1;
    const peer = peers.map((name) => row[name]).join("\0");
    if (!groups.has(key)) groups.set(key, { row, peer, seeds: new Map() });
    if (!most.has(peer)) most.set(peer, new Map());
    const held = groups.get(key).seeds;
    if (!held.has(seed)) held.set(seed, { rows: [], places: new Set() });
    held.get(seed).rows.push(row);
    const places = held.get(seed).places.add(row.place).size;
    most.get(peer).set(seed, Math.max(most.get(peer).get(seed) || 0, places));
  }
  return [...groups.values()].map(({ row, peer, seeds }) => {
    const full = [...seeds].filter(([seed, one]) => one.places.size === most.get(peer).get(seed));
    const parts = (full.length ? full : [...seeds]).map(([, one]) => one.rows);
    const means = parts.map((part) => mean(part.map((one) => one[measure])));
    const [half, basis] = halfOf(means, parts, measure), all = parts.flat();
    const line = { measure, mean: mean(means), half, basis, seeds: parts.length, rows: all.length,
      partial: full.length < most.get(peer).size };
    for (const name of by) line[name] = row[name];
    for (const name of also) {
      const known = all.map((one) => one[name]).filter((value) => value != null);
      line[name] = typeof known[0] === "number" ? mean(known) : known[0] ?? null;
    }
    if (half >= 0) Object.assign(line, { low: line.mean - half, high: line.mean + half });
    return line;
  });
}

// The filter stands in the address, so that a view can be passed on.
const controls = [...document.querySelectorAll("[data-control]")];
const plain = Object.fromEntries(controls.map((one) => [one.dataset.control, one.value]));
let state = {}, keep = [];
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const one of controls) {
    const value = given.get(one.dataset.control);
    if (one.type === "checkbox") one.checked = value === "1";
    else one.value = value ?? plain[one.dataset.control];
    if (one.selectedIndex === -1) one.value = plain[one.dataset.control];
  }
}
function writeAddress() {
  const kept = controls.map(({ dataset: { control } }) => [control, state[control]])
    .filter(([name, value]) => value !== (name === "chosen" ? "" : plain[name]));
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}
function passing() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const choices = data.filters.filter((name) => state[name]);
  keep = rows.map((row) => (row.split_role == null || row.split_role === state.role)
    && (!state.chosen || row.chosen) && choices.every((name) => String(row[name]) === state[name])
    && words.every((w) => data.searched.some((n) => String(row[n]).toLowerCase().includes(w))));
  return rows.filter((row) => keep[row.i]);
}

function linesOf(view, list) {
  if (list.some((row) => view.methods.includes(row.method))) {
    list = list.filter((row) => view.methods.includes(row.method));
  }
  if (view.name === "heat") {
    list = list.map((row) => ({ ...row, across: row[state.across], down: row[state.down] }));
  }
  const lines = view.values.flatMap((value) => {
    const parts = !data.curves.includes(value) ? list : list.flatMap(
      ({ method, seed, place, [value]: curve }) => (curve || []).map(
        (y, step) => ({ method, seed, place, step, [value]: y })));
    const also = view.name === "cost" ? [state.price, ...data.settings] : [];
    return summarize(parts, view.by, value || state.measure, view.peers, also);
  });
  const low = Math.min(...lines.map((line) => line.mean));
  const high = Math.max(...lines.map((line) => line.mean));
  for (const line of lines) {
    line.share = high > low ? (line.mean - low) / (high - low) : 0;
    line.price = line[state.price];
    line.settings = data.settings.filter((name) => line[name] != null)
      .map((name) => `${title(name)} ${line[name]}`).join(", ");
  }
  return lines;
}

const drawn = new Map();
async function chart(view, box, lines) {
  const ink = getComputedStyle(document.documentElement).color, columns = box.clientWidth < 500 ? 1 : 4;
  const names = { measure: title(state.measure), price: title(state.price),
    across: title(state.across), down: title(state.down), curve: title(view.values[0]) };
  const text = JSON.stringify(view.spec).replace(/__(\w+?)__/g,
    (_, name) => JSON.stringify(names[name]).slice(1, -1));
  const colored = JSON.stringify({ ...data.config, legend: { ...data.config.legend, columns } })
    .replaceAll("__ink__", ink);
  const held = drawn.get(box);
  if (held && held.key === text + colored) {
    const changes = vega.changeset().remove(() => true).insert(lines);
    return held.view.change("rows", changes).runAsync();
  }
  if (held) held.view.finalize();
  const spec = { ...JSON.parse(text), datasets: { rows: lines } };
  const actions = { export: true, source: false, compiled: false, editor: false };
  const made = await vegaEmbed(box, spec, { actions, config: JSON.parse(colored) });
  drawn.set(box, { key: text + colored, view: made.view });
}

// Methods down, domains or measures across; on a phone every cell names its column.
function grid(view, box, lines, list) {
  const several = view.values.length > 1, column = several ? "measure" : "domain";
  const all = several ? lines : [...lines, ...summarize(list.filter((row) => row.domain !== "clean"),
    ["method"], state.measure).map((line) => ({ ...line, domain: "mean" }))];
  const names = (several ? view.values : [...data.domains, "mean"])
    .filter((name) => all.some((line) => line[column] === name));
  const lowest = (name) => Math.min(...all.filter((l) => l[column] === name && !l.partial)
    .map((line) => line.mean));
  const best = new Map(names.map((n) => [n, state.measure === data.primary ? lowest(n) : -Infinity]));
  const cell = (line, name) => make("td", { "data-label": title(name), class: !several && line
    && !line.partial && line.mean <= best.get(name) + 1e-9 ? "low" : "", title: line
    ? `${line.mean}, ${line.basis}; rows: ${line.rows}` : "" }, ...(line ? [number(line.mean)
    + (line.partial ? "†" : ""), make("small", {}, line.half >= 0 ? ` ± ${number(line.half)}` : "")] : ["–"]));
  const body = data.methods.flatMap((method, k) => {
    const own = all.filter((line) => line.method === method), group = data.groups[k];
    return !own.length ? [] : [
      ...(group === data.groups[k - 1] ? [] : [make("tr", { class: "group" },
        make("td", { colspan: names.length + 1 }, group))]),
      make("tr", {}, make("th", { scope: "row" }, method),
        ...names.map((name) => cell(own.find((line) => line[column] === name), name)))];
  });
  const head = ["method", ...names].map((name) => make("th", { scope: "col" }, title(name)));
  box.replaceChildren(make("table", { class: "grid" }, make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...body)));
}

const shown = (name) => (row, kind) => (name !== "trial" || kind !== "display" ? row[name] ?? ""
  : make("a", { href: data.logs[row.trial] || "." }, row.trial).outerHTML);
const cellText = jQuery.fn.dataTable.render.text().display;
jQuery.fn.dataTable.ext.search.push((settings, cells, i) => keep[i]);
const table = jQuery("#rows").DataTable({ data: rows, deferRender: true, order: [], searching: true,
  layout: { topStart: "pageLength", topEnd: null }, autoWidth: false, columns: data.shown.map((name) => ({
    title: cellText(title(name)), data: shown(name), render: name === "trial" ? null : { display: cellText },
    createdCell: (cell) => { cell.dataset.label = title(name); } })) });

async function show() {
  const start = performance.now();
  state = Object.fromEntries(controls.map((one) => [one.dataset.control,
    one.type === "checkbox" ? (one.checked ? "1" : "") : one.value]));
  const list = passing(), shifted = list.filter((row) => row.domain !== "clean");
  $("shown").textContent = `${list.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
  document.querySelectorAll("[data-row]").forEach((one) => { one.hidden = !keep[one.dataset.row]; });
  table.draw();
  writeAddress();
  const panels = { all: list, clean: list.filter((row) => row.domain === "clean"), shifted:
    shifted.length ? shifted : list };
  for (const view of data.views) {
    for (const panel of view.panels) {
      const box = $(`${view.name}-${panel}`), lines = linesOf(view, panels[panel].filter((r) => r.status === "ok"));
      box.parentElement.hidden = !lines.length;
      if (!view.spec) grid(view, box, lines, list);
      else if (!view.each) await chart(view, box, lines);
      else for (const one of box.children) {
        const own = lines.filter((line) => line[view.each] === one.dataset.each);
        one.hidden = !own.length;
        if (own.length) await chart(view, one.lastElementChild, own);
      }
    }
  }
  document.documentElement.dataset.showMs = (performance.now() - start).toFixed(0);
}

$("csv").onclick = () => {
  const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  const lines = [data.shown.map(title), ...rows.filter((row) => keep[row.i])
    .map((row) => data.shown.map((name) => row[name]))];
  const text = lines.map((line) => line.map(quoted).join(",")).join("\r\n");
  make("a", { download: "rows.csv", href: URL.createObjectURL(new Blob([text])) }).click();
};
let waiting = 0;
const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(show); };
controls.forEach((one) => one.addEventListener("input", soon));
$("reset").onclick = () => { history.replaceState(null, "", "#"); readAddress(); soon(); };
addEventListener("hashchange", () => { readAddress(); soon(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
readAddress();
await show();
document.documentElement.dataset.ready = performance.now().toFixed(0);
