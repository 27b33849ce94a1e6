// What adapting gains against what it costs: a point per method and settings, a line per method.

const COSTS = {
  cost: "cost of one prediction (plain forwards; a backward counts as two)",
  milliseconds: "milliseconds per image, as measured",
};

function costPoints(rows, price) {
  const methods = codesOf("method"), gains = numbersOf("gain"), prices = numbersOf(price);
  const found = new Map();
  for (const i of rows) {
    if (Number.isNaN(gains[i]) || Number.isNaN(prices[i]) || methods[i] < 0) continue;
    const key = methods[i] * total + data.setting[i];
    if (!found.has(key)) found.set(key, { method: methods[i], row: i, gain: 0, price: 0, rows: 0 });
    const one = found.get(key);
    one.gain += gains[i];
    one.price += prices[i];
    one.rows += 1;
  }
  return [...found.values()].map((one) => ({ ...one, gain: one.gain / one.rows, price: one.price / one.rows }));
}

function describe(one) {
  const settings = data.settings.concat("num_steps").map((name) => [titleOf(name), cellText(name, one.row)]);
  const known = settings.filter(([, text]) => text !== GAP).map(([name, text]) => `${name} ${text}`);
  return [columns.method.values[one.method], ...known, `gain ${points(one.gain, 2)} points`, `cost ${short(one.price)}`, plural(one.rows, "row")].join(", ");
}

// Powers of ten and their halves and fifths inside [low, high]; at most about eight.
function logTicks(low, high) {
  const values = [];
  for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) {
    for (const m of high / low < 200 ? [1, 2, 5] : [1]) values.push(Number((m * 10 ** k).toPrecision(6)));
  }
  return values.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

function drawCost(found, price, width) {
  const height = 360, left = 56, right = 16, top = 12, bottom = 44;
  const label = `Gain against ${COSTS[price]}, ${plural(found.length, "point")}; the table below has the means`;
  const [element, context] = canvas(width, height, label);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const gains = found.map((one) => 100 * one.gain), prices = found.map((one) => one.price);
  const low = gains.reduce((a, b) => Math.min(a, b), 0), high = gains.reduce((a, b) => Math.max(a, b), 0);
  const marks = ticks(low, high);
  const cheapest = prices.reduce((a, b) => Math.min(a, b)), dearest = prices.reduce((a, b) => Math.max(a, b));
  const log = cheapest > 0 && dearest > 8 * cheapest;
  const across = log ? logTicks(cheapest, dearest) : dearest > cheapest ? ticks(cheapest, dearest) : ticks(0, 2 * dearest);
  const scale = log ? Math.log : (value) => value;
  const from = scale(log ? cheapest / 1.15 : across[0]), to = scale(log ? dearest * 1.15 : across[across.length - 1]);
  const atX = (value) => left + ((scale(value) - from) / (to - from)) * (width - left - right);
  const atY = (value) => height - bottom - ((value - marks[0]) / (marks[marks.length - 1] - marks[0])) * (height - top - bottom);
  context.font = "12px system-ui, sans-serif";
  context.lineWidth = 1;
  for (const value of marks) {
    context.strokeStyle = color(value === 0 ? "--grey" : "--rule");
    context.beginPath();
    context.moveTo(left, atY(value));
    context.lineTo(width - right, atY(value));
    context.stroke();
    context.fillStyle = color("--muted");
    context.textAlign = "right";
    context.fillText(short(value).replace("-", "−"), left - 8, atY(value) + 4);
  }
  context.textAlign = "center";
  for (const value of across) context.fillText(short(value), atX(value), height - bottom + 18);
  context.fillStyle = color("--fg");
  context.fillText(width > 560 ? COSTS[price] : titleOf(price), (left + width - right) / 2, height - 8);
  context.save();
  context.translate(14, (top + height - bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.fillText("gain (points)", 0, 0);
  context.restore();
  const many = found.length > 300;
  context.globalAlpha = many ? 0.55 : 0.9;
  const colors = new Map();
  for (const one of found) {
    if (!colors.has(one.method)) colors.set(one.method, colorOf(one.method));
    context.fillStyle = colors.get(one.method);
    one.x = atX(one.price);
    one.y = atY(100 * one.gain);
    drawMark(context, one.x, one.y, one.method % SHAPES, many ? 2.5 : 4.5);
  }
  return element;
}

// Names the point under the pointer; all it says is in the table of rows, too.
function follow(element, found, says) {
  const text = says.textContent;
  element.onpointermove = (event) => {
    const box = element.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let nearest = null, best = 15 ** 2;
    for (const one of found) {
      const far = (one.x - x) ** 2 + (one.y - y) ** 2;
      if (far < best) { best = far; nearest = one; }
    }
    says.textContent = nearest ? describe(nearest) : text;
  };
  element.onpointerleave = () => { says.textContent = text; };
}

function costLines(rows) {
  const methods = codesOf("method"), gains = numbersOf("gain"), seeds = numbersOf("seed");
  const costs = numbersOf("cost"), times = numbersOf("milliseconds");
  const found = new Map();
  for (const i of rows) {
    if (Number.isNaN(gains[i]) || methods[i] < 0) continue;
    if (!found.has(methods[i])) found.set(methods[i], { means: new SeedMeans(), worse: 0, costs: [], times: [] });
    const one = found.get(methods[i]);
    one.means.add(seeds[i], gains[i]);
    one.worse += gains[i] < 0 ? 1 : 0;
    one.costs.push(costs[i]);
    one.times.push(times[i]);
  }
  return [...found].sort((a, b) => a[0] - b[0]);
}

function costTable(lines) {
  const heads = ["method", "rows", "gain (points)", "rows made worse", "median cost (forwards)", "median ms per image"];
  const rows = lines.map(([method, one]) => {
    const stat = one.means.stat();
    const spread = stat.stderr === null ? "" : ` ± ${percent(stat.stderr)}`;
    return make("tr", {}, make("th", { scope: "row" }, swatch(method), " ", columns.method.values[method]),
      make("td", {}, count(stat.rows)),
      make("td", { class: stat.mean < 0 ? "worse" : null }, points(stat.mean), make("span", { class: "muted" }, spread)),
      make("td", {}, `${percent(one.worse / stat.rows, 0)} %`),
      make("td", {}, short(median(one.costs))), make("td", {}, short(median(one.times))));
  });
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Gain and cost of every method" },
    make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...rows)));
}

function showCost(rows, state, change) {
  const box = body("cost");
  const lines = costLines(rows);
  const errors = numbersOf("error"), gains = numbersOf("gain");
  const lost = rows.filter((i) => !Number.isNaN(errors[i]) && Number.isNaN(gains[i])).length;
  const left = lost ? quiet(`${plural(lost, "row")} left out: nothing says what the model itself does there.`) : "";
  if (!lines.length) return box.replaceChildren(quiet("No row that passes the filter has a gain."), left);
  const select = make("select", { id: "price" }, ...Object.keys(COSTS).map((name) => make("option", { value: name }, titleOf(name))));
  select.value = state.price;
  select.onchange = () => change({ price: select.value }, "#price");
  const found = costPoints(rows, state.price);
  const parts = [make("label", {}, "cost as ", select)];
  if (found.length) {
    const says = make("figcaption", {}, `${plural(found.length, "choice")} of settings. Point at a mark to read what it is.`);
    const element = drawCost(found, state.price, Math.max(280, Math.min(900, box.clientWidth)));
    follow(element, found, says);
    parts.push(make("figure", {}, element, says));
  } else parts.push(quiet("No row that passes the filter has this cost."));
  box.replaceChildren(...parts, costTable(lines), left);
}
