// The filter, which is kept in the address so that a view can be passed on, and the views.

const CHOICES = ["method", "dataset", "domain", "severity", "seed", "status",
  ...new Set(["learning_rate", "num_steps", ...data.settings])];
const MOST_CHOICES = 80;
const PLAIN = {
  q: "", role: "reported", sort: "", dir: "asc", page: 0, size: 25, price: "cost", chosen: false,
};
const CHOSEN = "Of each method only the settings with the lowest mean error on validation rows.";
const NOTES = {
  reported: "Reported rows. Nothing is to be chosen from them; validation rows choose settings.",
  validation: "Validation rows. Settings may be chosen on them; their errors are no result.",
};

let state = { ...PLAIN, choice: {} };

// Different values of a column, where they are few enough to choose from and not one alone.
function choicesOf(name) {
  const found = column(name);
  const present = found.kind === "text" ? found.values
    : [...new Set(found.numbers)].filter((value) => !Number.isNaN(value)).sort((a, b) => a - b);
  return present.length > 1 && present.length <= MOST_CHOICES ? present.map(String) : null;
}

const choices = Object.create(null);
for (const name of CHOICES) {
  const values = choicesOf(name);
  // A setting that is called like a part of the address has no control; the search finds it.
  if (values && !Object.hasOwn(PLAIN, name)) choices[name] = values;
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const next = { ...PLAIN, choice: {} };
  for (const [key, value] of given) {
    if (choices[key] && choices[key].includes(value)) next.choice[key] = value;
    else if (key === "role" && Object.hasOwn(NOTES, value)) next.role = value;
    else if (key === "q") next.q = value;
    else if (key === "sort" && shownColumns.includes(value)) next.sort = value;
    else if (key === "dir" && value === "desc") next.dir = value;
    else if (key === "page") next.page = Math.max(0, Math.floor(Number(value)) - 1 || 0);
    else if (key === "size" && SIZES.includes(Number(value))) next.size = Number(value);
    else if (key === "price" && Object.hasOwn(COSTS, value)) next.price = value;
    else if (key === "chosen") next.chosen = value === "1";
  }
  return next;
}

function writeHash() {
  const kept = new URLSearchParams();
  const shown = { ...state, page: state.page + 1, chosen: "1" };
  for (const [key, plain] of Object.entries(PLAIN)) {
    if (state[key] !== plain) kept.set(key, shown[key]);
  }
  for (const [key, value] of Object.entries(state.choice)) kept.set(key, value);
  const hash = kept.toString();
  const here = location.pathname + location.search;
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : here);
}

// The controls are made once; setControls brings them to the state.
const controls = {};

function labelled(text, control, kind) {
  return make("label", { class: kind }, make("span", {}, text), control);
}

function choiceControl(name, values) {
  const shown = (value) => (columns[name].kind === "number" ? short(Number(value)) : value);
  const options = values.map((value) => make("option", { value }, shown(value)));
  const all = make("option", { value: "" }, "all");
  const select = make("select", { id: `choice-${name}` }, all, ...options);
  select.onchange = () => {
    const choice = { ...state.choice, [name]: select.value };
    if (!select.value) delete choice[name];
    change({ choice, page: 0 });
  };
  return select;
}

function makeFilter() {
  const roles = Object.keys(NOTES).map((role) => make("option", { value: role }, `${role} rows`));
  controls.role = make("select", { id: "role" }, ...roles);
  controls.role.onchange = () => change({ role: controls.role.value, page: 0 });
  controls.q = make("input", { id: "q", type: "search", autocomplete: "off",
    placeholder: "words in label, trial, message, …" });
  controls.q.oninput = () => change({ q: controls.q.value, page: 0 });
  const form = document.getElementById("filter");
  form.append(labelled("show", controls.role), labelled("search", controls.q, "wide"));
  for (const [name, values] of Object.entries(choices)) {
    controls[name] = choiceControl(name, values);
    form.append(labelled(titleOf(name), controls[name]));
  }
  controls.chosen = make("input", { id: "chosen", type: "checkbox" });
  controls.chosen.onchange = () => change({ chosen: controls.chosen.checked, page: 0 });
  if (column("split_role").values.includes("validation")) {
    form.append(make("label", { class: "check", title: CHOSEN }, controls.chosen,
      "only settings chosen on validation"));
  }
  const reset = make("button", { type: "button", id: "reset" }, "Reset");
  reset.onclick = () => change({ ...PLAIN, choice: {}, size: state.size });
  form.append(reset);
  form.onsubmit = (event) => event.preventDefault();
}

function setControls() {
  // Never while someone types: the caret would jump.
  if (controls.q.value !== state.q) controls.q.value = state.q;
  controls.role.value = state.role;
  controls.chosen.checked = state.chosen;
  for (const name of Object.keys(choices)) {
    controls[name].value = state.choice[name] || "";
    controls[name].classList.toggle("on", Object.hasOwn(state.choice, name));
  }
}

// What a mean over these rows runs together; clean images (severity 0) stand beside any severity.
function blended(rows) {
  const several = (name) => [...new Set(rows.map((i) => textAt(name, i)))].filter(Boolean);
  const sets = several("dataset").length;
  const severities = several("severity").filter((value) => value !== "0").length;
  return [sets > 1 ? `${sets} data sets` : "", severities > 1 ? `${severities} severities` : ""]
    .filter(Boolean).join(" and ");
}

function showCount(rows) {
  const trials = new Set(rows.map((i) => codesOf("trial")[i])).size;
  const blend = blended(rows);
  const notes = [
    `, ${count(trials)} of ${plural(columns.trial.values.length, "trial")}.`,
    NOTES[state.role],
    state.chosen ? CHOSEN : "",
    blend ? `Means are over ${blend}.` : "",
  ].filter(Boolean).join(" ");
  document.getElementById("shown").replaceChildren(
    make("b", {}, `${count(rows.length)} of ${plural(total, "row")}`), notes);
}

let last = null;
function show() {
  const start = performance.now();
  const key = JSON.stringify([state.q, state.role, state.choice, state.chosen]);
  const filtered = !last || last.key !== key;
  const rows = filtered ? matching(state) : last.rows;
  setControls();
  if (filtered) {
    showCount(rows);
    showHeat(rows, state);
    showBars(rows);
    showFailures(rows);
  }
  if (filtered || last.price !== state.price) showCost(rows, state, change);
  showTable(rows, state, change);
  last = { key, rows, price: state.price };
  writeHash();
  // Layout is part of what a reader waits for.
  document.body.getBoundingClientRect();
  document.documentElement.dataset.showMs = (performance.now() - start).toFixed(1);
}

// Keys typed within one frame are one change; what had the focus has it again.
let waiting = 0;
function change(changes, focus) {
  state = { ...state, ...changes };
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => {
    show();
    const element = focus && document.querySelector(focus);
    if (element) element.focus({ preventScroll: true });
  });
}

makeFilter();
state = readHash();
show();
window.addEventListener("hashchange", () => { state = readHash(); show(); });
const redraw = () => showCost(last.rows, state, change);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
window.addEventListener("resize", redraw);
document.documentElement.dataset.ready = "1";
document.documentElement.dataset.openMs = performance.now().toFixed(1);
