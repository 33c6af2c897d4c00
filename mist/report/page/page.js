"use strict";
// Draws the pictures that the page holds as JSON; everything else of the page is there without it.
const report = JSON.parse(document.getElementById("report").textContent);
const root = document.documentElement;

// Columns of a picture, one object for each shape of a kind.
function shapes(picture, kind) {
  const found = [];
  picture.columns.kind.forEach((each, i) => {
    if (report.kinds[each] !== kind) return;
    const at = (name) => picture.columns[name][i];
    found.push({ series: picture.series[at("series")] ?? "", x1: at("x1"), x2: at("x2"), y1: at("y1"), y2: at("y2"), words: at("words") });
  });
  return found;
}

function marks(picture) {
  const clip = picture.zooms;
  const words = (d) => d.words || null;
  const drawn = [];
  const add = (kind, make) => { const data = shapes(picture, kind); if (data.length) drawn.push(make(data)); };
  add("area", (data) => Plot.area(data, { x1: "x1", y1: "y1", y2: "y2", z: "series", fill: "series", fillOpacity: 0.45, clip }));
  add("rect", (data) => Plot.rect(data, { x1: "x1", x2: "x2", y1: "y1", y2: "y2", fill: "series", clip }));
  add("line", (data) => Plot.line(data, { x: "x1", y: "y1", z: "series", stroke: "series", clip }));
  add("dot", (data) => Plot.dot(data, { x: "x1", y: "y1", fill: "series", symbol: "series", r: 4, clip }));
  add("mark", (data) => Plot.dot(data, { x: "x1", y: "y1", fill: "series", symbol: "series", r: 9, stroke: "currentColor", strokeWidth: 1.5, clip }));
  add("limit", (data) => Plot.ruleX(data.filter((d) => d.x1 !== null), { x: "x1", stroke: "series", strokeWidth: 2, strokeDasharray: "6 4" }));
  add("limit", (data) => Plot.ruleY(data.filter((d) => d.y1 !== null), { y: "y1", stroke: "series", strokeWidth: 2, strokeDasharray: "6 4" }));
  add("text", (data) => Plot.text(data, { x: "x1", y: "y1", text: "words", fill: "#000", stroke: "#fff", strokeWidth: 3, strokeOpacity: 0.85, lineWidth: 40, clip }));
  for (const kind of ["rect", "dot", "mark", "line"]) {
    const data = shapes(picture, kind).filter((d) => d.words);
    if (!data.length) continue;
    const middle = (d, a, b) => (d[b] === null ? d[a] : (d[a] + d[b]) / 2);
    drawn.push(Plot.tip(data, Plot.pointer({ x: (d) => middle(d, "x1", "x2"), y: (d) => middle(d, "y1", "y2"), title: words, maxRadius: 40, lineWidth: 24 })));
  }
  return drawn;
}

function draw(picture) {
  const place = document.querySelector(`[data-picture="${picture.name}"]`);
  const width = Math.max(280, Math.min(place.clientWidth, 1120));
  const rows = picture.rows.length;
  const longest = Math.max(0, ...picture.rows.map((name) => name.length));
  const margin = rows ? Math.min(Math.max(60, 7 * longest + 16), 0.4 * width) : 56;
  const short = (name) => { const most = Math.floor((margin - 12) / 6.5); return name.length > most ? name.slice(0, most - 1) + "\u2026" : name; };
  const y = rows
    ? { domain: [rows - 0.5, -0.5], ticks: picture.rows.map((_, i) => i), tickFormat: (i) => short(picture.rows[i] ?? ""), tickSize: 0, label: null }
    : { label: picture.yLabel, nice: true, grid: true };
  const symbols = shapes(picture, "dot").length || shapes(picture, "mark").length ? { symbol: { domain: picture.series, range: ["circle", "square", "triangle", "diamond", "star", "cross", "wye", "circle", "square", "triangle"] } } : {};
  const chart = Plot.plot({
    width, height: rows ? 60 + Math.max(26, 180 / rows) * rows : Math.max(260, Math.min(420, 0.55 * width)),
    marginLeft: margin, marginRight: 24, marginBottom: 40,
    ariaLabel: picture.title, ariaDescription: picture.caption,
    style: { background: "transparent", color: "currentColor", fontSize: "12px", maxWidth: "100%" },
    x: { label: picture.xLabel, domain: picture.domain, grid: true, ticks: Math.max(3, Math.floor(width / 110)), tickFormat: "~s" },
    y, ...symbols,
    color: { domain: picture.series, range: report.palette, legend: true },
    marks: marks(picture),
  });
  // Groups of shapes have no role, so that names of theirs would be read by nobody.
  for (const group of chart.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label");
  for (const svg of chart.querySelectorAll("svg[aria-label]")) svg.setAttribute("role", "img");
  place.replaceChildren(chart);
}

// The whole of x that a picture shows, from which zooming starts.
function extent(picture) {
  const all = [...picture.columns.x1, ...picture.columns.x2].filter((x) => x !== null);
  const low = Math.min(...all), high = Math.max(...all), edge = 0.02 * (high - low || 1);
  return [low < 0 || low > 0.2 * high ? low - edge : 0, high + edge];
}

function zoom(picture, action) {
  const [low, high] = picture.domain, size = high - low, whole = extent(picture);
  const moves = {
    in: [low + size / 4, high - size / 4], out: [low - size / 2, high + size / 2],
    left: [low - size / 4, high - size / 4], right: [low + size / 4, high + size / 4], whole,
  };
  const [from, to] = moves[action], wide = Math.min(to - from, whole[1] - whole[0]);
  const start = Math.min(Math.max(from, whole[0]), whole[1] - wide);
  picture.domain = [start, start + wide];
  draw(picture);
}

function sort(button) {
  const head = button.closest("th"), table = head.closest("table"), column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => { const cell = row.cells[column], value = cell.dataset.value; return value === undefined ? cell.textContent : Number(value); };
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)], order = typeof x === "number" ? x - y : x.localeCompare(y);
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows);
}

function filter(input) {
  const words = input.value.toLowerCase(), rows = document.getElementById("layouts").tBodies[0].rows;
  let shown = 0;
  for (const row of rows) { row.hidden = !row.textContent.toLowerCase().includes(words); shown += !row.hidden; }
  document.getElementById("shown").textContent = `${shown} of ${rows.length} shown`;
}

const pictures = new Map(report.pictures.map((picture) => [picture.name, picture]));
for (const picture of pictures.values()) { picture.domain = extent(picture); draw(picture); }
let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => pictures.forEach(draw), 150); });
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.zoom) zoom(pictures.get(button.dataset.of), button.dataset.zoom);
  else if (button.id === "theme") {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  } else if (button.closest("th")) sort(button);
});
document.getElementById("filter")?.addEventListener("input", (event) => filter(event.target));
