// Joins the kept libraries: the filter, the means of intervals.py, vega's charts, DataTables.
const $ = (id) => document.getElementById(id), root = document.documentElement;
const packed = Uint8Array.from(atob($("data").textContent), (letter) => letter.charCodeAt(0));
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
function halfOf(parts, measure) {
  const t = data.t95[parts.length - 2] || 1.96, draws = data.replicates[measure];
  const whole = draws && parts.every((part) => part.rows.every((i) => draws[i]));
  const drawn = whole ? draws[parts[0].rows[0]].map((_, r) => (
    mean(parts.map((part) => mean(part.rows.map((i) => draws[i][r])))))) : [NaN];
  const own = parts.map((part) => (whole || parts.length > 2 ? part.mean : NaN));
  const halves = [t * deviation(own) / Math.sqrt(own.length), 1.96 * deviation(drawn)];
  const over = ["seeds", "instances"].filter((_, k) => halves[k] >= 0).join(" and ");
  const half = over ? Math.hypot(...halves.map((part) => part || 0)) : NaN;
  return { half, basis: over || data.words[0], within: whole ? halves[1] : half || 0 };
}
const axis = (name) => columns.get(["across", "down"].includes(name) ? state[name] : name);
function grouped(list, names, row = (item) => item.rows[0]) {
  const held = names.map(axis), key = (i) => (
    held.reduce((all, { codes, size }) => all * size + codes[i] + 1, 0));
  return [...Map.groupBy(list, (item) => key(row(item))).values()];
}
// As summarize of intervals.py.
function summarize(list, by, measure, { peers = [], values = of(measure), more = {} } = {}) {
  const keys = by.map(axis), places = axis("place").codes, prices = of(state.price);
  const known = list.filter((i) => values[i] != null && keys.every(({ codes }) => codes[i] >= 0));
  const parts = grouped(known, [...by, "seed"], (i) => i).map((part) => ({ rows: part,
    mean: mean(part.map((i) => values[i])), places: new Set(part.map((i) => places[i])).size }));
  for (const seeds of grouped(parts, peers).map((rivals) => grouped(rivals, ["seed"]))) {
    for (const same of seeds) {
      const most = Math.max(...same.map((part) => part.places)), count = seeds.length;
      for (const part of same) Object.assign(part, { full: part.places === most, seeds: count });
    }
  }
  return grouped(parts, by).map((group) => {
    const full = group.filter((part) => part.full), kept = full.length ? full : group;
    const { half, basis, within } = halfOf(kept, measure), all = kept.flatMap((p) => p.rows);
    const middle = mean(kept.map((part) => part.mean)), { differences, words } = data;
    const chance = measure === data.primary ? mean(all.map((i) => of("chance")?.[i] ?? NaN)) : NaN;
    const unseen = differences.includes(measure) && Math.abs(middle) <= half;
    const remark = unseen ? words[1] : middle + within >= chance ? words[2] : "";
    return { measure, mean: middle, half, basis, remark, seeds: kept.length, rows: all.length,
      partial: full.length < group[0].seeds, settings: of("settings")?.[all[0]],
      price: prices && mean(all.map((i) => prices[i]).filter((price) => price != null)),
      ...(half >= 0 ? { low: middle - half, high: middle + half } : {}), ...more,
      ...Object.fromEntries(by.map((name, k) => [name, keys[k].values[all[0]]])) };
  });
}
// The filter stands in the address, so that a view can be passed on.
const form = $("filter"), chosen = () => Object.fromEntries(new FormData(form));
const plain = chosen();
let state = plain, passed = new Set(), turn = 0, table = null;
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const control of form.querySelectorAll("[name]")) {
    control.value = given.get(control.name) ?? plain[control.name];
    if (control.selectedIndex === -1) control.value = plain[control.name];
  }
}
function passing() {
  state = chosen();
  const changed = Object.entries(state).filter(([name, value]) => value !== plain[name]);
  history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), role = of("split_role");
  const choices = data.choices.map(([name]) => name).filter((name) => state[name]);
  passed = new Set(rows.filter((i) => (role[i] == null || role[i] === state.role)
    && (!state.chosen || of("chosen")[i])
    && choices.every((name) => String(of(name)[i]) === state[name])
    && words.every((w) => data.searched.some((n) => String(of(n)[i]).toLowerCase().includes(w)))));
}

function linesOf(view, list) {
  const named = list.filter((i) => view.methods.includes(of("method")[i]));
  if (named.length) list = named;
  const lines = view.values.flatMap((value) => {
    const { by, peers } = view;
    if (!data.curves.includes(value)) return summarize(list, by, value || state.measure, { peers });
    const curves = of(value), steps = curves.reduce((n, c) => Math.max(n, c?.length ?? 0), 0);
    return Array.from({ length: steps }, (_, step) => summarize(list, ["method"], value,
      { values: curves.map((curve) => curve?.[step]), more: { step } })).flat();
  });
  const low = Math.min(...lines.map((line) => line.mean));
  const range = Math.max(...lines.map((line) => line.mean)) - low || 1;
  return lines.map((line) => ({ ...line, role: state.role, share: (line.mean - low) / range }));
}

