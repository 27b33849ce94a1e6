// Small parts of every view. Texts enter the page as text alone: labels and messages are anyone's.

const GAP = "–";
const SHAPES = 4;
const COLORS = 8;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function body(section) {
  return document.querySelector(`#${section} [data-body]`);
}

function quiet(text) {
  return make("p", { class: "quiet" }, text);
}

// A table in a box of its own, which scrolls sideways where the page is narrow.
function scrollingTable(label, heads, lines, kind = null) {
  const table = make("table", { class: kind }, make("thead", {}, make("tr", {}, ...heads)),
    make("tbody", {}, ...lines));
  const box = { class: "scroll", tabindex: "0", role: "region", "aria-label": label };
  return make("div", box, table);
}

function head(text, kind = null) {
  return make("th", { scope: "col", class: kind }, text);
}

function percent(value, digits = 1) {
  return Number.isNaN(value) ? GAP : (100 * value).toFixed(digits);
}

function points(value, digits = 1) {
  if (Number.isNaN(value)) return GAP;
  const text = (100 * Math.abs(value)).toFixed(digits);
  return Number(text) === 0 ? text : (value < 0 ? "−" : "+") + text;
}

// Four digits, as few characters as they need.
function short(value) {
  return Number.isNaN(value) ? GAP : String(Number(value.toPrecision(4)));
}

function count(number) {
  return number.toLocaleString("en-US");
}

function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

// Not Math.min(...values): a call takes only so many arguments.
function lowest(values) {
  return values.reduce((a, b) => Math.min(a, b), Infinity);
}

function highest(values) {
  return values.reduce((a, b) => Math.max(a, b), -Infinity);
}

// Round values that cover [low, high], in steps of 1, 2 or 5 times a power of ten.
function ticks(low, high, about = 5) {
  if (!(high > low)) high = low + (Math.abs(low) || 1);
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((one) => one >= rough * (1 - 1e-9));
  const values = [];
  for (let k = Math.floor(low / step + 1e-9); k <= Math.ceil(high / step - 1e-9); k++) {
    values.push(Number((k * step).toPrecision(10)));
  }
  return values;
}

// Grey is for the model itself; methods that adapt share the other colors.
function colorOf(method) {
  const name = columns.method.values[method];
  const place = columns.method.values.filter((one) => !data.baselines.includes(one)).indexOf(name);
  const styles = getComputedStyle(document.documentElement);
  return styles.getPropertyValue(`--m${place < 0 ? 0 : 1 + (place % (COLORS - 1))}`).trim();
}

// One mark around (x, y); the shape says the method too, for those who tell few colors apart.
function drawMark(context, x, y, shape, r) {
  context.beginPath();
  if (shape === 0) context.arc(x, y, r, 0, 2 * Math.PI);
  else if (shape === 1) context.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8);
  else {
    const diamond = [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]];
    const corners = shape === 2 ? diamond : [[0, -1.25], [1.2, 0.9], [-1.2, 0.9]];
    corners.forEach(([dx, dy], k) => context[k ? "lineTo" : "moveTo"](x + dx * r, y + dy * r));
    context.closePath();
  }
  context.fill();
}

// A canvas as sharp as the screen, with a drawing context in CSS pixels.
function canvas(width, height, label) {
  const scale = window.devicePixelRatio || 1;
  const element = make("canvas", { role: "img", "aria-label": label });
  element.width = Math.round(width * scale);
  element.height = Math.round(height * scale);
  element.style.width = `${width}px`;
  element.style.height = `${height}px`;
  const context = element.getContext("2d");
  context.scale(scale, scale);
  return [element, context];
}

function swatch(method) {
  const [element, context] = canvas(12, 12, "");
  element.setAttribute("aria-hidden", "true");
  context.fillStyle = colorOf(method);
  drawMark(context, 6, 6, Math.max(method, 0) % SHAPES, 4);
  return element;
}
