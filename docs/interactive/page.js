"use strict";
// The page: points or a matrix in, pictures out. Everything is drawn again at every change.

const START = {
  queries: [[-1.6, 1.2], [-1.2, 0.6], [-0.7, 1.0], [0.9, -0.4], [1.3, -1.1], [-0.2, -0.9]],
  keys: [[-1.1, 1.1], [-0.1, 0.7], [0.8, 0.9], [1.5, -0.2], [0.6, -1.3], [-1.2, -1.0]],
  matrix: [[2, 0, 0, 0], [2, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 1]],
};
const REACH = 2; // the points' plane is [-REACH, REACH] x [-REACH, REACH]
const byId = (id) => document.getElementById(id);
const state = structuredClone(START);
const settings = ["kind", "source", "epsilon", "iterations", "dustbin", "score"].reduce((x, id) => ({ ...x, [id]: byId(id) }), {});

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const onPlane = ([x, y]) => [200 + (x / REACH) * 190, 200 - (y / REACH) * 190];
const fromPlane = (x, y) => [((x - 200) / 190) * REACH, ((200 - y) / 190) * REACH].map((z) => Math.max(-REACH, Math.min(REACH, z)));

function weights() {
  const scores = settings.source.value === "points" ? Transport.pointScores(state.queries, state.keys) : state.matrix;
  const options = {
    epsilon: 10 ** Number(settings.epsilon.value),
    iterations: Number(settings.iterations.value),
    dustbin: settings.dustbin.checked ? Number(settings.score.value) : null,
  };
  const n = scores.length, m = scores[0].length;
  const solved = Transport.solve(scores, options);
  if (settings.kind.value === "transport") return { n, m, ...solved };
  const plan = Transport.softmax(scores, options);
  const colSums = plan[0].map((_, j) => plan.reduce((x, row) => x + row[j], 0));
  return { ...solved, n, m, plan, colSums, history: [] };
}

function drawPoints({ plan, n, m, rowMass }) {
  const svg = byId("points");
  svg.replaceChildren();
  for (let i = 0; i < n; i++) for (let j = 0; j < m; j++) {
    const part = plan[i][j] / rowMass[i];
    if (part < 0.01) continue;
    const [x1, y1] = onPlane(state.queries[i]), [x2, y2] = onPlane(state.keys[j]);
    svg.append(element("line", { class: "link", x1, y1, x2, y2, "stroke-width": 9 * part, opacity: 0.25 + 0.6 * part }));
  }
  const draggable = (point, shape) => {
    shape.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const move = (at) => {
        const box = svg.getBoundingClientRect();
        const place = fromPlane(((at.clientX - box.left) / box.width) * 400, ((at.clientY - box.top) / box.height) * 400);
        point[0] = place[0];
        point[1] = place[1];
        draw();
      };
      const stop = () => window.removeEventListener("pointermove", move);
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", stop, { once: true });
      window.addEventListener("pointercancel", stop, { once: true });
    });
    svg.append(shape);
  };
  state.keys.forEach((key) => {
    const [x, y] = onPlane(key);
    draggable(key, element("rect", { class: "key", x: x - 9, y: y - 9, width: 18, height: 18, rx: 2 }));
  });
  state.queries.forEach((query) => {
    const [cx, cy] = onPlane(query);
    draggable(query, element("circle", { class: "query", cx, cy, r: 10 }));
  });
}

function drawPlan({ plan, n, m, colSums, colMass }) {
  const svg = byId("plan");
  svg.replaceChildren();
  const rows = plan.length, columns = plan[0].length;
  const size = Math.min(330 / columns, 270 / rows), left = (400 - size * columns) / 2, top = 16;
  const largest = Math.max(...plan.slice(0, n).flatMap((row) => row.slice(0, m)), 1e-12);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) {
    const opacity = Math.min(1, plan[i][j] / largest);
    const cell = element("rect", { class: "cell", x: left + j * size, y: top + i * size, width: size - 1, height: size - 1, opacity });
    cell.append(element("title", {}, `${i < n ? `query ${i + 1}` : "dustbin"}, ${j < m ? `key ${j + 1}` : "dustbin"}: ${plan[i][j].toFixed(3)}`));
    svg.append(cell);
  }
  svg.append(element("rect", { class: "frame", x: left, y: top, width: size * m, height: size * n }));
  if (columns > m) svg.append(element("text", { x: left + size * (m + 0.5), y: 12, "text-anchor": "middle" }, "dustbin"));
  const base = 392, most = Math.max(...colSums.slice(0, m), ...colMass.slice(0, m)), height = base - (top + size * rows) - 14;
  for (let j = 0; j < m; j++) {
    const h = (colSums[j] / most) * height, line = base - (colMass[j] / most) * height;
    svg.append(element("rect", { class: "bar", x: left + j * size + 2, y: base - h, width: Math.max(1, size - 5), height: h }));
    svg.append(element("line", { class: "share", x1: left + j * size, x2: left + (j + 1) * size - 1, y1: line, y2: line }));
  }
}

