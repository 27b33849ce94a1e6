// Joins the kept libraries: the filter, the means of intervals.py, vega's charts, DataTables.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id), root = document.documentElement;
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
const title = (name) => (Object.hasOwn(data.titles, name) ? data.titles[name] : name);
// Names break after an underscore; figures of one column have as many decimals.
const broken = (text) => text.replaceAll("_", "_\u200b");
const number = (value, measure) => (title(measure).endsWith("(%)") ? value.toFixed(1)
  : Math.abs(value) < 1000 ? String(Number(value.toPrecision(3)))
    : Math.round(value).toLocaleString("en")).replace("-", "−");
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const deviation = (values, m = mean(values)) =>
  Math.sqrt(values.reduce((a, b) => a + (b - m) ** 2, 0) / (values.length - 1));
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
      partial: full.length < most.get(peer).size,
      ...(half >= 0 ? { low: mean(means) - half, high: mean(means) + half } : {}) };
    for (const name of by) line[name] = row[name];
    const pick = (known) => (typeof known[0] === "number" ? mean(known) : known[0] ?? null);
    for (const name of also) line[name] = pick(all.map((r) => r[name]).filter((v) => v != null));
    return line;
  });
}
// The filter stands in the address, so that a view can be passed on.
const controls = [...document.querySelectorAll("[data-control]")];
const plain = Object.fromEntries(controls.map((one) => [one.dataset.control, one.value]));
let state = plain, keep = [];
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const one of controls) {
    one.value = given.get(one.dataset.control) ?? plain[one.dataset.control];
    if (one.selectedIndex === -1) one.value = plain[one.dataset.control];
  }
}
function passing() {
  state = Object.fromEntries(controls.map((one) => [one.dataset.control, one.value]));
  const kept = Object.entries(state).filter(([name, value]) => value !== plain[name]);
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const choices = data.filters.filter((name) => state[name]);
  keep = rows.map((row) => (row.split_role == null || row.split_role === state.role)
    && (!state.chosen || row.chosen) && choices.every((name) => String(row[name]) === state[name])
    && words.every((w) => data.searched.some((n) => String(row[n]).toLowerCase().includes(w))));
  return rows.filter((row) => keep[row.i]);
}

function linesOf(view, list) {
  const named = list.filter((row) => view.methods.includes(row.method));
  if (named.length) list = named;
  const axes = (row) => ({ ...row, across: row[state.across], down: row[state.down] });
  if (view.name === "heat") list = list.map(axes);
  const lines = view.values.flatMap((value) => {
    const parts = !data.curves.includes(value) ? list : list.flatMap(
      ({ method, seed, place, [value]: curve }) => (curve || []).map(
        (y, step) => ({ method, seed, place, step, [value]: y })));
    const also = view.name === "cost" ? [state.price, ...data.settings] : [];
    return summarize(parts, view.by, value || state.measure, view.peers, also);
  });
  const low = Math.min(...lines.map((line) => line.mean));
  const range = Math.max(...lines.map((line) => line.mean)) - low || 1;
  return lines.map((line) => ({ ...line, role: state.role, share: (line.mean - low) / range,
    price: line[state.price], settings: data.settings.filter((name) => line[name] != null)
      .map((name) => `${title(name)} ${line[name]}`).join(", ") }));
}

const drawn = new Map();
async function chart(view, box, lines) {
  const names = { ...state, curve: view.values[0] };
  const methods = data.methods.filter((method) => lines.some((line) => line.method === method));
  const text = JSON.stringify(view.spec)
    .replace(/"__methods__"/g, methods.map((name) => JSON.stringify(name)).join())
    .replace(/__(\w+?)__/g, (_, name) => JSON.stringify(title(names[name])).slice(1, -1));
  const ink = getComputedStyle(root).color, held = drawn.get(box);
  const config = JSON.parse(JSON.stringify(data.config).replaceAll("__ink__", ink));
  config.legend.columns = box.clientWidth < 500 ? 1 : 3;
  const key = text + JSON.stringify(config);
  if (held && held.key === key) return held.view.data("rows", lines).runAsync();
  if (held) held.view.finalize();
  const actions = { export: true, source: false, compiled: false, editor: false };
  const spec = { ...JSON.parse(text), datasets: { rows: lines } };
  return drawn.set(box, { key, view: (await vegaEmbed(box, spec, { config, actions })).view });
}