const drawn = new Map();
async function chart(view, box, lines) {
  const names = { ...state, curve: view.values[0], color: getComputedStyle(root).color };
  const methods = data.methods.filter((method) => lines.some((line) => line.method === method));
  const text = JSON.stringify(view.spec)
    .replace(/"__methods__"/g, methods.map((name) => JSON.stringify(name)).join())
    .replace(/__(\w+?)__/g, (_, name) => JSON.stringify(title(names[name])).slice(1, -1));
  const held = drawn.get(box);
  if (held?.text === text) return held.view.data("rows", lines).runAsync();
  held?.view.finalize();
  const spec = { ...JSON.parse(text), datasets: { rows: lines } };
  return drawn.set(box, { text, view: (await vegaEmbed(box, spec)).view });
}

// Methods down, domains or measures across; on a phone every cell names its column.
function grid(view, box, lines, list) {
  const { column } = view, several = column === "measure";
  const shifted = several ? [] : list.filter((i) => of("domain")[i] !== "clean");
  const more = { domain: "mean" };
  const all = [...lines, ...summarize(shifted, ["method"], state.measure, { more })];
  const names = view.columns.filter((name) => all.some((line) => line[column] === name));
  const full = all.filter((line) => !several && state.measure === data.primary && !line.partial);
  const cell = (line, name) => {
    if (!line) return make("td", { "data-label": title(name) }, "–");
    const rivals = full.filter((one) => one[column] === name).map((one) => one.mean);
    const [low, high] = [Math.min(...rivals) + 1e-9, Math.max(...rivals)];
    const marked = full.includes(line) && !line.remark && line.mean <= low && low < high;
    const half = line.half >= 0 ? ` ± ${number(line.half, line.measure)}` : "";
    return make("td", { "data-label": title(name), class: marked ? "low" : line.remark && "weak",
      title: `${line.mean}; ${line.basis}; rows: ${line.rows}` }, number(line.mean, line.measure)
      + (line.partial ? "†" : ""), make("small", {}, half + (line.remark && `\n${line.remark}`)));
  };
  const present = (methods) => methods.filter((m) => all.some((line) => line.method === m));
  const body = data.groups.flatMap(([group, methods]) => present(methods).flatMap((method, k) => {
    const heading = make("tr", { class: "group" }, make("td", { colspan: all.length }, group));
    const own = all.filter((line) => line.method === method);
    const cells = names.map((name) => cell(own.find((line) => line[column] === name), name));
    const line = make("tr", {}, make("th", { scope: "row" }, broken(method)), ...cells);
    return k ? [line] : [heading, line];
  }));
  const head = ["method", ...names].map((name) => make("th", {}, broken(title(name))));
  box.replaceChildren(make("table", { class: "grid" }, make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...body)));
}

const link = (trial) => make("a", { href: data.logs[trial] }, trial).outerHTML;
function csv() {
  const quote = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  const lines = Array.from(passed, (i) => data.shown.map((name) => of(name)[i]));
  const parts = [data.shown.map(title), ...lines].map((line) => `${line.map(quote).join(",")}\n`);
  make("a", { href: URL.createObjectURL(new Blob(parts)), download: "rows.csv" }).click();
}
function tableOfRows() {
  const escape = jQuery.fn.dataTable.render.text().display;
  const columns = data.shown.map((name, k) => ({ ...data.table[k],
    title: escape(broken(title(name))), data: (i) => of(name)[i] ?? "",
    createdCell: (cell) => { cell.dataset.label = title(name); },
    render: { display: (value) => (name === "trial" && value ? link(value) : escape(value)) } }));
  return jQuery("#rows").DataTable({ data: rows, autoWidth: false, order: [], columns, layout: {
    topStart: "pageLength", topEnd: { buttons: [{ text: "Download as CSV", action: csv }] } } })
    .search.fixed("filter", (_, i) => passed.has(i));
}
// What is on the screen comes first; between the others the page answers its reader.
async function show() {
  const own = ++turn, clean = (i) => of("domain")[i] === "clean";
  passing();
  const ok = [...passed].filter((i) => of("status")[i] === "ok");
  const shifted = ok.filter((i) => !clean(i));
  const panels = { all: ok, clean: ok.filter(clean), shifted: shifted.length ? shifted : ok };
  $("shown").textContent = `${passed.size} of ${rows.length} rows`;
  document.querySelectorAll("[data-row]").forEach((line) => (
    line.toggleAttribute("hidden", !passed.has(Number(line.dataset.row)))));
  for (const view of data.views) {
    const panel = $(`${view.name}-${view.panel}`);
    const below = panel.getBoundingClientRect().top > innerHeight;
    if (below) await new Promise((resolve) => { setTimeout(resolve); });
    if (own !== turn) return;
    const lines = linesOf(view, panels[view.panel]);
    for (const box of panel.querySelectorAll(".view")) {
      const held = lines.filter((line) => !view.each || line[view.each] === box.dataset.each);
      box.parentElement.hidden = !held.length;
      if (held.length) await (view.spec ? chart : grid)(view, box, held, ok);
    }
  }
  (table ??= tableOfRows()).draw();
  root.dataset.ready = performance.now().toFixed(0);
}
let waiting = 0, running = show(readAddress());
const later = () => { turn += 1; running = running.then(show); };
const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(later); };
["input", "reset"].forEach((kind) => form.addEventListener(kind, soon));
addEventListener("hashchange", () => { readAddress(); soon(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
