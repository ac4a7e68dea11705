"use strict";
// What moves on the page. All of it is readable without: this adds hover texts, curve values, and filters.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip");

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const x = event.clientX + 16, y = event.clientY + 16;
  tip.style.left = Math.max(8, Math.min(x, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (y + tip.offsetHeight > innerHeight - 8 ? Math.max(8, y - tip.offsetHeight - 28) : y) + "px";
}
const hideTip = () => { tip.hidden = true; };

// The map: a dot's <title> becomes the hover text.
for (const dot of all("#dots circle")) {
  const title = dot.querySelector("title");
  const text = title.textContent;
  dot.setAttribute("aria-label", text);
  title.remove();
  dot.addEventListener("pointermove", event => showTip(event, text));
  dot.addEventListener("pointerleave", hideTip);
}
const filter = { expert: "", task: "" };
function filterMap() {
  const shown = dot => (!filter.expert || dot.dataset.expert === filter.expert)
    && (!filter.task || !dot.dataset.tasks || JSON.parse(dot.dataset.tasks).includes(filter.task));
  for (const dot of all("#dots circle, .chart .words text")) dot.classList.toggle("dim", !shown(dot));
  for (const button of all("[data-only]")) button.setAttribute("aria-pressed", button.dataset.only === filter.expert);
  for (const button of all("[data-met]")) button.setAttribute("aria-pressed", button.dataset.met === filter.task);
}
for (const button of all("[data-only]")) button.addEventListener("click", () => {
  filter.expert = filter.expert === button.dataset.only ? "" : button.dataset.only;
  filterMap();
});
for (const button of all("[data-met]")) button.addEventListener("click", () => {
  filter.task = button.dataset.met;
  filterMap();
});

// The curves: press a name to hide its line, point to read the values.
for (const button of all("[data-toggle]")) button.addEventListener("click", () => {
  const visible = button.getAttribute("aria-pressed") === "false";
  button.setAttribute("aria-pressed", visible);
  for (const line of all("[data-family]")) if (line.dataset.family === button.dataset.toggle) line.classList.toggle("off", !visible);
});
const curves = document.getElementById("curves");
for (const chart of curves ? JSON.parse(curves.textContent) : []) {
  const svg = all("[data-chart]").find(element => element.dataset.chart === chart.field);
  const pointer = svg.querySelector(".pointer");
  svg.addEventListener("pointermove", event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const rows = [];
    let samples = null;
    for (const line of chart.lines) {
      const path = all(".curve", svg).find(element => element.dataset.line === line.name);
      const first = line.points[0][0], last = line.points[line.points.length - 1][0];
      if (path.classList.contains("off") || x < first - 2 || x > last + 2) continue;
      let nearest = 0;
      line.points.forEach((point, index) => {
        if (Math.abs(point[0] - x) < Math.abs(line.points[nearest][0] - x)) nearest = index;
      });
      samples ??= line.samples[nearest];
      rows.push(line.name + "  " + line.values[nearest].toPrecision(3));
    }
    if (!rows.length) { hideTip(); pointer.setAttribute("hidden", ""); return; }
    pointer.removeAttribute("hidden");
    pointer.setAttribute("x1", x);
    pointer.setAttribute("x2", x);
    showTip(event, Math.round(samples).toLocaleString("en") + " samples\n" + rows.join("\n"));
  });
  svg.addEventListener("pointerleave", () => { hideTip(); pointer.setAttribute("hidden", ""); });
}
