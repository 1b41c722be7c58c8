"use strict";
const COLORS = 8, DASHES = ["solid", "dash", "dot"], SECONDS = 5, MOST_KEYS = 24, MOST_COLUMNS = 12;
const TITLES = {
  loss: "Training loss", val_loss: "Validation loss", lr: "Learning rate", grad_norm: "Gradient norm",
  tokens_per_s: "Tokens per second", val_perplexity: "Validation perplexity", tflops: "TFLOP/s",
  val_bits_per_byte: "Validation bits per byte", memory_gib: "Peak device memory (GiB)",
  process_gib: "Peak memory of the process (GiB)", nonfinite: "Steps that were not finite",
};
const UNITS = {step: "step", tokens: "tokens", hours: "hours"};
const BADGES = {done: "good", running: "warn", interrupted: "warn", unknown: "warn"};
const COLUMNS = {
  name: "Run", state: "Status", step: "Step", val_loss: "Val loss", optimizer: "Optimizer", lr: "lr", updated: "Age",
  bytes: "Size",
};
const coarse = matchMedia("(pointer: coarse)");
const find = id => document.getElementById(id);
const written = JSON.parse(find("data").textContent);
let data = {runs: [], settings: [], reports: [], problems: []};
let read = null, lost = false, drawn = "";

// what the reader chose, kept in the address: it survives a reload and can be passed on
const chosen = {
  charts: ["val_loss", "loss"], x: "step", smooth: 0, logx: false, logy: false, group: "", filter: "",
  sort: "updated", down: false, off: [],
};
try {
  const kept = JSON.parse(decodeURIComponent(location.hash.slice(1)));
  for (const [key, value] of Object.entries(chosen)) {
    if (typeof kept[key] == typeof value && Array.isArray(kept[key]) == Array.isArray(value)) chosen[key] = kept[key];
  }
} catch { /* no choice, or one that was damaged */ }

