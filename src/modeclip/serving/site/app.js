// The frame: which view is open, the address that says so, colours, and the tour.
import { life, watch } from "./api.js";
import { facts } from "./facts.js";
import { startTour, tourIsNew } from "./tour.js";

const TITLES = { search: "Search", classify: "Classify", atlas: "Atlas", runs: "Runs", system: "System" };
const main = document.getElementById("main");
let open = null, turn = 0;

/** Read the address: the view and what it shows. Everything that a reload must find again is in there. */
export function readAddress() {
  const [view, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { view: view in TITLES ? view : "search", state: new URLSearchParams(query) };
}

/** Change the address: empty values are left out. With `replace` the back button does not stop here. Returns whether it has changed. */
export function go(view, values, { replace = false, quiet = false } = {}) {
  const state = new URLSearchParams();
  for (const [name, value] of values instanceof URLSearchParams ? values : Object.entries(values)) {
    for (const one of Array.isArray(value) ? value : [value]) if (one !== null && one !== undefined && one !== "" && one !== false) state.append(name, one === true ? "1" : one);
  }
  const query = state.toString(), address = `#/${view}${query ? "?" + query : ""}`;
  if (address === location.hash) return false;
  history[replace ? "replaceState" : "pushState"](null, "", address);
  if (!quiet) show();
  return true;
}

async function show({ anew = false } = {}) {
  const { view, state } = readAddress(), mine = ++turn;
  for (const dialog of document.querySelectorAll("dialog.passing")) dialog.close();
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TITLES[view]} · modeclip`;
  if (open?.view === view && !anew) {
    open.update?.(state);
    return;
  }
  const module = await import(`./${view}.js`);
  if (mine !== turn) return;
  const moved = open && open.view !== view;
  open?.close?.();
  const place = document.createElement("div");
  place.className = `view ${view}`;
  main.replaceChildren(place);
  open = { view, ...module.open(place, state) };
  if (moved) { scrollTo(0, 0); main.focus({ preventScroll: true }); }
}

const THEMES = ["", "light", "dark"];
function setTheme(theme) {
  document.documentElement.style.colorScheme = theme || "";
  document.getElementById("theme").setAttribute("aria-label", theme ? `Colours: ${theme}` : "Colours: as the system has them");
  if (theme) localStorage.setItem("modeclip.theme", theme);
  else localStorage.removeItem("modeclip.theme");
  document.dispatchEvent(new Event("recolour"));
}
document.getElementById("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(localStorage.getItem("modeclip.theme") ?? "") + 1) % 3]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("recolour")));
setTheme(localStorage.getItem("modeclip.theme") ?? "");

document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); main.focus(); });
document.getElementById("help").addEventListener("click", startTour);
document.addEventListener("keydown", event => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
  event.preventDefault();
  if (readAddress().view !== "search") go("search", {});
  requestAnimationFrame(() => document.getElementById("q")?.focus());
});
addEventListener("popstate", () => show());
addEventListener("hashchange", () => show());
life.addEventListener("restarted", () => { facts.forget(); show({ anew: true }); });

facts.models().then(models => { document.getElementById("served").textContent = models.data[0].id; }, () => {});
watch();
show().then(() => { if (tourIsNew()) startTour(); });
