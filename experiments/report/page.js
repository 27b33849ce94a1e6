// Joins the kept libraries: the filter, the means of intervals.py, vega's charts, DataTables.
const $ = (id) => document.getElementById(id), root = document.documentElement;
const text = atob($("data").textContent), packed = new Uint8Array(text.length);
for (let i = 0; i < text.length; i += 1) packed[i] = text.charCodeAt(i);
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
const data = await new Response(unpacked).json();
// A row is its number; names of settings are anyone's, so columns are in a map.
const columns = new Map(Object.entries(data.columns).map(([name, { values, codes }]) => [name,
  { codes, size: values.length + 1, values: codes.map((code) => values[code] ?? null) }]));
const of = (name) => columns.get(name)?.values;
const rows = Array.from({ length: data.rows }, (_, i) => i);
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
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
// Half a 95 % interval and what it is over, as in intervals.py.
function halfOf(means, parts, measure) {
  const t = data.t95[means.length - 2] || 1.96, draws = data.replicates[measure];
  const seeds = means.length > 1 ? t * deviation(means) / Math.sqrt(means.length) : NaN;
  if (draws && parts.every((part) => part.every((i) => draws[i]))) {
    const drawn = draws[parts[0][0]].map((_, r) => (
      mean(parts.map((part) => mean(part.map((i) => draws[i][r]))))));
    if (!(seeds >= 1.96 * deviation(drawn))) return [1.96 * deviation(drawn), "instances"];
  }
  return [seeds, means.length > 1 ? "seeds" : data.no_interval];
}

// As summarize of intervals.py; `also` are plain means of other columns.
function summarize(list, by, measure, { peers = [], also = [], values = of(measure) } = {}) {
  const groups = new Map(), most = new Map();
  const axis = (name) => columns.get(["across", "down"].includes(name) ? state[name] : name);
  const [keys, peerKeys] = [by, peers].map((names) => names.map(axis));
  const joined = (held, i) => held.reduce((all, { codes, size }) => all * size + codes[i] + 1, 0);
  const seeds = axis("seed").codes, places = axis("place").codes;
  for (const i of list) {
    if (values[i] == null || keys.some(({ codes }) => codes[i] < 0)) continue;
    const key = joined(keys, i), peer = joined(peerKeys, i), seed = seeds[i];
    if (!groups.has(key)) groups.set(key, { first: i, peer, seeds: new Map() });
    if (!most.has(peer)) most.set(peer, new Map());
    const held = groups.get(key).seeds;
    if (!held.has(seed)) held.set(seed, { rows: [], places: new Set() });
    held.get(seed).rows.push(i);
    const count = held.get(seed).places.add(places[i]).size;
    most.get(peer).set(seed, Math.max(most.get(peer).get(seed) || 0, count));
  }
  return [...groups.values()].map(({ first, peer, seeds: held }) => {
    const full = [...held].filter(([seed, part]) => part.places.size === most.get(peer).get(seed));
    const parts = (full.length ? full : [...held]).map(([, part]) => part.rows);
    const means = parts.map((part) => mean(part.map((i) => values[i])));
    const [half, basis] = halfOf(means, parts, measure), all = parts.flat();
    const line = { measure, mean: mean(means), half, basis, seeds: parts.length, rows: all.length,
      partial: full.length < most.get(peer).size,
      ...(half >= 0 ? { low: mean(means) - half, high: mean(means) + half } : {}) };
    by.forEach((name, k) => { line[name] = keys[k].values[first]; });
    const pick = (held) => (typeof held[0] === "number" ? mean(held) : held[0] ?? null);
    const known = (name) => all.map((i) => of(name)[i]).filter((value) => value != null);
    for (const name of also) line[name] = pick(known(name));
    return line;
  });
}
// The filter stands in the address, so that a view can be passed on.
const controls = [...document.querySelectorAll("[data-control]")];
const chosen = () => Object.fromEntries(controls.map(({ dataset, value }) => (
  [dataset.control, value])));
const plain = chosen();
let state = plain, passed = [], turn = 0;
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const control of controls) {
    control.value = given.get(control.dataset.control) ?? plain[control.dataset.control];
    if (control.selectedIndex === -1) control.value = plain[control.dataset.control];
  }
}
function passing() {
  state = chosen();
  const kept = Object.entries(state).filter(([name, value]) => value !== plain[name]);
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), role = of("split_role");
  const choices = data.choices.map(([name]) => name).filter((name) => state[name]);
  passed = rows.filter((i) => (role[i] == null || role[i] === state.role)
    && (!state.chosen || of("chosen")[i])
    && choices.every((name) => String(of(name)[i]) === state[name])
    && words.every((w) => data.searched.some((n) => String(of(n)[i]).toLowerCase().includes(w))));
}

