// Four steps at the first visit; the question mark shows them again.
import { h, openDialog } from "./parts.js";

const KEY = "modeclip.tour";
const STEPS = [
  ["search", "Search by words or by a picture", "Type what you look for, or drop a picture on the page. The coloured bars say which experts answered, and the cut-off leaves out what is weak."],
  ["classify", "Classify what you draw", "Draw something, type some classes, and see what it is: with each expert's weight, and the training pictures that are the reason."],
  ["atlas", "Look at all training pairs", "Every disc is a cluster of captions, every point a pair. Zoom in for pictures. Draw a lasso around some: saved as a mask, training takes them with --mask."],
  ["runs", "Follow what is trained and served", "Runs shows the report, training as it goes on and the data check; System shows memory and latency."],
];

export const tourIsNew = () => !localStorage.getItem(KEY);

export function startTour() {
  if (document.querySelector("dialog.tour")) return;
  let step = 0;
  const heading = h("h2", {}), text = h("p", {}), dots = h("p", { class: "dots", "aria-hidden": "true" }, STEPS.map(() => h("i", {}))), count = h("small", {});
  const back = h("button", { type: "button", onclick: () => show(step - 1) }, "Back");
  const next = h("button", { type: "button", class: "main", onclick: () => (step === STEPS.length - 1 ? dialog.close() : show(step + 1)) });
  const dialog = openDialog("Tour", count, heading, text, dots, h("div", { class: "row" }, h("button", { type: "button", class: "quietly", onclick: () => dialog.close() }, "Skip"), back, next));
  dialog.classList.add("tour");
  dialog.addEventListener("close", () => { localStorage.setItem(KEY, "seen"); light(null); });
  const light = view => { for (const link of document.querySelectorAll("[data-view]")) link.classList.toggle("lit", link.dataset.view === view || (view === "runs" && link.dataset.view === "system")); };
  function show(number) {
    step = number;
    const [view, title, words] = STEPS[step];
    heading.textContent = title;
    text.textContent = words;
    count.textContent = `${step + 1} of ${STEPS.length}`;
    [...dots.children].forEach((dot, place) => dot.classList.toggle("now", place === step));
    back.hidden = step === 0;
    next.textContent = step === STEPS.length - 1 ? "Begin" : "Next";
    light(view);
    next.focus();
  }
  show(0);
}
