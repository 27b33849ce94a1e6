// Mean error per learning rate and number of steps, a map per method, all on one color scale.

// More different values than this are put into bins of equal width (of the logarithm, if positive).
const MOST_VALUES = 14;
const BINS = 10;

// Places of values on an axis: {labels, at(value)}.
function axis(values) {
  const sorted = [...new Set(values)].sort((a, b) => a - b);
  if (sorted.length <= MOST_VALUES) {
    const places = new Map(sorted.map((value, k) => [value, k]));
    return { labels: sorted.map(short), at: (value) => places.get(value) };
  }
  const scale = sorted[0] > 0 ? Math.log : (value) => value;
  const back = sorted[0] > 0 ? Math.exp : (value) => value;
  const low = scale(sorted[0]), width = (scale(sorted[sorted.length - 1]) - low) / BINS;
  const edge = (k) => String(Number(back(low + k * width).toPrecision(2)));
  return {
    labels: Array.from({ length: BINS }, (_, k) => `${edge(k)} to ${edge(k + 1)}`),
    at: (value) => Math.min(BINS - 1, Math.floor((scale(value) - low) / width)),
  };
}

function cellKey(down, across) {
  return down * 1000 + across;
}

function heatMaps(rows) {
  const methods = codesOf("method"), errors = numbersOf("error");
  const rates = numbersOf("learning_rate"), steps = numbersOf("num_steps");
  const byMethod = new Map();
  for (const i of rows) {
    if (Number.isNaN(errors[i]) || Number.isNaN(rates[i]) || Number.isNaN(steps[i])) continue;
    if (!byMethod.has(methods[i])) byMethod.set(methods[i], []);
    byMethod.get(methods[i]).push(i);
  }
  const maps = [];
  for (const [method, own] of [...byMethod].sort((a, b) => a[0] - b[0])) {
    const down = axis(own.map((i) => rates[i])), across = axis(own.map((i) => steps[i]));
    const cells = new Map();
    for (const i of own) {
      const key = cellKey(down.at(rates[i]), across.at(steps[i]));
      if (!cells.has(key)) cells.set(key, { sum: 0, rows: 0, places: new Set() });
      const one = cells.get(key);
      one.sum += errors[i];
      one.rows += 1;
      one.places.add(data.place[i]);
    }
    const most = Math.max(...[...cells.values()].map((one) => one.places.size));
    for (const one of cells.values()) {
      one.mean = one.sum / one.rows;
      one.partial = one.places.size < most;
    }
    maps.push({ name: columns.method.values[method], down, across, cells });
  }
  return maps;
}

function heatCell(one, low, high, best) {
  if (!one) return make("td", { class: "gap" }, GAP);
  const share = high > low ? (one.mean - low) / (high - low) : 0;
  // Where black and white ink are equally legible, on the scale of the light page and of the dark.
  const ink = share > 0.74 ? " far" : share > 0.51 ? " middle" : "";
  const td = make("td", { class: `heat${ink}${best ? " lowest" : ""}` },
    percent(one.mean) + (one.partial ? "†" : ""), make("small", {}, `n ${count(one.rows)}`));
  td.style.setProperty("--share", `${Math.round(100 * share)}%`);
  return td;
}

function heatTable(map, low, high, role) {
  // Only validation rows may choose; a mean over fewer domains or seeds is no lower error.
  const full = [...map.cells.values()].filter((one) => !one.partial).map((one) => one.mean);
  const best = role === "validation" && full.length > 1 ? Math.min(...full) : null;
  const line = (text, d) => make("tr", {}, make("th", { scope: "row" }, text),
    ...map.across.labels.map((_, a) => {
      const one = map.cells.get(cellKey(d, a));
      return heatCell(one, low, high, one && !one.partial && one.mean === best);
    }));
  const label = `${map.name}: mean error by learning rate and steps`;
  const heads = ["rate \\ steps", ...map.across.labels].map((text) => head(text));
  return make("figure", { class: "map" }, make("h3", {}, map.name),
    scrollingTable(label, heads, map.down.labels.map(line)));
}

function showHeat(rows, state) {
  const maps = heatMaps(rows);
  const box = body("heat");
  if (!maps.length) {
    return box.replaceChildren(quiet("No row that passes the filter has a learning rate."));
  }
  const means = maps.flatMap((map) => [...map.cells.values()].map((one) => one.mean));
  const low = Math.min(...means), high = Math.max(...means);
  const framed = state.role === "validation" ? "framed: the lowest of a method" : "";
  box.replaceChildren(
    make("div", { class: "legend" }, `${percent(low)} %`,
      make("span", { class: "ramp", "aria-hidden": "true" }), `${percent(high)} %`,
      make("span", { class: "quiet" }, framed)),
    make("div", { class: "maps" }, ...maps.map((map) => heatTable(map, low, high, state.role))));
}