function linesOf(view, list) {
  const named = list.filter((i) => view.methods.includes(of("method")[i]));
  if (named.length) list = named;
  const also = view.name === "cost" ? [state.price, ...data.settings] : [];
  const lines = view.values.flatMap((value) => {
    const measure = value || state.measure, options = { peers: view.peers, also };
    if (!data.curves.includes(value)) return summarize(list, view.by, measure, options);
    const curves = of(value), steps = curves.reduce((n, c) => Math.max(n, c?.length ?? 0), 0);
    return Array.from({ length: steps }, (_, step) => summarize(list, ["method"], value,
      { values: curves.map((curve) => curve?.[step]) }).map((line) => ({ ...line, step }))).flat();
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
  const color = getComputedStyle(root).color, held = drawn.get(box);
  const axis = { labelColor: color, titleColor: color, gridColor: color, gridOpacity: 0.1,
    domainOpacity: 0.4, labelLimit: 0, titleLimit: 0 };
  const legend = { labelColor: color, labelLimit: 0, symbolLimit: 0, symbolOpacity: 1,
    columns: box.clientWidth < 500 ? 1 : 3 };
  const config = { background: "transparent", view: { stroke: null }, title: { color },
    text: { color }, rule: { color }, axis, axisX: { tickCount: 6 }, legend };
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
  const shifted = several ? [] : list.filter((i) => of("domain")[i] !== "clean");
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
function csv() {
  const quote = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  const lines = [data.shown.map(title), ...passed.map((i) => data.shown.map((n) => of(n)[i]))];
  const parts = lines.map((line) => `${line.map(quote).join(",")}\n`);
  make("a", { href: URL.createObjectURL(new Blob(parts)), download: "rows.csv" }).click();
}
// DataTables asks for a page at a time, as it would ask a server: it never holds all rows.
function page({ draw, start, length, order }, give) {
  const sorted = [...passed];
  for (const { column, dir } of order) {
    const values = of(data.shown[column]), sign = dir === "desc" ? -1 : 1;
    const below = (a, b) => (b == null) - (a == null) || (a > b) - (a < b);
    sorted.sort((a, b) => sign * below(values[a], values[b]));
  }
  const list = sorted.slice(start, length < 0 ? undefined : start + length);
  give({ draw, recordsTotal: rows.length, recordsFiltered: passed.length,
    data: list.map((i) => data.shown.map((name) => of(name)[i] ?? "")) });
}
let table = null;
function tableOfRows() {
  const escape = jQuery.fn.dataTable.render.text().display;
  const columns = data.shown.map((name) => ({ title: escape(broken(title(name))),
    visible: !data.constant.includes(name), orderSequence: ["asc", "desc", ""],
    createdCell: (cell) => { cell.dataset.label = title(name); },
    render: { display: (value) => (name === "trial" && value ? link(value) : escape(value)) } }));
  const buttons = [{ text: "Download as CSV", action: csv }];
  table = jQuery("#rows").DataTable({ serverSide: true, ajax: page, autoWidth: false, order: [],
    columns, layout: { topStart: "pageLength", topEnd: { buttons } } });
}
// What is on the screen comes first; between the others the page answers its reader.
async function show() {
  const own = ++turn, domain = of("domain");
  passing();
  const ok = passed.filter((i) => of("status")[i] === "ok");
  const shifted = ok.filter((i) => domain[i] !== "clean");
  const panels = { all: ok, clean: ok.filter((i) => domain[i] === "clean"),
    shifted: shifted.length ? shifted : ok };
  $("shown").textContent = `${passed.length} of ${rows.length} rows`;
  const kept = new Set(passed);
  for (const line of document.querySelectorAll("[data-row]")) {
    line.hidden = !kept.has(Number(line.dataset.row));
  }
  for (const view of data.views) {
    for (const panel of view.panels) {
      const box = $(`${view.name}-${panel}`);
      if (box.parentElement.getBoundingClientRect().top > innerHeight) {
        root.dataset.open ??= performance.now().toFixed(0);
        await new Promise((resolve) => { setTimeout(resolve); });
      }
      if (own !== turn) return;
      const lines = linesOf(view, panels[panel]);
      box.parentElement.hidden = !lines.length;
      if (!view.spec) grid(view, box, lines, ok);
      else if (!view.each && lines.length) await chart(view, box, lines);
      else for (const part of box.querySelectorAll("[data-each]")) {
        const held = lines.filter((line) => line[view.each] === part.dataset.each);
        part.hidden = !held.length;
        if (held.length) await chart(view, part.lastElementChild, held);
      }
    }
  }
  if (table) table.draw();
  else tableOfRows();
  root.dataset.ready = performance.now().toFixed(0);
}
let waiting = 0, running = show(readAddress());
const later = () => { turn += 1; running = running.then(show); };
const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(later); };
controls.forEach((control) => control.addEventListener("input", soon));
$("reset").onclick = () => { history.replaceState(null, "", "#"); readAddress(); soon(); };
addEventListener("hashchange", () => { readAddress(); soon(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