// Methods down, domains or measures across; on a phone every cell names its column.
function grid(view, box, lines, list) {
  const several = view.values.length > 1, column = several ? "measure" : "domain";
  const shifted = several ? [] : list.filter((row) => row.domain !== "clean");
  const all = [...lines, ...summarize(shifted, ["method"], state.measure)
    .map((line) => ({ ...line, domain: "mean" }))];
  const names = (several ? view.values : [...data.domains, "mean"])
    .filter((name) => all.some((line) => line[column] === name));
  const full = all.filter((line) => !several && state.measure === data.primary && !line.partial);
  const best = (name) => Math.min(...full.filter((l) => l[column] === name).map((l) => l.mean));
  const lowest = new Map(names.map((name) => [name, best(name)]));
  const cell = (line, name) => {
    if (!line) return make("td", { "data-label": title(name) }, "–");
    const low = full.includes(line) && line.mean <= lowest.get(name) + 1e-9 ? "low" : "";
    const half = line.half >= 0 ? ` ± ${number(line.half, line.measure)}` : "";
    return make("td", { "data-label": title(name), class: low,
      title: `${line.mean}; ${line.basis}; rows: ${line.rows}` },
    number(line.mean, line.measure) + (line.partial ? "†" : ""), make("small", {}, half));
  };
  const present = data.methods.map((method, k) => ({ method, group: data.groups[k] }))
    .filter(({ method }) => all.some((line) => line.method === method));
  const body = present.flatMap(({ method, group }, k) => {
    const heading = make("tr", { class: "group" }, make("td", { colspan: all.length }, group));
    const own = all.filter((line) => line.method === method);
    const cells = names.map((name) => cell(own.find((line) => line[column] === name), name));
    const line = make("tr", {}, make("th", { scope: "row" }, broken(method)), ...cells);
    return k && present[k - 1].group === group ? [line] : [heading, line];
  });
  const head = ["method", ...names].map((name) => make("th", {}, broken(title(name))));
  box.replaceChildren(make("table", { class: "grid" }, make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...body)));
}

const link = (trial) => make("a", { href: data.logs[trial] }, trial).outerHTML;
const escape = jQuery.fn.dataTable.render.text().display;
jQuery.fn.dataTable.ext.search.push((settings, cells, i) => keep[i]);
const csv = { extend: "csv", text: "Download as CSV", exportOptions: { orthogonal: "export",
  format: { header: (_, k) => title(data.shown[k]) } } };
const shown = data.shown.map((name) => ({ title: escape(broken(title(name))), searchable: false,
  visible: !data.constant.includes(name), data: (row) => row[name] ?? "",
  render: { display: (value) => (name === "trial" && value ? link(value) : escape(value)) },
  createdCell: (cell) => { cell.dataset.label = title(name); } }));
let table = null;
async function show() {
  const list = passing(), ok = list.filter((r) => r.status === "ok");
  const shifted = ok.filter((row) => row.domain !== "clean");
  const panels = { all: ok, clean: ok.filter((row) => row.domain === "clean"),
    shifted: shifted.length ? shifted : ok };
  $("shown").textContent = `${list.length} of ${rows.length} rows`;
  for (const one of document.querySelectorAll("[data-row]")) one.hidden = !keep[one.dataset.row];
  for (const view of data.views) {
    for (const panel of view.panels) {
      const box = $(`${view.name}-${panel}`), lines = linesOf(view, panels[panel]);
      box.parentElement.hidden = !lines.length;
      if (!view.spec) grid(view, box, lines, ok);
      else if (!view.each && lines.length) await chart(view, box, lines);
      else for (const one of box.querySelectorAll("[data-each]")) {
        const own = lines.filter((line) => line[view.each] === one.dataset.each);
        one.hidden = !own.length;
        if (own.length) await chart(view, one.lastElementChild, own);
      }
    }
  }
  if (table) table.draw();
}
let waiting = 0, running = show(readAddress());
const later = () => { running = running.then(show); };
const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(later); };
controls.forEach((one) => one.addEventListener("input", soon));
$("reset").onclick = () => { history.replaceState(null, "", "#"); readAddress(); soon(); };
addEventListener("hashchange", () => { readAddress(); soon(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
await running;
table = jQuery("#rows").DataTable({ data: rows, deferRender: true, autoWidth: false,
  order: [], layout: { topStart: "pageLength", topEnd: { buttons: [csv] } }, columns: shown });
root.dataset.ready = performance.now().toFixed(0);