function drawHistory({ history }) {
  const svg = byId("history");
  svg.replaceChildren();
  const floor = 1e-8, place = (t, x) => [46 + (t / Math.max(10, history.length - 1)) * 340, 20 + (-Math.log10(Math.min(10, Math.max(floor, x))) + 1) * (210 / 9)];
  for (let p = 1; p >= -8; p--) {
    const y = place(0, 10 ** p)[1];
    svg.append(element("line", { class: "grid", x1: 46, x2: 386, y1: y, y2: y }));
    if (p % 2 === 0) svg.append(element("text", { x: 40, y: y + 4, "text-anchor": "end" }, p === 0 ? "1" : `1e${p}`));
  }
  svg.append(element("text", { x: 386, y: 252, "text-anchor": "end" }, `${Math.max(10, history.length - 1)} iterations`));
  if (history.length) svg.append(element("polyline", { class: "curve", points: history.map((x, t) => place(t, x).join(",")).join(" ") }));
  else svg.append(element("text", { x: 216, y: 130, "text-anchor": "middle" }, "softmax does not iterate"));
}

function drawMatrix() {
  const table = byId("matrix");
  if (table.rows.length === state.matrix.length) return;
  table.replaceChildren();
  state.matrix.forEach((row, i) => {
    const line = table.insertRow();
    row.forEach((x, j) => {
      const input = document.createElement("input");
      Object.assign(input, { type: "number", step: 0.5, value: x });
      input.setAttribute("aria-label", `score of query ${i + 1} and key ${j + 1}`);
      input.addEventListener("input", () => {
        const value = Number(input.value);
        if (Number.isFinite(value)) state.matrix[i][j] = Math.max(-50, Math.min(50, value));
        draw();
      });
      line.insertCell().append(input);
    });
  });
}

function say({ history, colSums, colMass, m }) {
  if (settings.kind.value === "softmax") {
    const crowded = Math.max(...colSums.slice(0, m).map((x, j) => x / colMass[j])), poor = Math.min(...colSums.slice(0, m).map((x, j) => x / colMass[j]));
    return `The most crowded key gets ${crowded.toFixed(1)} times an equal share, the least wanted ${poor.toFixed(2)} times.`;
  }
  const error = history[history.length - 1];
  if (history.length === 1) return "No iteration: the rows are right and the columns are not asked. This is softmax.";
  return error < 1e-3 ? `Balanced: the worst column is off by ${error.toExponential(0)} of its share.`
    : `Not balanced yet: the worst column is off by ${error < 0.1 ? (100 * error).toFixed(1) : (100 * error).toFixed(0)} % of its share. More iterations, or a larger epsilon, bring it nearer.`;
}

function draw() {
  const points = settings.source.value === "points";
  byId("epsilon-value").value = (10 ** Number(settings.epsilon.value)).toPrecision(2);
  byId("iterations-value").value = settings.iterations.value;
  byId("score-value").value = Number(settings.score.value).toFixed(2);
  settings.score.disabled = !settings.dustbin.checked;
  settings.iterations.disabled = settings.kind.value === "softmax";
  byId("points").toggleAttribute("hidden", !points);
  byId("points").style.display = points ? "" : "none";
  byId("matrix").hidden = points;
  byId("points-caption").textContent = points ? "The thicker a line, the larger the weight." : "Scores: a row for each query. Edit any.";
  const found = weights();
  if (points) drawPoints(found);
  else drawMatrix();
  drawPlan(found);
  drawHistory(found);
  byId("said").textContent = say(found);
}

for (const input of Object.values(settings)) input.addEventListener("input", draw);
byId("reset").addEventListener("click", () => {
  Object.assign(state, structuredClone(START));
  byId("matrix").replaceChildren();
  draw();
});
draw();
