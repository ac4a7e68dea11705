// What all views are built of: elements, numbers as people read them, bars of experts, pictures.

/** Make an element. Attributes that begin with "on" are listeners; null and false ones are left out; children are never HTML. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "style") for (const [key, part] of Object.entries(value)) element.style.setProperty(key, part);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "htmlFor") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

/** Put children in the place of those that an element has; null and false ones are left out. */
export const fill = (element, ...children) => element.replaceChildren(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));

export const thousands = number => Math.round(number).toLocaleString("en");
export const percent = share => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
export const plural = (count, one, many = one + "s") => `${thousands(count)} ${count === 1 ? one : many}`;

export function duration(seconds) {
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (hours < 1) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return days < 1 ? `${hours} h ${minutes % 60} min` : `${days} d ${hours % 24} h`;
}

export function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (count >= size) return `${(count / size).toPrecision(3)} ${unit}`;
  return `${count} bytes`;
}

/** The colour class of an expert, by its name or its position. */
export function toneOf(name, position = 0) {
  const number = /(\d+)$/.exec(name);
  return `e${Math.min(63, number ? Number(number[1]) : position)}`;
}
export const shortName = name => name.replace("expert-", "expert ");

/** A bar of all experts' shares, with the shares as text for readers that do not see it. */
export function stack(shares, { label = "Weights of the experts", whole = 1, figures = false } = {}) {
  const entries = Object.entries(shares), words = entries.map(([name, share]) => `${shortName(name)} ${percent(share)}`).join(", ");
  const total = entries.reduce((sum, [, share]) => sum + Math.max(0, share), 0) || 1;
  return h("span", { class: "stack", role: "img", "aria-label": `${label}: ${words}`, title: words },
    entries.map(([name, share], position) => {
      const part = Math.max(0, share) / total * whole;
      return part < 0.004 ? null : h("i", { class: toneOf(name, position), style: { "--part": part } },
        figures && part > 0.12 ? h("b", {}, /\d+$/.exec(name)?.[0] ?? "") : null);
    }));
}

/** Names of experts with their weights, the heaviest first. */
export function legend(weights, words = {}) {
  return h("ul", { class: "legend", "aria-label": "Experts that answer" },
    Object.entries(weights).map(([name, weight], position) => [name, weight, position]).filter(entry => entry[1] > 0.005)
      .sort((one, other) => other[1] - one[1])
      .map(([name, weight, position]) => h("li", { class: toneOf(name, position), title: (words[name] ?? []).join(", ") },
        h("i", { class: "key" }), `${shortName(name)} `, h("b", {}, percent(weight)),
        words[name]?.length ? h("span", {}, words[name].slice(0, 3).join(", ")) : null)));
}

/** What a view shows where it has nothing yet, or cannot show it: a heading, a sentence, and what can be done. */
export const empty = (heading, text, ...more) => h("div", { class: "empty" }, h("h2", {}, heading), text ? h("p", {}, text) : null, ...more);
export const failure = (error, again, ...more) => h("div", { class: "empty wrong", role: "alert" }, h("h2", {}, "That did not work"),
  h("p", {}, error.message), error.requestId ? h("p", {}, h("small", {}, `Request ${error.requestId}`)) : null,
  again ? h("button", { type: "button", onclick: again }, "Try again") : null, ...more);
export const waiting = text => h("div", { class: "waiting", role: "status" }, h("i", { class: "spinner" }), text);

export function speak(text) {
  const place = document.getElementById("spoken");
  place.textContent = "";
  requestAnimationFrame(() => { place.textContent = text; });
}

/** Call a function once nothing has asked for it for a while. */
export function later(work, delay = 200) {
  let timer = 0;
  const ask = (...words) => { clearTimeout(timer); timer = setTimeout(() => work(...words), delay); };
  ask.cancel = () => clearTimeout(timer);
  return ask;
}

/** Draw an icon from the path of its lines. */
export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

/** Open a dialog over the page; it is removed when it is closed. */
export function openDialog(label, ...children) {
  const before = document.activeElement;
  const dialog = h("dialog", { "aria-label": label }, h("button", { type: "button", class: "plain shut", "aria-label": "Close", onclick: () => dialog.close() }, "×"), ...children);
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => { dialog.remove(); before?.focus?.(); });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
