// Classify: a picture that is dropped or drawn, classes that are typed; probabilities, who answers, and why.
import { ask, picture } from "./api.js";
import { go } from "./app.js";
import { facts, someWords, wordsOfExperts } from "./facts.js";
import { empty, failure, fill, h, later, legend, percent, shortName, speak, stack, toneOf, waiting } from "./parts.js";
import { chooser, drawingBoard, fetchPicture, keep, kept, takePictures } from "./pictures.js";

const STARTERS = "heart, home, star, cloud, arrow, user, camera, lock";

export const classesOf = text => [...new Set(text.split(/[,\n]/).map(word => word.trim()).filter(Boolean))];

export function open(place, start) {
  let state = start, asked = null, closed = false, words = {}, drawn = false;
  const field = h("textarea", { id: "classes", rows: 2, spellcheck: "false", placeholder: STARTERS });
  const template = h("input", { id: "template", placeholder: "the model's own, such as a photo of a {}", autocomplete: "off" });
  const shown = h("div", { class: "shown" });
  const results = h("div", { class: "results" }), quick = h("p", { class: "quick", "aria-hidden": "true" });
  const complain = error => { results.replaceChildren(failure(error)); speak(error.message); };
  const board = drawingBoard(data => { drawn = Boolean(data); set({ pic: data ? keep(data) : null, like: null, drawn: Boolean(data) }, { replace: state.has("drawn") }); });
  const read = takePictures(place, data => { drawn = false; set({ pic: keep(data), like: null, drawn: null }); }, complain);
  const chips = h("div", { class: "chips" });
  place.append(h("section", { class: "hero" }, h("h1", {}, "Classify"),
    h("p", { class: "lead" }, "Draw something or drop a picture, and type the classes that it may belong to, with commas between.")),
  h("div", { class: "two" },
    h("section", { class: "card give", "aria-label": "The picture" },
      h("h2", {}, "Picture"), quick, board, shown,
      h("div", { class: "row" }, chooser("Choose a picture", read), h("small", {}, "or drop or paste one anywhere on this page"))),
    h("section", { class: "answer", "aria-label": "The classes and the answer" },
      h("div", { class: "names-of" }, h("h2", {}, h("label", { for: "classes" }, "Classes")), field, chips,
        h("details", {}, h("summary", {}, "Prompt"), h("label", { class: "field" }, "Prompt with {} for the class", template))),
      results)));

  const set = (changes, options) => go("classify", { ...Object.fromEntries(state), ...changes }, options);
  const soon = later(() => set({ classes: field.value.trim(), template: template.value.trim() }, { replace: true }), 350);
  field.addEventListener("input", soon);
  template.addEventListener("change", soon);

  function showState() {
    if (document.activeElement !== field) field.value = state.get("classes") ?? STARTERS;
    template.value = state.get("template") ?? "";
    const source = kept(state.get("pic")) ?? state.get("like"), isDrawing = state.has("drawn") && drawn;
    board.hidden = Boolean(source) && !isDrawing;
    shown.hidden = !source || isDrawing;
    if (!source) { board.reset(); drawn = false; }
    shown.replaceChildren(...(shown.hidden ? [] : [picture(source, { alt: "The picture that is classified", loading: "eager" }),
      h("button", { type: "button", onclick: () => { board.reset(); set({ pic: null, like: null, drawn: null }); } }, "Draw instead")]));
  }

  async function dataOf() {
    const own = kept(state.get("pic"));
    if (own || !state.get("like")) return own;
    return fetchPicture(state.get("like"));
  }

  async function run() {
    asked?.abort();
    asked = new AbortController();
    const { signal } = asked, classes = classesOf(field.value);
    if (!state.has("pic") && !state.has("like")) quick.textContent = "";
    if (!state.has("pic") && !state.has("like")) {
      results.replaceChildren(empty("What is it?", "Draw something, for example a heart: the answer comes with every stroke. Nothing that you draw or drop leaves your service."));
      return;
    }
    if (state.has("pic") && !kept(state.get("pic"))) {
      results.replaceChildren(empty("The picture is gone", "It was kept in another tab. Draw or drop it again."));
      return;
    }
    if (!classes.length) {
      results.replaceChildren(empty("Type some classes", "At least one name; two or more make a choice."));
      return;
    }
    const slow = setTimeout(() => { if (!results.querySelector(".classes")) results.replaceChildren(waiting("Looking")); }, 150);
    try {
      const image = await dataOf(), templates = state.get("template") ? { templates: [state.get("template")] } : {};
      const [found, route] = await Promise.all([
        ask("/classify", { body: { images: [image], classes, top: Math.min(classes.length, 20), ...templates }, signal }),
        routeOf(image, classes, signal).catch(error => { if (error.name === "AbortError") throw error; return null; })]);
      if (!closed && !signal.aborted) show(found.pictures[0], route, classes.length);
    } catch (error) {
      if (error.name !== "AbortError" && !closed) complain(error);
    } finally {
      clearTimeout(slow);
    }
  }

  /** Ask for the weights with reasons: of the classes, or of the picture where the clusters are of images. */
  async function routeOf(image, classes, signal) {
    const perImage = (await facts.models()).data[0].per_image;
    const found = perImage ? await ask("/route-images", { body: { images: [image] }, signal }) : await ask("/route", { body: { classes }, signal });
    return { of: perImage ? found.classes[0] : null, by: new Map(perImage ? [] : found.classes.map(reason => [reason.name, reason])) };
  }

  function show(answer, route, total) {
    const best = answer.classes[0], reasons = route?.by ?? new Map();
    speak(`${best.name}, ${percent(best.probability)}`);
    quick.replaceChildren(h("b", {}, best.name), ` ${percent(best.probability)}`);
    const mine = route?.of ?? reasons.get(best.name), what = route?.of ? "the picture" : `“${best.name}”`, weights = mine?.weights ?? answer.weights;
    const why = h("div", { class: "why" });
    fill(results,
      h("p", { class: "verdict" }, h("span", {}, "Most probably"), h("strong", {}, best.name), h("b", {}, percent(best.probability))),
      h("ol", { class: "classes" }, answer.classes.map((one, place) => h("li", { class: place ? "" : "first" },
        h("span", { class: "name" }, one.name), h("span", { class: "bar" }, h("i", { style: { "--part": one.probability } })), h("b", {}, percent(one.probability)),
        reasons.get(one.name) && Object.keys(reasons.get(one.name).weights).length > 1 ? stack(reasons.get(one.name).weights, { figures: true }) : null))),
      total > answer.classes.length ? h("p", { class: "note" }, `and ${total - answer.classes.length} classes that are less probable`) : null,
      Object.keys(weights).length > 1 ? h("section", {}, h("h2", {}, "Who answers"), h("p", { class: "lead" }, `The experts' weights for ${what}.`), legend(weights, words)) : null,
      mine?.out_of_domain ? h("p", { class: "warn" }, `No expert has learned from captions like ${what}, so the weights are a guess.`) : null,
      mine?.nearest?.length ? h("section", {}, h("h2", {}, "Why"), h("p", { class: "lead" }, `The clusters of training data that lie nearest to ${what}.`), why) : null);
    if (mine?.nearest?.length) explain(mine.nearest, why);
  }

  async function explain(nearest, why) {
    const run = await facts.run().catch(() => null);
    const cards = await Promise.all(nearest.map(near => run ? ask(`/atlas/cluster/${near.cluster}?count=6`).catch(() => null) : null));
    why.replaceChildren(...nearest.map((near, place) => h("article", { class: `cluster ${toneOf(near.expert)}` },
      h("h3", {}, h("i", { class: "key" }), (cards[place]?.keywords ?? near.captions).slice(0, 3).join(", "), h("span", {}, shortName(near.expert))),
      cards[place] ? h("div", { class: "thumbs" }, cards[place].pairs.map(pair => picture(`/atlas/pictures/${pair.row}?size=96`, { alt: pair.caption, title: pair.caption }))) : null,
      h("p", {}, near.captions.slice(0, 4).join(" · ")),
      run ? h("a", { href: `#/atlas?cluster=${near.cluster}` }, "On the atlas") : null)));
  }

  wordsOfExperts().then(found => { words = found; });
  someWords(8).then(names => {
    chips.append(...names.map(name => h("button", { type: "button", "aria-label": `Add the class ${name}`, onclick: () => {
      field.value = [...classesOf(field.value), name].join(", ");
      soon();
    } }, `+ ${name}`)));
  });
  showState();
  run();
  return {
    update(now) { state = now; showState(); run(); },
    close() { closed = true; asked?.abort(); soon.cancel(); },
  };
}
