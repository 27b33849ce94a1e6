// The rows that pass the filter, a page at a time: only what is seen is in the document.

const TITLES = {
  error: "error (%)", gain: "gain (points)", num_steps: "steps", cost: "cost (forwards)",
  milliseconds: "ms per image", num_examples: "images", dataset: "data set",
};
const LEADING = [
  "method", "domain", "severity", "seed", "status", "error", "gain", "learning_rate", "num_steps",
];
const TRAILING = [
  "cost", "milliseconds", "seconds", "num_examples", "scope", "dataset", "message", "label",
  "trial",
];
const SIZES = [25, 50, 200];

function titleOf(name) {
  return TITLES[name] || name.replaceAll("_", " ");
}

function hasValue(name) {
  const found = columns[name];
  if (!found) return false;
  if (found.kind === "text") return found.codes.some((code) => code >= 0);
  return found.numbers.some((number) => !Number.isNaN(number));
}

// A column without a value in any row says nothing.
const shownColumns = [...new Set([...LEADING, ...data.settings, ...TRAILING])].filter(hasValue);

function cellText(name, row) {
  const found = columns[name];
  if (found.kind === "text") return textAt(name, row) || GAP;
  const value = found.numbers[row];
  if (name === "error") return percent(value, 2);
  if (name === "gain") return points(value, 2);
  const whole = name === "seed" || name === "num_examples";
  return whole && !Number.isNaN(value) ? String(value) : short(value);
}

function cell(name, row) {
  const text = cellText(name, row);
  const long = name === "label" || name === "message";
  let kind = columns[name].kind === "text" ? "left" : "";
  if (text === GAP) kind += " gap";
  else if (name === "status" && text !== "ok") kind += " worse";
  else if (name === "gain" && columns.gain.numbers[row] < 0) kind += " worse";
  const element = make("td", { class: `${kind}${long ? " clip" : ""}`.trim() || null }, text);
  if (long) element.title = text;
  return element;
}

function heading(name, state, change) {
  const sorted = state.dir === "desc" ? "descending" : "ascending";
  const now = state.sort === name ? sorted : "none";
  const arrow = { ascending: " ▲", descending: " ▼", none: "" }[now];
  const button = make("button", { type: "button", "data-sort": name }, titleOf(name),
    make("span", { "aria-hidden": "true" }, arrow));
  button.onclick = () => {
    // Up, down, then the order of the sweep again.
    const next = { none: [name, "asc"], ascending: [name, "desc"], descending: ["", "asc"] }[now];
    change({ sort: next[0], dir: next[1], page: 0 }, `[data-sort="${name}"]`);
  };
  const kind = columns[name].kind === "text" ? "left" : null;
  return make("th", { scope: "col", "aria-sort": now, class: kind }, button);
}

function pager(rows, state, change) {
  const pages = Math.max(1, Math.ceil(rows / state.size));
  const step = (name, text, to) => {
    const button = make("button", { type: "button", "data-page": name }, text);
    button.disabled = to < 0 || to >= pages || to === state.page;
    button.onclick = () => change({ page: to }, `[data-page="${name}"]`);
    return button;
  };
  const sizes = SIZES.map((n) => make("option", { value: n }, String(n)));
  const size = make("select", { id: "size" }, ...sizes);
  size.value = String(state.size);
  size.onchange = () => change({ size: Number(size.value), page: 0 }, "#size");
  return make("div", { class: "pager" },
    step("first", "First", 0), step("previous", "Previous", state.page - 1),
    make("span", {}, `page ${count(state.page + 1)} of ${count(pages)}`),
    step("next", "Next", state.page + 1), step("last", "Last", pages - 1),
    make("label", {}, "lines ", size));
}

function showTable(rows, state, change) {
  const box = body("table");
  if (!rows.length) return box.replaceChildren(quiet("No row passes the filter."));
  const sorted = state.sort ? ordered(rows, state.sort, state.dir === "desc") : rows;
  state.page = Math.min(state.page, Math.ceil(rows.length / state.size) - 1);
  const first = state.page * state.size;
  const line = (row) => make("tr", {}, ...shownColumns.map((name) => cell(name, row)));
  const heads = shownColumns.map((name) => heading(name, state, change));
  const lines = sorted.slice(first, first + state.size).map(line);
  const old = box.querySelector(".scroll");
  const left = old ? old.scrollLeft : 0;
  const scroll = scrollingTable("Rows; scrolls sideways", heads, lines, "rows");
  box.replaceChildren(scroll, pager(rows.length, state, change));
  scroll.scrollLeft = left;
}
