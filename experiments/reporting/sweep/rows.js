// The rows, unpacked once, and what every view needs of them: filter, order, means.

const data = JSON.parse(document.getElementById("data").textContent);
const total = data.rows;
// Names of settings are anyone's: none may be found on a prototype.
const columns = Object.create(null);
for (const [name, packed] of Object.entries(data.columns)) columns[name] = unpack(packed);

// Numbers become one typed array (NaN where missing), texts an array of codes (-1 where missing).
function unpack(packed) {
  if (packed.kind === "text") {
    return { kind: "text", codes: Int32Array.from(packed.codes), values: packed.values };
  }
  const numbers = new Float64Array(total);
  if (packed.raw) packed.raw.forEach((value, i) => { numbers[i] = value === null ? NaN : value; });
  else packed.codes.forEach((code, i) => { numbers[i] = code < 0 ? NaN : packed.values[code]; });
  return { kind: "number", numbers, values: packed.values || null };
}

// A column that no row has.
const NO_NUMBERS = new Float64Array(total).fill(NaN);
const NO_CODES = new Int32Array(total).fill(-1);

function column(name) {
  return columns[name] || { kind: "number", numbers: NO_NUMBERS, values: [] };
}

function numbersOf(name) {
  return column(name).numbers || NO_NUMBERS;
}

function codesOf(name) {
  return column(name).codes || NO_CODES;
}

// The text of a cell; "" where it is missing.
function textAt(name, row) {
  const found = column(name);
  if (found.kind === "text") return found.codes[row] < 0 ? "" : found.values[found.codes[row]];
  return Number.isNaN(found.numbers[row]) ? "" : String(found.numbers[row]);
}

const SEARCHED = ["trial", "label", "method", "dataset", "domain", "status", "message"];

// Rows that hold every word of a text, whatever its case, in any of some columns. Each different
// value is looked at once, not each row: 10,000 trials share few.
function holding(text) {
  const keep = new Uint8Array(total).fill(1);
  for (const word of text.toLowerCase().split(/\s+/).filter(Boolean)) {
    const here = new Uint8Array(total);
    for (const name of SEARCHED) {
      const found = column(name);
      if (found.kind !== "text") continue;
      const hits = found.values.map((value) => value.toLowerCase().includes(word));
      if (!hits.includes(true)) continue;
      for (let i = 0; i < total; i++) if (hits[found.codes[i]]) here[i] = 1;
    }
    for (let i = 0; i < total; i++) keep[i] &= here[i];
  }
  return keep;
}

function keepChoice(keep, name, choice) {
  const found = column(name);
  const wanted = found.kind === "text" ? found.values.indexOf(choice) : Number(choice);
  const held = found.kind === "text" ? found.codes : found.numbers;
  for (let i = 0; i < total; i++) if (held[i] !== wanted) keep[i] = 0;
}

// What says that a trial failed is of no role; it shows in either.
function keepRole(keep, role) {
  const roles = codesOf("split_role");
  const wanted = (column("split_role").values || []).indexOf(role);
  for (let i = 0; i < total; i++) if (roles[i] !== wanted && roles[i] !== -1) keep[i] = 0;
}

function listed(keep) {
  const rows = [];
  for (let i = 0; i < total; i++) if (keep[i]) rows.push(i);
  return rows;
}

// The numbers of the rows that pass the filter, in the order of the sweep.
function matching(state) {
  const keep = state.q ? holding(state.q) : new Uint8Array(total).fill(1);
  for (const [name, choice] of Object.entries(state.choice)) keepChoice(keep, name, choice);
  if (state.chosen) {
    const best = lowestSettings(validationRows(state));
    for (let i = 0; i < total; i++) if (best.get(familyOf(i)) !== data.setting[i]) keep[i] = 0;
  }
  keepRole(keep, state.role);
  return listed(keep);
}

// What settings are chosen for: a method on a data set.
function familyOf(row) {
  return `${codesOf("method")[row]} ${codesOf("dataset")[row]}`;
}

// Settings are chosen on all validation rows, whichever domains, seeds or words the filter shows:
// fog has no validation row, and a search for it must not change what is chosen.
function validationRows(state) {
  const keep = new Uint8Array(total).fill(1);
  for (const name of ["dataset", "num_steps", ...data.settings]) {
    if (Object.hasOwn(state.choice, name)) keepChoice(keep, name, state.choice[name]);
  }
  keepRole(keep, "validation");
  return listed(keep);
}

// Per family the settings with the lowest mean error on some rows, of those that were run on as
// many domains and seeds as any: a mean over fewer is no lower error.
function lowestSettings(rows) {
  const errors = numbersOf("error"), found = new Map();
  for (const i of rows) {
    if (Number.isNaN(errors[i])) continue;
    const family = familyOf(i), key = `${family} ${data.setting[i]}`;
    let one = found.get(key);
    if (!one) {
      one = { family, setting: data.setting[i], sum: 0, rows: 0, places: new Set() };
      found.set(key, one);
    }
    one.sum += errors[i];
    one.rows += 1;
    one.places.add(data.place[i]);
  }
  const best = new Map();
  for (const one of found.values()) {
    const held = best.get(one.family);
    const fuller = held ? one.places.size - held.places.size : 1;
    if (fuller > 0 || (fuller === 0 && one.sum / one.rows < held.sum / held.rows)) {
      best.set(one.family, one);
    }
  }
  return new Map([...best].map(([family, one]) => [family, one.setting]));
}

// The rows by one column; missing values last, whichever way, and ties as in the sweep.
function ordered(rows, name, descending) {
  if (!columns[name]) return rows;
  const found = columns[name];
  const keys = found.kind === "number" ? found.numbers : found.codes;
  const lacks = found.kind === "number" ? (i) => Number.isNaN(keys[i]) : (i) => keys[i] < 0;
  const there = [], missing = [];
  for (const i of rows) (lacks(i) ? missing : there).push(i);
  const sign = descending ? -1 : 1;
  const sorted = Uint32Array.from(there).sort((a, b) => sign * (keys[a] - keys[b]) || a - b);
  return [...sorted, ...missing];
}

// A mean over each seed's values, then over the seeds, with its standard error.
class SeedMeans {
  constructor() {
    this.seeds = new Map();
    this.rows = 0;
  }

  add(seed, value) {
    const held = this.seeds.get(seed);
    if (held) { held[0] += value; held[1] += 1; } else this.seeds.set(seed, [value, 1]);
    this.rows += 1;
  }

  stat() {
    const means = [...this.seeds.values()].map(([sum, count]) => sum / count);
    const mean = means.reduce((a, b) => a + b, 0) / means.length;
    const spread = means.reduce((a, b) => a + (b - mean) ** 2, 0);
    const stderr = means.length > 1 ? Math.sqrt(spread / (means.length - 1) / means.length) : null;
    return { mean, stderr, seeds: means.length, rows: this.rows };
  }
}

function median(values) {
  const sorted = values.filter((value) => !Number.isNaN(value)).sort((a, b) => a - b);
  if (!sorted.length) return NaN;
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
