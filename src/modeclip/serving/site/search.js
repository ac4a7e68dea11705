// Search: words, a picture, or both; a grid of what fits, how well, and which experts say so.
import { ask, picture } from "./api.js";
import { go } from "./app.js";
import { facts, someWords, wordsOfExperts } from "./facts.js";
import { empty, failure, h, later, legend, openDialog, percent, plural, shortName, speak, stack, thousands, toneOf, waiting } from "./parts.js";
import { chooser, fetchPicture, keep, kept, takePictures } from "./pictures.js";

const COUNT = 48;
const PLACEHOLDER = "for example umbrella", BESIDE = "and words, if you like";
const FILTERS = ["least", "expert", "not", "where", "hybrid", "n", "index"];

export function open(place, start) {
  let state = start, asked = null, words = {}, closed = false;
  const field = h("input", { id: "q", type: "search", name: "q", autocomplete: "off", spellcheck: "false", maxlength: 2000, placeholder: PLACEHOLDER, "aria-label": "What the pictures should show" });
  const chosen = h("div", { class: "chosen", hidden: true });
  const results = h("div", { class: "results", "aria-live": "off" });
  const least = h("input", { id: "least", type: "range", min: 0, max: 0.99, step: 0.01, oninput: () => { leastShown.textContent = percent(Number(least.value)); } });
  const leastShown = h("output", { for: "least" });
  const expert = h("select", { id: "expert" }, h("option", { value: "" }, "all, as the words are routed"));
  const index = h("select", { id: "index" });
  const indexField = h("label", { class: "field", hidden: true }, "Index", index);
  const count = h("select", { id: "count" }, [24, 48, 96, 192].map(number => h("option", { value: number }, number)));
  const negatives = h("input", { id: "not", placeholder: "people, text", autocomplete: "off" });
  const where = h("input", { id: "where", placeholder: "width > 64", autocomplete: "off", list: "columns" });
  const weight = h("input", { id: "weight", type: "range", min: 0, max: 1, step: 0.05 });
  const weightField = h("label", { class: "field", hidden: true }, "Words or picture", h("span", { class: "ends" }, "words", weight, "picture"));
  const hybrid = h("input", { id: "hybrid", type: "checkbox" });
  const complain = error => { results.replaceChildren(failure(error)); speak(error.message); };
  const usePicture = data => set({ pic: keep(data), like: null });
  const form = h("form", { class: "ask", role: "search", onsubmit: event => { event.preventDefault(); submit(); } },
    h("div", { class: "line" }, chosen, field, h("button", { class: "main", type: "submit" }, "Search")));
  const heading = h("summary", {}, "Filters");
  const filters = h("details", { class: "filters" }, heading,
    h("div", { class: "fields" },
      h("label", { class: "field" }, h("span", {}, "Cut-off: leave out hits weaker than ", leastShown, " of known pairs"), least),
      h("label", { class: "field" }, "Experts", expert), indexField,
      h("label", { class: "field" }, "At most", count),
      h("label", { class: "field" }, "Not wanted", negatives),
      h("label", { class: "field" }, "Condition on the columns", where),
      weightField,
      h("label", { class: "check" }, hybrid, "Rank by the words of captions too")));
  const read = takePictures(place, usePicture, complain);
  form.querySelector(".line").insertBefore(chooser("Picture", read, { class: "quietly", title: "Search by a picture; dropping or pasting one works too" }), form.querySelector(".main"));
  place.append(h("section", { class: "hero" }, h("h1", {}, "Search"),
    h("p", { class: "lead" }, "Say what you look for, or drop a picture here. Each question is answered by the experts whose data fits it."), form, filters), results);

  const set = (changes, options) => go("search", { ...Object.fromEntries(state), where: state.getAll("where"), ...changes }, options);
  function submit(options) {
    const changed = set({
      q: field.value.trim(), least: Number(least.value) || null, expert: expert.value, index: index.value === index.options[0]?.value ? null : index.value, n: Number(count.value) === COUNT ? null : count.value,
      not: negatives.value.trim(), where: where.value.split(";").map(word => word.trim()).filter(Boolean), hybrid: hybrid.checked, w: Number(weight.value) === 0.5 ? null : weight.value,
    }, options);
    if (!changed) run();
  }
  const soon = later(() => submit({ replace: true }), 250);
  least.addEventListener("input", soon);
  weight.addEventListener("input", soon);
  for (const one of [expert, index, count, hybrid]) one.addEventListener("change", () => submit());
  for (const one of [negatives, where]) one.addEventListener("change", () => submit());

  function fill() {
    field.value = state.get("q") ?? "";
    least.value = state.get("least") ?? 0;
    leastShown.textContent = percent(Number(least.value));
    expert.value = state.get("expert") ?? "";
    count.value = state.get("n") ?? COUNT;
    negatives.value = state.get("not") ?? "";
    where.value = state.getAll("where").join("; ");
    hybrid.checked = state.has("hybrid");
    weight.value = state.get("w") ?? 0.5;
    const source = kept(state.get("pic")) ?? state.get("like");
    chosen.hidden = !source;
    weightField.hidden = !source || !field.value;
    field.placeholder = source ? BESIDE : PLACEHOLDER;
    chosen.replaceChildren(...(source ? [picture(source, { alt: "The picture that is searched by", loading: "eager" }),
      h("button", { type: "button", class: "plain", "aria-label": "Search without the picture", onclick: () => set({ pic: null, like: null }) }, "×")] : []));
    const used = FILTERS.filter(name => state.has(name)).length;
    heading.textContent = used ? `Filters: ${used}` : "Filters";
    if (used && matchMedia("(min-width: 761px)").matches) filters.open = true; // on a phone they would hide the hits
  }

  async function imageOf() {
    if (kept(state.get("pic"))) return kept(state.get("pic"));
    if (!state.get("like")) return null;
    return fetchPicture(state.get("like"));
  }

  async function run() {
    asked?.abort();
    asked = new AbortController();
    const { signal } = asked, text = (state.get("q") ?? "").trim() || null;
    place.classList.toggle("idle", !text && !state.has("pic") && !state.has("like"));
    if (state.has("pic") && !kept(state.get("pic"))) {
      results.replaceChildren(empty("The picture is gone", "It was kept in another tab. Drop it here again."));
      if (!text) return;
    }
    if (!text && !state.has("pic") && !state.has("like")) return suggest();
    const slow = setTimeout(() => results.replaceChildren(waiting("Searching")), results.querySelector(".grid") ? 600 : 120);
    try {
      const image = await imageOf();
      const body = { count: Number(state.get("n") ?? COUNT), least_strength: Number(state.get("least") ?? 0), where: state.getAll("where"), hybrid: state.has("hybrid") && Boolean(text),
        negatives: (state.get("not") ?? "").split(",").map(word => word.trim()).filter(Boolean), expert: state.get("expert") || null, index: state.get("index") || null,
        ...(text ? { text } : {}), ...(image ? { image, image_weight: Number(state.get("w") ?? 0.5) } : {}) };
      const found = await ask("/search", { body, signal });
      if (!closed && !signal.aborted) show(found);
    } catch (error) {
      if (error.name !== "AbortError" && !closed) { results.replaceChildren(failure(error, error.status >= 500 || error.status === 401 ? run : null, state.has("where") ? without() : null)); speak(error.message); }
    } finally {
      clearTimeout(slow);
    }
  }

  async function suggest() {
    const [known, names] = await Promise.all([facts.models().catch(() => null), someWords(10)]);
    if (closed || state.get("q")) return;
    const rows = known ? Object.values(known.data[0].indexes).reduce((sum, index) => sum + index.images, 0) : null;
    if (known && !rows) {
      results.replaceChildren(empty("There is no index to search", "Make one of a catalog, then start the service with it:",
        h("pre", {}, "modeclip search build CATALOG --model BUNDLE --out INDEX\nmodeclip serve BUNDLE --index INDEX")));
      return;
    }
    results.replaceChildren(await sky(), h("div", { class: "suggest" }, names.length ? h("p", {}, rows ? `${thousands(rows)} pictures, for example:` : "For example:") : null,
      h("div", { class: "chips" }, names.map(name => h("button", { type: "button", onclick: () => { field.value = name; submit(); } }, name)))));
  }

  const without = () => h("button", { type: "button", onclick: () => set({ least: null, where: null }) }, "Without filters");

  function show(found) {
    const hits = found.hits, weaker = state.has("least") ? ` at or above ${percent(Number(state.get("least")))}` : "";
    const line = h("div", { class: "summary" },
      h("p", {}, h("strong", {}, plural(hits.length, "hit")), `${weaker} among ${thousands(found.num_searched)} pictures${found.exact ? "" : ", by the approximate index"}`),
      Object.keys(found.weights).length > 1 ? legend(found.weights, words) : null);
    speak(`${plural(hits.length, "hit")} among ${thousands(found.num_searched)} pictures`);
    if (!hits.length) {
      results.replaceChildren(line, empty("Nothing is that close", state.has("least") || state.has("where") ? "Lower the cut-off, or leave out a condition." : "Try other words.",
        without()));
      return;
    }
    results.replaceChildren(line, h("ul", { class: "grid" }, hits.map((hit, place) => h("li", {},
      h("button", { type: "button", class: "hit", "aria-label": `${hit.caption || hit.key}, strength ${percent(hit.strength)}`, onclick: () => detail(hit, found) },
        picture(`${hit.picture}?size=320`, { loading: place < 24 ? "eager" : "lazy" }),
        h("span", { class: "caption" }, hit.caption || hit.key),
        h("span", { class: "figures" }, h("b", {}, percent(hit.strength)), ` ${hit.score.toFixed(3)}`),
        h("span", { class: "meter", style: { "--whole": hit.strength } }, stack(hit.parts, { label: "What each expert adds" })))))));
  }

  function detail(hit, found) {
    const parts = Object.entries(hit.parts), most = Math.max(...parts.map(([, share]) => Math.abs(share)), 1e-9);
    const again = h("a", { class: "button", href: `#/search?${new URLSearchParams({ like: `${hit.picture}?size=1024`, ...(state.has("index") ? { index: state.get("index") } : {}) })}`, onclick: () => dialog.close() }, "Similar pictures");
    const classify = h("a", { class: "button", href: `#/classify?${new URLSearchParams({ like: `${hit.picture}?size=1024` })}`, onclick: () => dialog.close() }, "Classify it");
    const onMap = h("a", { class: "button", href: `#/atlas?${new URLSearchParams({ key: hit.key })}`, onclick: () => dialog.close(), hidden: true }, "Show on the atlas");
    facts.run().then(run => { onMap.hidden = !run; }, () => {});
    const dialog = openDialog(hit.caption || hit.key, h("div", { class: "detail" },
      h("div", { class: "frame" }, picture(`${hit.picture}?size=1024`, { alt: hit.caption || hit.key, loading: "eager" })),
      h("div", {}, h("h2", {}, hit.caption || hit.key),
        h("dl", {},
          h("dt", {}, "Strength"), h("dd", {}, h("b", {}, percent(hit.strength)), " of known pairs fit their own picture less well"),
          h("dt", {}, "Height"), h("dd", {}, `${hit.height.toFixed(1)} standard deviations above the mean of the index`),
          h("dt", {}, "Score"), h("dd", {}, hit.score.toFixed(4)),
          parts.length > 1 ? [h("dt", {}, "Experts"), h("dd", { class: "adds" }, parts.map(([name, share], position) =>
            h("span", { class: toneOf(name, position) }, h("i", { class: "key" }), `${shortName(name)} `, h("small", {}, `weight ${percent(found.weights[name] ?? 0)}`), h("i", { class: "add", style: { "--part": Math.abs(share) / most } }), h("b", {}, share.toFixed(3)))))] : null,
          h("dt", {}, "Key"), h("dd", {}, h("code", {}, hit.key)),
          hit.path ? [h("dt", {}, "File"), h("dd", {}, h("code", {}, hit.path))] : null),
        h("div", { class: "row" }, again, classify, onMap))));
    dialog.classList.add("passing");
  }

  facts.models().then(known => {
    const model = known.data?.[0];
    if (model?.experts.length > 1) expert.append(...model.experts.map(name => h("option", { value: name }, shortName(name))));
    else expert.closest("label").hidden = true;
    const names = Object.keys(model?.indexes ?? {});
    index.append(...names.map(name => h("option", { value: name }, name)));
    indexField.hidden = names.length < 2;
    expert.value = state.get("expert") ?? "";
    index.value = state.get("index") ?? names[0] ?? "";
    place.append(h("datalist", { id: "columns" }, [...new Set(Object.values(model?.indexes ?? {}).flatMap(one => one.columns))].map(name => h("option", { value: `${name} = ` }))));
  }, () => {});
  wordsOfExperts().then(found => { words = found; });
  fill();
  run();
  if (!state.get("q") && matchMedia("(hover: hover)").matches) field.focus({ preventScroll: true });
  return {
    update(now) { state = now; fill(); run(); },
    close() { closed = true; asked?.abort(); soon.cancel(); },
  };
}

/** The discs of the atlas behind the empty page. */
async function sky() {
  const run = await facts.run().catch(() => null), make = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const svg = make("svg", { class: "sky", viewBox: "-1 -0.7 2 1.4", preserveAspectRatio: "xMidYMid slice", "aria-hidden": "true" });
  for (const { disc: [x, y, r], expert } of run?.clusters ?? []) svg.append(make("circle", { cx: (x * 1.25).toFixed(3), cy: (y * 1.05).toFixed(3), r: (r * 0.8).toFixed(3), class: `e${Math.min(63, expert)}` }));
  return svg;
}
