// Atlas: all pairs on one map; colours, cards of clusters, and selections that become masks for training.
import { ask, picture } from "./api.js";
import { go } from "./app.js";
import { facts } from "./facts.js";
import { AtlasMap } from "./map.js";
import { empty, failure, h, icon, later, percent, plural, speak, thousands, waiting } from "./parts.js";

const NAMES = { fine_distance: "distance to the centre", group: "source" };
const KINDS = { expert: "Made here", mask: "Masks", number: "Numbers", text: "Texts" };
let known = null; // the points, kept while the page is open

export function open(place, start) {
  let state = start, map = null, summary = null, closed = false, clusters = new Set(), colour = null, moves = 0;
  place.append(h("h1", { class: "quiet" }, "Atlas"), waiting("Placing all pairs on the map; the first time this takes some seconds"));

  const canvas = h("canvas", { tabindex: 0, role: "application", "aria-roledescription": "map",
    "aria-label": "Map of all pairs. Arrows move, plus and minus zoom, 0 shows all, Enter opens the cluster in the middle. The list of clusters has the same." });
  const tip = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
  const choice = h("select", { id: "colour", onchange: () => set({ colour: choice.value === "expert" ? null : choice.value }) });
  const keyOf = h("div", { class: "keys" });
  const side = h("aside", { class: "side", "aria-label": "What is picked", hidden: true });
  const tools = h("div", { class: "map-tools", role: "toolbar", "aria-label": "Map" },
    tool("move", "Move", "M12 3v18M3 12h18M12 3l-3 3m3-3 3 3M12 21l-3-3m3 3 3-3M3 12l3-3m-3 3 3 3M21 12l-3-3m3 3-3 3"),
    tool("lasso", "Lasso", "M12 4c5 0 9 2.5 9 6s-4 6-9 6-9-2.5-9-6 4-6 9-6zM7 15c-2 2 0 4-2 6"),
    h("span", {}),
    action("Zoom in", "M12 5v14M5 12h14", () => map.zoomAt(1.6)), action("Zoom out", "M5 12h14", () => map.zoomAt(1 / 1.6)), action("Show all", "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5", () => map.reset()));
  const name = h("input", { id: "mask", placeholder: "name, such as weather_icons", pattern: "[A-Za-z][A-Za-z0-9_]{0,62}", required: true, autocomplete: "off", spellcheck: "false", "aria-label": "Name of the selection" });
  const size = h("strong", {});
  const said = h("p", { class: "said", role: "status" }), clearer = h("button", { type: "button", onclick: clear }, "Clear");
  const selection = h("form", { class: "selection", hidden: true, "aria-label": "Selection", onsubmit: event => { event.preventDefault(); save(); } },
    size, name, h("button", { class: "main", type: "submit" }, "Save as mask"), clearer, said);
  const finder = h("input", { type: "search", placeholder: "Find a cluster", "aria-label": "Find a cluster by its words", autocomplete: "off", oninput: () => list() });
  const names = h("ul", { class: "names" });
  const index = h("details", { class: "index" }, h("summary", {}, "Clusters"), finder, names);
  const hint = h("p", { class: "hint" });

  const set = (changes, options) => go("atlas", { ...Object.fromEntries(state), ...changes }, options);
  const note = later(() => { if (!closed && map) set({ x: map.isHome ? null : map.view.x.toFixed(4), y: map.isHome ? null : map.view.y.toFixed(4), zoom: map.isHome ? null : map.view.zoom.toPrecision(4) }, { replace: true, quiet: true }); state = new URLSearchParams(location.hash.split("?")[1] ?? ""); }, 300);

  function tool(mode, label, path) {
    return h("button", { type: "button", class: "plain", "aria-pressed": mode === "move", "data-mode": mode, title: mode === "lasso" ? "Draw around points to select them; holding Shift does it too" : "Drag to move the map", onclick: () => setMode(mode) }, icon(path), h("small", {}, label));
  }
  function action(label, path, work) {
    return h("button", { type: "button", class: "plain", "aria-label": label, title: label, onclick: work }, icon(path));
  }
  function setMode(mode) {
    map.mode = mode;
    canvas.dataset.mode = mode;
    for (const button of tools.querySelectorAll("[data-mode]")) button.setAttribute("aria-pressed", button.dataset.mode === mode);
  }

  async function load() {
    try {
      summary = await facts.run();
      if (!summary) {
        place.replaceChildren(h("h1", { class: "quiet" }, "Atlas"), empty("There is no atlas here", "It shows the training pairs of a run. Start the service with the folder of a run:", h("pre", {}, "modeclip serve runs/demo")));
        return;
      }
      const mark = `${summary.run} ${summary.num_pairs} ${summary.clusters.map(cluster => cluster.disc.join()).join()}`;
      if (known?.mark !== mark) known = { mark, points: new Float32Array(await (await ask("/atlas/points", { as: "response" })).arrayBuffer()) };
      if (closed) return;
      build();
    } catch (error) {
      if (!closed) place.replaceChildren(h("h1", { class: "quiet" }, "Atlas"), failure(error, () => { facts.forget(); place.replaceChildren(waiting("Loading")); load(); }));
    }
  }

  function build() {
    place.replaceChildren(h("h1", { class: "quiet" }, "Atlas"), h("div", { class: "map" }, canvas, tools, tip,
      h("div", { class: "panel" }, h("label", { class: "field" }, "Colour", choice), keyOf, index), selection, hint), side);
    fillChoice();
    hint.textContent = `${thousands(summary.num_pairs)} pairs in ${thousands(summary.clusters.length)} clusters${summary.step > 1 ? `, every ${summary.step}th is shown` : ""}. Zoom in for pictures; click a cluster; draw a lasso to select.`;
    map = new AtlasMap(canvas, summary, known.points, {
      moved: () => { if (++moves === 4) hint.hidden = true; note(); },
      picked: pick, drawn: addPolygon, hovered: hover,
    });
    canvas.map = map;
    if (state.has("zoom") || state.has("x")) map.setView({ x: Number(state.get("x") ?? 0), y: Number(state.get("y") ?? 0), zoom: Number(state.get("zoom") ?? 1) });
    index.addEventListener("toggle", () => list(), { once: true });
    apply(!state.has("zoom"));
  }

  function fillChoice() {
    const groups = Object.entries(KINDS).map(([kind, label]) => [label, summary.colours.filter(one => one.kind === kind || (kind === "expert" && one.name === "novelty")).filter(one => kind === "expert" || one.name !== "novelty")]);
    choice.replaceChildren(...groups.filter(([, colours]) => colours.length).map(([label, colours]) => h("optgroup", { label }, colours.map(one => h("option", { value: one.name }, NAMES[one.name] ?? one.name)))));
  }

  function apply(moveThere = true) {
    const wanted = state.get("colour") ?? "expert";
    if (wanted !== colour) recolour(wanted);
    if (state.has("key")) findKey(state.get("key"));
    else if (state.has("row")) showPair(Number(state.get("row")), moveThere);
    else if (state.has("cluster")) showCluster(Number(state.get("cluster")), moveThere);
    else shut();
  }

  async function recolour(wanted) {
    try {
      const response = await ask(`/atlas/colour/${encodeURIComponent(wanted)}`, { as: "response" });
      const legend = JSON.parse(response.headers.get("X-Legend")), codes = new Uint8Array(await response.arrayBuffer());
      if (closed) return;
      colour = wanted;
      choice.value = wanted;
      map.setCodes(codes, legend);
      showKeys(legend, codes);
    } catch (error) {
      if (!closed) { colour = null; choice.value = ""; keyOf.replaceChildren(h("p", { class: "warn", role: "alert" }, error.message)); }
    }
  }

  function showKeys(legend, codes) {
    if (legend.kind === "number") {
      const [low, high] = legend.range.map(number => Number(number.toPrecision(3)).toLocaleString("en"));
      keyOf.replaceChildren(h("div", { class: "ramp", role: "img", "aria-label": `Colours from ${low} to ${high}` }), h("div", { class: "ends" }, h("span", {}, low), h("span", {}, high)));
      return;
    }
    const counts = new Uint32Array(256);
    for (const code of codes) counts[code]++;
    keyOf.replaceChildren(h("ul", {}, legend.categories.map((words, code) => h("li", { class: legend.kind === "mask" ? (code ? "is" : "not") : `e${Math.min(63, code)}` },
      h("i", { class: "key" }), words, h("small", {}, thousands(counts[code] * summary.step))))));
    if (summary.colours.find(one => one.name === colour)?.own) keyOf.append(remover(colour));
  }

  function remover(mask) {
    const button = h("button", { type: "button", class: "quietly", onclick: async () => {
      if (!button.dataset.sure) { button.dataset.sure = "yes"; button.textContent = "Delete it for good?"; return; }
      try {
        await ask(`/atlas/masks/${encodeURIComponent(mask)}`, { method: "DELETE" });
        facts.forget();
        summary.colours = (await facts.run()).colours;
        fillChoice();
        set({ colour: null });
        speak(`The mask ${mask} is deleted`);
      } catch (error) {
        keyOf.append(h("p", { class: "warn", role: "alert" }, error.message));
      }
    } }, "Delete this mask");
    return button;
  }

  // ------------------------------------------------------------ what is picked

  function pick({ cluster = null, row = null }) {
    set({ cluster, row, key: null });
  }

  function hover(cluster, event) {
    tip.hidden = !cluster || event.pointerType === "touch";
    if (tip.hidden) return;
    tip.replaceChildren(h("b", {}, cluster.keywords.slice(0, 3).join(", ") || cluster.caption), ` ${plural(cluster.size, "pair")}, expert ${cluster.expert}`);
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    tip.style.left = `${Math.min(x + 14, box.width - tip.offsetWidth - 8)}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > box.height ? y - tip.offsetHeight - 10 : y + 18}px`;
  }

  function shut() {
    side.hidden = true;
    if (map) { map.picked = map.pickedRow = null; map.draw(); }
  }
  const shutter = () => h("button", { type: "button", class: "plain shut", "aria-label": "Close", onclick: () => { set({ cluster: null, row: null, key: null }); canvas.focus(); } }, "×");

  async function showCluster(index, moveThere) {
    const card = summary.clusters[index];
    if (!card) { side.hidden = false; side.replaceChildren(shutter(), empty("There is no such cluster", `The run has the clusters 0 to ${summary.clusters.length - 1}.`)); return; }
    map.picked = index;
    map.pickedRow = null;
    if (moveThere) map.show(card.disc, card.disc[2] * 1.5);
    side.hidden = false;
    side.className = `side e${Math.min(63, card.expert)}`;
    side.replaceChildren(shutter(), h("h2", {}, card.keywords.slice(0, 3).join(", ") || `Cluster ${index}`), waiting("Reading the pictures"));
    try {
      const found = await ask(`/atlas/cluster/${index}?count=24`);
      if (closed || state.get("cluster") !== String(index)) return;
      const chosen = () => clusters.has(index);
      const toggle = h("button", { type: "button", class: "main", onclick: () => { if (!clusters.delete(index)) clusters.add(index); toggle.textContent = chosen() ? "Leave out of the selection" : "Add to the selection"; select(); } }, chosen() ? "Leave out of the selection" : "Add to the selection");
      side.replaceChildren(shutter(),
        h("h2", {}, found.keywords.slice(0, 3).join(", ") || `Cluster ${index}`),
        h("p", { class: "lead" }, h("i", { class: "key" }), `Cluster ${index}: ${plural(found.size, "pair")}, ${found.experts.length > 1 ? `experts ${found.experts.join(", ")}` : `expert ${found.expert}`}`),
        h("p", { class: "words" }, found.keywords.map(word => h("span", {}, word))),
        h("div", { class: "thumbs" }, found.pairs.map(pair => h("button", { type: "button", title: pair.caption, "aria-label": pair.caption || pair.key, onclick: () => set({ row: pair.row, cluster: null }) }, picture(`/atlas/pictures/${pair.row}?size=96`)))),
        h("p", { class: "note" }, "From the centre of the cluster to its rim."),
        h("dl", {}, h("dt", {}, "Nearest captions"), h("dd", {}, found.nearest_captions.join(" · ") || "none"),
          h("dt", {}, "Mean distance"), h("dd", {}, `${found.radius.toFixed(3)}; 90 % within ${found.radius_90.toFixed(3)}`),
          Object.entries(found.masks).map(([mask, share]) => [h("dt", {}, mask), h("dd", {}, percent(share))])),
        h("div", { class: "row" }, toggle, h("a", { class: "button", href: `#/search?${new URLSearchParams({ q: found.nearest_captions[0] ?? found.keywords[0] ?? "" })}` }, "Search for it")));
      speak(`Cluster ${found.keywords.slice(0, 3).join(", ")}, ${plural(found.size, "pair")}`);
    } catch (error) {
      if (!closed) side.replaceChildren(shutter(), failure(error));
    }
  }

  async function findKey(key) {
    try {
      const { pairs } = await ask(`/atlas/pairs?${new URLSearchParams({ key })}`);
      if (closed || state.get("key") !== key) return;
      if (pairs[0]) set({ key: null, row: pairs[0].row, x: null, y: null, zoom: null }, { replace: true });
      else { side.hidden = false; side.replaceChildren(shutter(), empty("This pair is not on the atlas", "It comes from another catalog.")); }
    } catch (error) {
      if (!closed) { side.hidden = false; side.replaceChildren(shutter(), failure(error)); }
    }
  }

  async function showPair(row, moveThere) {
    side.hidden = false;
    side.replaceChildren(shutter(), waiting("Reading the pair"));
    try {
      const { pairs: [pair] } = await ask(`/atlas/pairs?row=${row}`);
      if (closed || state.get("row") !== String(row)) return;
      const card = summary.clusters[pair.cluster];
      map.picked = pair.cluster;
      map.pickedRow = row;
      if (moveThere) map.show(pair.place, card.disc[2] * 0.4);
      map.draw();
      side.className = `side e${Math.min(63, pair.expert)}`;
      side.replaceChildren(shutter(), h("div", { class: "frame" }, picture(`/atlas/pictures/${row}?size=512`, { alt: pair.caption, loading: "eager" })),
        h("h2", {}, pair.caption || "no caption"),
        h("p", { class: "lead" }, h("i", { class: "key" }), `expert ${pair.expert}, `, h("a", { href: `#/atlas?cluster=${pair.cluster}` }, `cluster ${card.keywords.slice(0, 3).join(", ") || pair.cluster}`)),
        h("dl", {}, h("dt", {}, "Novelty"), h("dd", {}, `${percent(pair.novelty)} of its cluster lie nearer to the centre`), h("dt", {}, "Key"), h("dd", {}, h("code", {}, pair.key)), h("dt", {}, "Row"), h("dd", {}, thousands(pair.row))),
        h("div", { class: "row" }, h("a", { class: "button", href: `#/search?${new URLSearchParams({ like: `/atlas/pictures/${row}?size=512` })}` }, "Similar pictures"),
          h("a", { class: "button", href: `#/classify?${new URLSearchParams({ like: `/atlas/pictures/${row}?size=512` })}` }, "Classify it")));
    } catch (error) {
      if (!closed) side.replaceChildren(shutter(), failure(error));
    }
  }

  function list() {
    if (!summary) return;
    const words = finder.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [...summary.clusters].filter(cluster => cluster.size && words.every(word => `${cluster.keywords.join(" ")} ${cluster.caption}`.toLowerCase().includes(word))).sort((one, other) => other.size - one.size);
    names.replaceChildren(...found.slice(0, 200).map(cluster => h("li", { class: `e${Math.min(63, cluster.expert)}` }, h("button", { type: "button", onclick: () => pick({ cluster: cluster.index }) },
      h("i", { class: "key" }), h("span", {}, cluster.keywords.slice(0, 3).join(", ") || cluster.caption), h("small", {}, thousands(cluster.size))))));
    if (!found.length) names.replaceChildren(h("li", {}, h("small", {}, "No cluster has these words.")));
  }

  // ------------------------------------------------------------ selections

  function addPolygon(polygon) {
    map.polygons.push(polygon);
    setMode("move");
    select();
  }

  function select() {
    const any = map.polygons.length || clusters.size;
    map.chosen = any ? map.inside(map.polygons, clusters) : null;
    map.draw();
    selection.hidden = !any;
    selection.classList.remove("saved");
    clearer.textContent = "Clear";
    said.textContent = "";
    if (!any) return;
    const count = map.chosen.reduce((sum, one) => sum + one, 0);
    size.textContent = plural(count * summary.step, "pair") + " selected";
    speak(size.textContent);
  }

  function copier(command) {
    const button = h("button", { type: "button", hidden: !navigator.clipboard, onclick: async () => { await navigator.clipboard.writeText(command); button.textContent = "Copied"; } }, "Copy");
    return button;
  }

  function clear() {
    map.polygons = [];
    clusters = new Set();
    select();
    canvas.focus();
  }

  async function save(replace = false) {
    said.textContent = "Saving";
    try {
      const done = await ask("/atlas/masks", { body: { name: name.value.trim(), polygons: map.polygons, clusters: [...clusters], replace } });
      if (closed) return;
      said.replaceChildren(`Saved: ${plural(done.num_selected, "pair")} in the column `, h("code", {}, done.name), ". Train on it: ", h("code", { class: "command" }, done.commands[0]), copier(done.commands[0]));
      selection.classList.add("saved");
      clearer.textContent = "Close";
      facts.forget();
      summary.colours = (await facts.run()).colours;
      fillChoice();
      colour = null;
      map.chosen = null;
      map.polygons = [];
      clusters = new Set();
      if (!set({ colour: done.name })) apply(false);
      speak(`Saved as mask ${done.name}`);
    } catch (error) {
      if (closed) return;
      said.replaceChildren(h("span", { class: "warn", role: "alert" }, error.message), error.status === 409 ? h("button", { type: "button", onclick: () => save(true) }, "Replace it") : "");
    }
  }

  place.addEventListener("keydown", event => { // closes the card, as it would a dialog
    if (event.key !== "Escape" || side.hidden) return;
    set({ cluster: null, row: null, key: null });
    canvas.focus();
  });

  load();
  return {
    update(now) { state = now; if (map) apply(); },
    close() { closed = true; note.cancel(); map?.close(); },
  };
}
