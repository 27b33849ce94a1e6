// The filter, which is kept in the address so that a view can be passed on, and the views.

const CHOICES = ["method", "dataset", "domain", "severity", "seed", "status", "learning_rate", "num_steps",
  ...data.settings.filter((name) => name !== "learning_rate")];
const MOST_CHOICES = 80;
const PLAIN = { q: "", role: "reported", sort: "", dir: "asc", page: 0, size: 25, price: "cost", chosen: false };
const NOTES = {
  reported: "Reported rows. Nothing is to be chosen from them: settings are chosen on validation rows.",
  validation: "Validation rows. Settings may be chosen on them; their errors are no result.",
};

let state = { ...PLAIN, choice: {} };

// Different values of a column, where they are few enough to choose from and not one alone.
function choicesOf(name) {
  const found = column(name);
  const present = found.kind === "text" ? found.values
    : [...new Set(found.numbers)].filter((value) => !Number.isNaN(value)).sort((a, b) => a - b).map(String);
  return present.length > 1 && present.length <= MOST_CHOICES ? present : null;
}

const choices = {};
for (const name of CHOICES) {
  const values = choicesOf(name);
  if (values) choices[name] = values;
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const next = { ...PLAIN, choice: {} };
  for (const [key, value] of given) {
    if (choices[key] && choices[key].includes(value)) next.choice[key] = value;
    else if (key === "role" && NOTES[value]) next.role = value;
    else if (key === "q") next.q = value;
    else if (key === "sort" && shownColumns.includes(value)) next.sort = value;
    else if (key === "dir" && value === "desc") next.dir = value;
    else if (key === "page") next.page = Math.max(0, Math.floor(Number(value)) - 1 || 0);
    else if (key === "size" && SIZES.includes(Number(value))) next.size = Number(value);
    else if (key === "price" && COSTS[value]) next.price = value;
    else if (key === "chosen") next.chosen = value === "1";
  }
  return next;
}

function writeHash() {
  const kept = new URLSearchParams();
  for (const [key, plain] of Object.entries(PLAIN)) {
    if (state[key] !== plain) kept.set(key, key === "page" ? state.page + 1 : key === "chosen" ? "1" : state[key]);
  }
  for (const [key, value] of Object.entries(state.choice)) kept.set(key, value);
  const hash = kept.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

// The controls are made once; setControls brings them to the state.
const controls = {};
function makeFilter() {
  const form = document.getElementById("filter");
  const labelled = (text, control, kind) => make("label", { class: kind }, make("span", {}, text), control);
  const roles = make("select", { id: "role" }, ...Object.keys(NOTES).map((role) => make("option", { value: role }, `${role} rows`)));
  roles.onchange = () => change({ role: roles.value, page: 0 });
  const search = make("input", { id: "q", type: "search", placeholder: "words in label, trial, message, …", autocomplete: "off" });
  search.oninput = () => change({ q: search.value, page: 0 });
  form.append(labelled("show", roles), labelled("search", search, "wide"));
  for (const [name, values] of Object.entries(choices)) {
    const shown = (value) => (columns[name].kind === "number" ? short(Number(value)) : value);
    const select = make("select", { id: `choice-${name}` }, make("option", { value: "" }, "all"),
      ...values.map((value) => make("option", { value }, shown(value))));
    select.onchange = () => {
      const choice = { ...state.choice, [name]: select.value };
      if (!select.value) delete choice[name];
      change({ choice, page: 0 });
    };
    controls[name] = select;
    form.append(labelled(titleOf(name), select));
  }
  const chosen = make("input", { id: "chosen", type: "checkbox" });
  chosen.onchange = () => change({ chosen: chosen.checked, page: 0 });
  const reset = make("button", { type: "button", id: "reset" }, "Reset");
  reset.onclick = () => change({ ...PLAIN, choice: {}, size: state.size });
  const validated = (column("split_role").values || []).includes("validation");
  const check = make("label", { class: "check", title: "Per method the settings with the lowest mean error on the validation rows that pass the filter" },
    chosen, "only settings chosen on validation");
  form.append(...(validated ? [check] : []), reset);
  form.onsubmit = (event) => event.preventDefault();
  Object.assign(controls, { q: search, role: roles, chosen });
}

function setControls() {
  // Never while someone types: the caret would jump.
  if (controls.q.value !== state.q) controls.q.value = state.q;
  controls.role.value = state.role;
  controls.chosen.checked = state.chosen;
  for (const name of Object.keys(choices)) {
    controls[name].value = state.choice[name] || "";
    controls[name].classList.toggle("on", name in state.choice);
  }
}

function mixed(rows) {
  const several = (name) => new Set(rows.map((i) => textAt(name, i)).filter(Boolean)).size;
  const found = [["dataset", "data sets"], ["severity", "severities"]].map(([name, noun]) => [several(name), noun]).filter(([n]) => n > 1);
  // Clean images have severity 0 and stand beside one other.
  return found.filter(([n, noun]) => noun !== "severities" || n > 2).map(([n, noun]) => `${n} ${noun}`).join(" and ");
}

function showCount(rows) {
  const trials = new Set(rows.map((i) => codesOf("trial")[i])).size;
  const all = columns.trial.values.length;
  const blend = mixed(rows);
  document.getElementById("shown").replaceChildren(
    make("b", { "data-rows": rows.length }, `${count(rows.length)} of ${plural(total, "row")}`),
    `, ${count(trials)} of ${plural(all, "trial")}. `, NOTES[state.role],
    state.chosen ? " Of each method only the settings with the lowest mean validation error." : "",
    blend ? ` Means are over ${blend}.` : "");
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
