// Runs: how far training is, what came out, and the pages that the run has written.
import { ask } from "./api.js";
import { go } from "./app.js";
import { duration, empty, failure, h, percent, plural, thousands, waiting } from "./parts.js";

const LIVE_SECONDS = 2, CALM_SECONDS = 15;
const TITLES = { report: "Report", check: "Data check", clusters: "Clusters" };

export function open(place, start) {
  let state = start, closed = false, timer = 0, shown = null;
  const head = h("div"), pages = h("section", { class: "pages", "aria-label": "Pages of the run" });
  place.append(h("section", { class: "hero" }, h("h1", {}, "Runs")), head, pages);
  head.append(waiting("Reading the run"));

  async function read() {
    clearTimeout(timer);
    try {
      const found = await ask("/runs");
      if (closed) return;
      if (!found.run) {
        head.replaceChildren(empty("No run is served", "A bundle or one model has no training to show. Start the service with the folder of a run:", h("pre", {}, "modeclip serve runs/demo")));
        return;
      }
      show(found.run, found.check);
      const live = found.check.running || found.run.models.some(model => model.state === "running");
      timer = setTimeout(read, 1000 * (live ? LIVE_SECONDS : CALM_SECONDS));
    } catch (error) {
      if (!closed) head.replaceChildren(failure(error, read));
    }
  }

  function show(run, check) {
    const running = run.models.filter(model => model.state === "running");
    head.replaceChildren(
      h("p", { class: "lead" }, h("strong", {}, run.name), " ", running.length ? `${plural(running.length, "model")} in training.` : run.models.length && run.models.every(model => model.state === "finished") ? `${plural(run.models.length, "model")}, all trained.` : "", " ", h("code", {}, run.folder)),
      ...run.trouble.map(line => h("p", { class: "warn", role: "alert" }, line)),
      results(run.results),
      h("section", {}, h("h2", {}, "Training"), run.models.length ? models(run.models) : h("p", { class: "absent" }, "No model has been planned yet.")),
      run.stages.length ? h("section", {}, h("h2", {}, "Stages"), h("ol", { class: "stages" }, run.stages.map(stage => h("li", {}, h("b", {}, stage.name), h("span", {}, stage.detail), h("small", {}, duration(stage.seconds)))))) : "");
    const isFirst = shown === null;
    showPages(run.pages, check);
    if (isFirst && start.has("page")) pages.scrollIntoView();
  }

  function results(rows) {
    const mixture = rows.find(row => row.default), dense = rows.find(row => row.is_opponent), versus = mixture?.versus_dense_total;
    if (!rows.length) return "";
    const best = rows.filter(row => row.kind !== "bound").reduce((best, row) => row.average > best.average ? row : best);  // labels choose the bounds
    const tile = (title, row, more) => row ? h("div", { class: "tile" }, h("h3", {}, title), h("p", {}, h("b", {}, (100 * row.average).toFixed(1)), " %"), h("p", {}, more ?? `95 %: ${(100 * row.interval[0]).toFixed(1)} to ${(100 * row.interval[1]).toFixed(1)}`)) : null;
    return h("div", { class: "tiles" }, tile(`Mixture, rule ${mixture?.rule}`, mixture), tile("Dense model of equal cost", dense), tile("Best of all rows", best, best.name),
      versus ? h("div", { class: "tile" }, h("h3", {}, "Mixture against dense"), h("p", {}, h("b", {}, points(versus.difference)), " points"), h("p", {}, `95 %: ${versus.interval.map(points).join(" to ")}`)) : null);
  }

  const points = share => `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)}`;
  const models = rows => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Models" }, h("table", { class: "texts" },
    h("thead", {}, h("tr", {}, ["Model", "State", "Done", "Step", "Samples/s", "Loss", "Time left"].map(name => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map(row => h("tr", { class: /^expert-\d+$/.test(row.name) ? `e${row.name.slice(7)}` : row.name.startsWith("expert-") ? "m-prior" : `m-${row.name}` },
      h("th", { scope: "row" }, h("i", { class: "key" }), row.name), h("td", {}, h("span", { class: `state ${row.state}` }, row.state), row.note ? h("small", {}, ` ${row.note}`) : null),
      h("td", {}, h("progress", { max: 1, value: row.share, "aria-label": `${row.name}: ${percent(row.share)} done` }), ` ${percent(row.share)}`), h("td", {}, `${thousands(row.step)} / ${thousands(row.last_step)}`),
      h("td", {}, row.samples_per_second === null ? "" : thousands(row.samples_per_second)), h("td", {}, row.loss === null || row.loss === undefined ? "" : row.loss.toFixed(4)), h("td", {}, row.seconds_left === null ? "" : duration(row.seconds_left)))))));

  function showPages(names, check) {
    const wanted = state.get("page"), current = wanted ?? names[0] ?? "", mark = JSON.stringify([names, check, current]);
    if (mark === shown) return;
    shown = mark;
    const title = name => TITLES[name] ?? name.replace("curation/", "Curation: ");
    const tabs = [...names, ...(names.includes("check") ? [] : ["check"])];
    const links = h("nav", { class: "tabs", "aria-label": "Pages of the run" }, tabs.map(name => h("a", { href: `#/runs?page=${encodeURIComponent(name)}`, "aria-current": name === current ? "true" : null }, title(name))));
    const address = `/runs/pages/${current.split("/").map(encodeURIComponent).join("/")}`;
    const again = words => h("button", { type: "button", disabled: check.running, onclick: async () => { try { await ask("/runs/check", { method: "POST" }); read(); } catch (error) { pages.append(failure(error)); } } }, check.running ? "Checking" : words);
    pages.replaceChildren(links,
      check.error ? h("p", { class: "warn", role: "alert" }, check.error) : "",
      names.includes(current)
        ? h("div", {}, h("p", { class: "row" }, h("a", { class: "button", href: address, target: "_blank", rel: "noopener" }, `Open the ${title(current).toLowerCase()} by itself`), current === "check" ? again("Check again") : null),
          h("iframe", { src: address, title: title(current), sandbox: "allow-scripts allow-popups" }))
        : current === "check"
          ? h("div", { class: "empty" }, check.running ? waiting("Reading all captions and a part of the pictures") : null, h("h2", {}, "The data have not been checked"), h("p", {}, "The check looks for damaged pictures, repeats, empty captions and what is cut off."), again("Check the data"))
          : empty("There is no such page", `The run has: ${names.join(", ") || "none"}.`));
  }

  read();
  return {
    update(now) { state = now; shown = null; read(); },
    close() { closed = true; clearTimeout(timer); },
  };
}
