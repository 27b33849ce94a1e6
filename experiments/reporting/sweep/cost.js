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
  for (const one of found.values()) {
    one.gain /= one.rows;
    one.price /= one.rows;
  }
  return [...found.values()];
}

function describe(one) {
  const settings = [...data.settings, "num_steps"]
    .map((name) => [titleOf(name), cellText(name, one.row)])
    .filter(([, text]) => text !== GAP).map(([name, text]) => `${name} ${text}`);
  const measured = [`gain ${points(one.gain, 2)} points`, `cost ${short(one.price)}`];
  const name = columns.method.values[one.method];
  return [name, ...settings, ...measured, plural(one.rows, "row")].join(", ");
}

// Powers of ten, with their doubles and halves where the range is short.
function logTicks(low, high) {
  const values = [];
  for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) {
    for (const m of high / low < 200 ? [1, 2, 5] : [1]) {
      values.push(Number((m * 10 ** k).toPrecision(6)));
    }
  }
  return values.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

const SPACE = { left: 56, right: 16, top: 12, bottom: 44 };

// {marks, at(value)} of the upright axis, which always shows zero.
function gainAxis(found, height) {
  const gains = [0, ...found.map((one) => 100 * one.gain)];
  const marks = ticks(lowest(gains), highest(gains));
  const low = marks[0], high = marks[marks.length - 1], room = height - SPACE.top - SPACE.bottom;
  return { marks, at: (value) => height - SPACE.bottom - ((value - low) / (high - low)) * room };
}

// {marks, at(value)} of the level axis: logarithmic where costs differ much.
function priceAxis(found, width) {
  const prices = found.map((one) => one.price);
  const low = lowest(prices), high = highest(prices);
  const room = width - SPACE.left - SPACE.right;
  const between = (from, to, scale) => (value) =>
    SPACE.left + ((scale(value) - scale(from)) / (scale(to) - scale(from))) * room;
  if (low > 0 && high > 8 * low) {
    return { marks: logTicks(low, high), at: between(low / 1.15, high * 1.15, Math.log) };
  }
  const marks = high > low ? ticks(low, high) : ticks(0, 2 * high);
  return { marks, at: between(marks[0], marks[marks.length - 1], (value) => value) };
}

function drawAxes(context, down, across, width, height, price) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  context.font = "12px system-ui, sans-serif";
  context.textAlign = "right";
  for (const value of down.marks) {
    context.strokeStyle = color(value === 0 ? "--grey" : "--rule");
    context.beginPath();
    context.moveTo(SPACE.left, down.at(value));
    context.lineTo(width - SPACE.right, down.at(value));
    context.stroke();
    context.fillStyle = color("--muted");
    context.fillText(short(value).replace("-", "−"), SPACE.left - 8, down.at(value) + 4);
  }
  context.textAlign = "center";
  for (const value of across.marks) {
    context.fillText(short(value), across.at(value), height - SPACE.bottom + 18);
  }
  context.fillStyle = color("--fg");
  const title = width > 560 ? COSTS[price] : titleOf(price);
  context.fillText(title, (SPACE.left + width - SPACE.right) / 2, height - 8);
  context.translate(14, (SPACE.top + height - SPACE.bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.fillText("gain (points)", 0, 0);
}

function drawCost(found, price, width) {
  const height = 360, amount = plural(found.length, "point");
  const label = `Gain against ${COSTS[price]}, ${amount}; the table below has the means`;
  const [element, context] = canvas(width, height, label);
  const down = gainAxis(found, height), across = priceAxis(found, width);
  context.save();
  drawAxes(context, down, across, width, height, price);
  context.restore();
  const many = found.length > 300;
  context.globalAlpha = many ? 0.55 : 0.9;
  const colors = columns.method.values.map((_, method) => colorOf(method));
  for (const one of found) {
    context.fillStyle = colors[one.method];
    one.x = across.at(one.price);
    one.y = down.at(100 * one.gain);
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
    if (!found.has(methods[i])) {
      found.set(methods[i], { means: new SeedMeans(), worse: 0, costs: [], times: [] });
    }
    const one = found.get(methods[i]);
    one.means.add(seeds[i], gains[i]);
    one.worse += gains[i] < 0 ? 1 : 0;
    one.costs.push(costs[i]);
    one.times.push(times[i]);
  }
  return [...found].sort((a, b) => a[0] - b[0]);
}

function costTable(lines) {
  const heads = ["method", "rows", "gain (points)", "rows made worse", "median cost (forwards)",
    "median ms per image"];
  const rows = lines.map(([method, one]) => {
    const stat = one.means.stat();
    const spread = stat.stderr === null ? "" : ` ± ${percent(stat.stderr)}`;
    return make("tr", {},
      make("th", { scope: "row" }, swatch(method), " ", columns.method.values[method]),
      make("td", {}, count(stat.rows)),
      make("td", { class: points(stat.mean).startsWith("−") ? "worse" : null }, points(stat.mean),
        make("span", { class: "muted" }, spread)),
      make("td", {}, `${percent(one.worse / stat.rows, 0)} %`),
      make("td", {}, short(median(one.costs))), make("td", {}, short(median(one.times))));
  });
  return scrollingTable("Gain and cost of every method", heads.map((text) => head(text)), rows);
}

function priceChoice(state, change) {
  const options = Object.keys(COSTS).map((name) => make("option", { value: name }, titleOf(name)));
  const select = make("select", { id: "price" }, ...options);
  select.value = state.price;
  select.onchange = () => change({ price: select.value }, "#price");
  return make("label", {}, "cost as ", select);
}

function costFigure(found, state, width) {
  if (!found.length) return quiet("No row that passes the filter has this cost.");
  const amount = plural(found.length, "choice");
  const says = make("figcaption", {}, `${amount} of settings. Point at a mark to read what it is.`);
  const element = drawCost(found, state.price, Math.max(280, Math.min(900, width)));
  follow(element, found, says);
  return make("figure", {}, element, says);
}

function showCost(rows, state, change) {
  const box = body("cost");
  const lines = costLines(rows);
  const errors = numbersOf("error"), gains = numbersOf("gain");
  const lost = rows.filter((i) => !Number.isNaN(errors[i]) && Number.isNaN(gains[i])).length;
  const why = "left out: nothing says what the model itself does there.";
  const left = lost ? quiet(`${plural(lost, "row")} ${why}`) : "";
  if (!lines.length) {
    return box.replaceChildren(quiet("No row that passes the filter has a gain."), left);
  }
  const figure = costFigure(costPoints(rows, state.price), state, box.clientWidth);
  box.replaceChildren(priceChoice(state, change), figure, costTable(lines), left);
}