function element(tag, attributes, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

function fill(id, ...children) {
  find(id).replaceChildren(...children);
}

// ---- runs: which are shown, their groups and colours

const numbers = {};  // grouping -> group -> its number, by appearance: a new run changes no colour
const setting = (run, key) => key in run ? run[key] : run.settings[key] ?? "-";
const groupOf = run => chosen.group ? setting(run, chosen.group) : run.name;
const isOn = run => !chosen.off.includes(run.name);

function matching() {
  const words = chosen.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const keys = [...Object.keys(COLUMNS), "recipe", ...data.settings.map(([key]) => key)];
  const facts = new Map(data.runs.map(run => [run, keys.map(key => `${key}=${setting(run, key)}`.toLowerCase())]));
  // a whole key=value means that value, any other word a part of one: lr=0.1 is not lr=0.15
  const whole = new Set([...facts.values()].flat());
  return data.runs.filter(run => words.every(word =>
    facts.get(run).some(fact => whole.has(word) ? fact == word : fact.includes(word))));
}

const shown = () => matching().filter(isOn);

function look(group) {
  const known = numbers[chosen.group] ??= {}, number = known[group] ??= Object.keys(known).length;
  const color = getComputedStyle(document.documentElement).getPropertyValue(`--c${number % COLORS}`).trim();
  return {color, dash: DASHES[Math.floor(number / COLORS) % DASHES.length]};
}

function swatch(group) {
  const {color, dash} = look(group);
  const line = element("i", {});
  Object.assign(line.style, {borderTopColor: color, borderTopStyle: dash == "dash" ? "dashed" : dash == "dot" ? "dotted" : dash});
  return line;
}

function turn(names, on) {
  chosen.off = chosen.off.filter(name => !names.includes(name));
  if (!on) chosen.off.push(...names);
  draw();
}

// ---- curves

function curve(run, key) {
  const part = [run.curves.train, run.curves.eval].find(lines => key in lines.values);
  return part ? {x: part[chosen.x], y: part.values[key]} : {x: [], y: []};
}

// an average with weights that fall by the factor `smooth` from line to line, divided by their sum
function smoothed(values) {
  let sum = 0, weight = 0;
  return values.map(value => {
    if (value === null) return null;
    sum = chosen.smooth * sum + value;
    weight = chosen.smooth * weight + 1;
    return sum / weight;
  });
}

// the mean of several curves where all of them have a value
function mean(curves) {
  const sums = new Map();
  for (const {x, y} of curves) {
    x.forEach((at, i) => {
      if (at === null || y[i] === null) return;
      const [sum, count] = sums.get(at) || [0, 0];
      sums.set(at, [sum + y[i], count + 1]);
    });
  }
  const common = [...sums].filter(([, [, count]]) => count == curves.length).sort(([a], [b]) => a - b);
  return {x: common.map(([at]) => at), y: common.map(([, [sum, count]]) => sum / count)};
}

function traces(key) {
  const groups = new Map(), made = [];
  for (const run of shown()) {
    const line = curve(run, key);
    if (line.x.length) groups.set(groupOf(run), [...groups.get(groupOf(run)) || [], {run, ...line}]);
  }
  for (const [group, members] of groups) {
    const {color, dash} = look(group);
    const add = (name, {x, y}, faint, width) => made.push({
      name, x, y, type: "scatter", mode: !faint && x.length <= 60 ? "lines+markers" : "lines", opacity: faint ? 0.3 : 1,
      line: {color, dash, width}, marker: {size: 5}, hoverinfo: faint ? "skip" : "all", connectgaps: true,
      hovertemplate: faint ? undefined : `%{y:.5g} at ${UNITS[chosen.x]} %{x}<extra>%{fullData.name}</extra>`,
    });
    const average = chosen.group && members.length > 1 ? mean(members) : {x: []};
    for (const {run, x, y} of members) {
      const smooth = chosen.smooth > 0 && x.length > 2;
      if (smooth && !average.x.length) add(run.name, {x, y}, true, 1);
      add(run.name, {x, y: smooth ? smoothed(y) : y}, average.x.length > 0, average.x.length ? 1 : 2);
    }
    if (average.x.length) {
      add(`${group} (mean of ${members.length})`, {x: average.x, y: smoothed(average.y)}, false, 2.5);
    }
  }
  return made;
}

function layout(key) {
  const style = getComputedStyle(document.documentElement), color = name => style.getPropertyValue(name).trim();
  const axis = log => ({
    type: log ? "log" : "linear", gridcolor: color("--line"), linecolor: color("--axis"), zeroline: false,
    automargin: true, nticks: 7, exponentformat: "SI", hoverformat: ".6~g", minor: {showgrid: false},
  });
  return {
    uirevision: [key, chosen.x, chosen.logx, chosen.logy].join(), showlegend: false, hovermode: "closest",
    margin: {l: 46, r: 14, t: 26, b: 40}, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: {family: "system-ui, sans-serif", size: 12, color: color("--muted")},
    hoverlabel: {namelength: -1}, modebar: {bgcolor: "transparent", color: color("--muted"), activecolor: color("--accent")},
    xaxis: {...axis(chosen.logx), title: {text: UNITS[chosen.x], standoff: 8}}, yaxis: axis(chosen.logy),
    // a finger scrolls the page; the buttons zoom
    dragmode: coarse.matches ? false : "zoom",
  };
}

const title = key => TITLES[key] || key.replaceAll("_", " ");

function charts() {
  const place = find("charts");
  for (const figure of [...place.children]) {
    if (!chosen.charts.includes(figure.dataset.key)) figure.remove();
  }
  for (const key of chosen.charts) {
    if (![...place.children].some(one => one.dataset.key == key)) {
      const remove = element("button", {type: "button", textContent: "×", title: "Remove this chart"});
      remove.setAttribute("aria-label", `Remove the chart ${title(key)}`);
      remove.onclick = () => { chosen.charts = chosen.charts.filter(one => one != key); draw(); };
      const figure = element("figure", {}, element("h3", {textContent: title(key)}), remove, element("div", {className: "plot"}));
      figure.dataset.key = key;
      place.append(figure);
    }
  }
  // all have their places: how many there are decides on their widths
  for (const figure of place.children) {
    const plot = figure.querySelector(".plot"), key = figure.dataset.key;
    const config = {
      displaylogo: false, responsive: true, displayModeBar: true, doubleClick: "reset",
      showSendToCloud: false, plotlyServerURL: "",  // it would send the numbers to a host
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: {filename: key},
    };
    Plotly.react(plot, traces(key), layout(key), config);
    if (plot.clientWidth != plot._fullLayout.width) Plotly.Plots.resize(plot);
  }
}

// ---- controls

function choices() {
  const keys = [...new Set(data.runs.flatMap(run =>
    [run.curves.eval, run.curves.train].flatMap(lines => Object.keys(lines.values))))];
  const option = (value, text) => element("option", {value, textContent: text});
  const free = keys.filter(key => !chosen.charts.includes(key));
  fill("add", option("", "add …"), ...free.map(key => option(key, title(key))));
  const settings = data.settings.map(([key]) => key).filter(key => key != "optimizer.name");
  fill("group", ...["", "optimizer", "recipe", "state", ...settings].map(key => option(key, key || "nothing")));
  for (const id of ["x", "smooth", "group", "filter"]) if (document.activeElement != find(id)) find(id).value = chosen[id];
  for (const id of ["logx", "logy"]) find(id).checked = chosen[id];
  find("smooth").nextSibling.value = chosen.smooth;
}

function legend() {
  const groups = new Map();
  for (const run of matching()) groups.set(groupOf(run), [...groups.get(groupOf(run)) || [], run]);
  const keys = [...groups].slice(0, MOST_KEYS).map(([group, runs]) => {
    const key = element("button", {type: "button", title: "Show or hide"}, swatch(group), group);
    const on = runs.some(isOn);
    key.setAttribute("aria-pressed", on);
    key.onclick = () => turn(runs.map(run => run.name), !on);
    return key;
  });
  fill("keys", ...keys, ...(groups.size > MOST_KEYS ? [`and ${groups.size - MOST_KEYS} more, in the table`] : []));
}

// ---- tables

const instant = text => text && Date.parse(text.replace(/(\d\d)(\d\d)$/, "$1:$2"));

function age(text) {
  if (!text) return "-";
  const seconds = Math.max(0, (Date.now() - instant(text)) / 1000);
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.floor(seconds)} s`;
}

function size(bytes) {  // as leanstep runs writes it
  const power = bytes < 1024 * 1000 ? 1 : bytes < 1024 ** 2 * 1000 ? 2 : 3;
  return `${(bytes / 1024 ** power).toFixed(1)} ${["KiB", "MiB", "GiB"][power - 1]}`;
}

const badge = state => element("span", {className: `badge ${BADGES[state] || "bad"}`, textContent: state.replace(":", ": ")});
const number = value => value === null ? "-" : value;
const cells = {
  state: run => badge(run.state),
  step: run => run.steps === null ? number(run.step) : `${number(run.step)}/${run.steps}`,
  val_loss: run => run.val_loss === null ? "-" : run.val_loss.toFixed(4),
  lr: run => number(run.lr),
  updated: run => age(run.updated),
  bytes: run => size(run.bytes),
};
const source = name => `${data.base}/${name.split("/").map(encodeURIComponent).join("/")}`;
const embedded = name => data.files?.[name] || source(name);

function ordered() {
  const value = run => chosen.sort == "updated" ? -(instant(run.updated) || 0) : setting(run, chosen.sort);
  const compare = (a, b) => typeof a == "string" ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  return matching().sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return (chosen.down ? -1 : 1) * compare(a, b);
  });
}

function tick(on, names, label) {
  const box = element("input", {type: "checkbox", checked: on});
  box.setAttribute("aria-label", label);
  box.onchange = () => turn(names, box.checked);
  return box;
}

function runs() {
  const rows = ordered(), columns = {...COLUMNS};
  if (chosen.group && !(chosen.group in COLUMNS)) columns[chosen.group] = chosen.group;
  const numeric = key => ["step", "val_loss", "lr", "updated", "bytes"].includes(key) ? "n" : "";
  const heads = Object.entries(columns).map(([key, text]) => {
    const arrow = chosen.sort == key ? (chosen.down ? " ↓" : " ↑") : "";
    const button = element("button", {type: "button", textContent: text + arrow, title: "Sort"});
    button.onclick = () => { chosen.down = chosen.sort == key && !chosen.down; chosen.sort = key; draw(); };
    return element("th", {className: numeric(key)}, button);
  });
  const all = tick(rows.length > 0 && rows.every(isOn), rows.map(run => run.name), "Show all runs");
  document.querySelector("#runs thead").replaceChildren(element("tr", {}, element("th", {}, all), ...heads));
  const losses = rows.map(run => run.val_loss).filter(loss => loss !== null), best = Math.min(...losses);
  document.querySelector("#runs tbody").replaceChildren(...rows.map(run => {
    const {color} = look(groupOf(run)), square = element("i", {});
    square.style.background = color;
    const name = run.report ? element("a", {href: source(run.report), target: "_blank", textContent: run.name}) : run.name;
    const facts = Object.keys(columns).filter(key => key != "name").map(key => {
      const value = key in cells ? cells[key](run) : setting(run, key) || "-";
      const leads = key == "val_loss" && losses.length > 1 && run.val_loss === best;
      return element("td", {className: `${numeric(key)}${leads ? " best" : ""}`}, value);
    });
    const box = element("td", {}, tick(isOn(run), [run.name], `Show ${run.name}`));
    return element("tr", {className: isOn(run) ? "" : "off"}, box, element("th", {}, square, name), ...facts);
  }));
}

function settings() {
  const columns = shown().slice(0, MOST_COLUMNS);
  const rows = data.settings.map(([key]) => [key, ...columns.map(run => setting(run, key))])
    .filter(([, ...values]) => new Set(values).size > 1);
  const row = (cell, values) => element("tr", {}, ...values.map((text, i) => element(i ? cell : "th", {textContent: text})));
  document.querySelector("#settings thead").replaceChildren(row("th", ["", ...columns.map(run => run.name)]));
  document.querySelector("#settings tbody").replaceChildren(...rows.map(values => row("td", values)));
  find("settings").parentElement.hidden = !rows.length;
  find("same").hidden = rows.length > 0;
}

function reports() {
  const known = JSON.stringify(data.reports);
  find("reports").hidden = !data.reports.length;
  if (find("frames").dataset.known == known) return;  // an open one stays open
  find("frames").dataset.known = known;
  fill("frames", ...data.reports.map(report => {
    const link = element("a", {href: source(report.file), target: "_blank", textContent: report.file});
    const details = element("details", {}, element("summary", {}, `${report.title} · `, link));
    details.ontoggle = () => {
      if (details.querySelector("iframe")) return;
      const frame = element("iframe", {title: report.title, src: embedded(report.file)});
      frame.setAttribute("sandbox", "");
      details.append(frame);
    };
    return element("div", {className: "card"}, details);
  }));
}

function problems() {
  fill("problems", ...data.problems.map(text => element("li", {textContent: text})));
  find("problems").hidden = !data.problems.length;
}

// ---- the page as a whole

function lead() {
  const running = data.runs.filter(run => run.state == "running").length;
  const time = read && read.toLocaleTimeString();
  find("lead").textContent = [
    data.runs.length ? `${data.runs.length} run${data.runs.length > 1 ? "s" : ""}, ${running} running` : "no runs yet",
    written ? `written ${data.written}` : time ? `read at ${time}` : "reading",
  ].join(" · ");
  const [text, kind] = lost ? ["not served any more", "bad"] : ["live", "good"];
  Object.assign(find("state"), {textContent: text, className: `badge ${kind}`, hidden: written !== null});
}

function draw() {
  history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(chosen))}`);
  for (const run of data.runs) look(groupOf(run));
  for (const part of [lead, choices, legend, charts, runs, problems, settings, reports]) part();
}

function take(content) {
  data = content;
  data.runs.forEach((run, i) => { run.settings = Object.fromEntries(data.settings.map(([key, values]) => [key, values[i]])); });
  draw();
}

async function poll() {
  if (!document.hidden) {
    try {
      const answer = await fetch("data.json");
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      [lost, read] = [false, new Date()];
      if (text != drawn) {
        drawn = text;
        take(JSON.parse(text));
      }
    } catch {
      lost = true;
    }
    lead();
  }
  setTimeout(poll, 1000 * SECONDS);
}

for (const id of ["x", "group"]) find(id).onchange = event => { chosen[id] = event.target.value; draw(); };
for (const id of ["logx", "logy"]) find(id).onchange = event => { chosen[id] = event.target.checked; draw(); };
find("smooth").oninput = event => { chosen.smooth = Number(event.target.value); draw(); };
find("filter").oninput = event => { chosen.filter = event.target.value; draw(); };
find("add").onchange = event => { if (event.target.value) chosen.charts.push(event.target.value); draw(); };
matchMedia("(prefers-color-scheme: dark)").onchange = draw;
take(written || data);
if (!written) poll();
