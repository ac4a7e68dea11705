// System: what is served, how much memory it takes, and how long answers take.
import { ask } from "./api.js";
import { bytes, duration, empty, failure, h, plural, thousands, waiting } from "./parts.js";

const SECONDS = 3;

export function open(place) {
  let closed = false, timer = 0;
  const body = h("div", {}, waiting("Asking the service"));
  place.append(h("section", { class: "hero" }, h("h1", {}, "System")), body);

  async function read() {
    clearTimeout(timer);
    try {
      const [system, metrics] = await Promise.all([ask("/system"), ask("/metrics", { as: "text" }).catch(() => "")]);
      if (closed) return;
      show(system, latencies(metrics));
      if (!document.hidden) timer = setTimeout(read, 1000 * SECONDS);
      else document.addEventListener("visibilitychange", read, { once: true });
    } catch (error) {
      if (!closed) body.replaceChildren(failure(error, read));
    }
  }

  function show(system, routes) {
    const all = routes.reduce((sum, route) => sum + route.count, 0);
    body.replaceChildren(
      h("div", { class: "tiles" },
        tile("Memory", bytes(system.memory_bytes), "of this process"),
        tile("Up", duration(system.uptime_seconds), `since ${new Date(1000 * system.began).toLocaleString()}`),
        tile("Answers", thousands(all), routes.length ? `half within ${duration(quantileOf(merge(routes), 0.5))}, 99 % within ${duration(quantileOf(merge(routes), 0.99))}` : "none yet"),
        tile("modeclip", system.version, `Python ${system.python}, torch ${system.torch}, ${system.device}`)),
      h("section", {}, h("h2", {}, "Models"), table("Models", ["Model", "State", "Numbers in a vector", "Weights"], system.models.map((model, place) => [[h("i", { class: "key" }), model.name], h("span", { class: "state" }, model.loaded ? "in memory" : "loaded when asked"), model.dimension === null ? "" : thousands(model.dimension), h("code", { title: model.digest }, model.digest.slice(0, 12))]), place => `e${Math.min(63, place)}`)),
      h("section", {}, h("h2", {}, "Indexes"), system.indexes.length ? table("Indexes", ["Index", "Folder", "Images", "Search"], system.indexes.map(index => [index.name, h("code", {}, index.folder), thousands(index.num_rows), index.exact ? "exact" : `approximate, finds ${(100 * index.recall).toFixed(1)} %`])) : empty("No index", "Search needs one: modeclip serve … --index INDEX")),
      h("section", {}, h("h2", {}, "Latency"), routes.length ? table("Latency", ["Route", "Answers", "Half within", "99 % within", "Errors"], routes.map(route => [h("code", {}, route.name), thousands(route.count), duration(quantileOf(route.buckets, 0.5)), duration(quantileOf(route.buckets, 0.99)), route.errors ? thousands(route.errors) : "0"])) : h("p", { class: "absent" }, "Nothing has been asked yet.")),
      h("section", {}, h("h2", {}, "Limits"), h("dl", {}, Object.entries(system.limits).map(([name, value]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, typeof value === "number" ? value.toLocaleString("en") : String(value))]))));
  }

  const tile = (title, figure, words) => h("div", { class: "tile" }, h("h3", {}, title), h("p", {}, h("b", {}, figure)), h("p", {}, words));
  const table = (label, heads, rows, kind = () => null) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, h("table", { class: label === "Latency" ? null : "texts" },
    h("thead", {}, h("tr", {}, heads.map(head => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows.map((cells, place) => h("tr", { class: kind(place) }, cells.map((cell, column) => column ? h("td", {}, cell) : h("th", { scope: "row" }, cell)))))));

  read();
  return { close() { closed = true; clearTimeout(timer); } };
}

// ---------------------------------------------------------------- Prometheus' histograms

/** Read what each route has answered: its count, its errors, and how many answers each bucket of seconds holds. */
export function latencies(text) {
  const routes = new Map();
  const routeOf = name => routes.get(name) ?? routes.set(name, { name, count: 0, errors: 0, buckets: new Map() }).get(name);
  for (const line of text.split("\n")) {
    const found = /^modeclip_request(s_total|_seconds_bucket)\{(.*)\} (\S+)$/.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries([...found[2].matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(one => [one[1], one[2]]));
    const name = labels.route ?? labels.path ?? labels.handler, value = Number(found[3]);
    if (!name) continue;
    if (found[1] === "s_total") {
      if (Number(labels.status ?? labels.code) >= 400) routeOf(name).errors += value;
    } else {
      const { buckets } = routeOf(name), edge = labels.le === "+Inf" ? Infinity : Number(labels.le);
      buckets.set(edge, (buckets.get(edge) ?? 0) + value);
    }
  }
  for (const route of routes.values()) route.count = Math.max(0, ...route.buckets.values());
  return [...routes.values()].filter(route => route.count).sort((one, other) => other.count - one.count);
}

function merge(routes) {
  const all = new Map();
  for (const { buckets } of routes) for (const [edge, count] of buckets) all.set(edge, (all.get(edge) ?? 0) + count);
  return all;
}

/** The seconds within which a share of the answers lies, by a straight line inside its bucket. */
export function quantileOf(buckets, share) {
  const edges = [...buckets].sort((one, other) => one[0] - other[0]), total = edges.at(-1)?.[1] ?? 0;
  let low = 0, before = 0;
  for (const [edge, count] of edges) {
    if (count >= share * total) return edge === Infinity ? low : low + (edge - low) * (count > before ? (share * total - before) / (count - before) : 1);
    low = edge;
    before = count;
  }
  return low;
}
