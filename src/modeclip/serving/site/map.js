// The map of the atlas on a canvas: discs of clusters, a point for each pair, pictures when there is room for them.
// While it moves, many points are written into a pixel buffer; at rest, and where they are few, they are drawn as circles.
import { picture } from "./api.js";

const MOST_CIRCLES = 1500, MOST_AT_REST = 60000, REST_MILLISECONDS = 140, PICTURE_ROOM = 40, MOST_PICTURES = 400, MOST_ZOOM = 4000, CLICK_PIXELS = 5, HINT_PIXELS = 60;

export class AtlasMap {
  /**
   * @param canvas The canvas, which fills its parent.
   * @param summary The atlas' summary.
   * @param points Places of the pairs, x and y in turn.
   * @param hear What happens: moved(view), picked({cluster} or {row}), drawn(polygon), hovered(cluster, event).
   */
  constructor(canvas, summary, points, hear) {
    Object.assign(this, { canvas, summary, points, hear });
    this.pen = canvas.getContext("2d");
    this.count = points.length / 2;
    this.codes = new Uint8Array(this.count);
    this.chosen = null;
    this.isHome = true;
    this.flight = 0; // of the way to a place that `show` has begun; whoever moves the map ends it
    this.mode = "move";
    this.lasso = null;
    this.polygons = [];
    this.picked = this.pickedRow = null;
    this.pictures = new Map();
    this.loading = 0;
    this.buffer = document.createElement("canvas");
    this.order = [...summary.clusters].filter(cluster => cluster.size).sort((one, other) => other.size - one.size);
    this.apart = Math.sqrt(this.order.reduce((sum, { disc }) => sum + Math.PI * disc[2] ** 2, 0) / Math.max(1, this.count));
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(canvas.parentElement);
    this.recolour = () => { this.readColours(); this.draw(); };
    document.addEventListener("recolour", this.recolour);
    this.listen();
    this.readColours();
    this.resize();
  }

  close() {
    this.observer.disconnect();
    document.removeEventListener("recolour", this.recolour);
    cancelAnimationFrame(this.frame);
    clearTimeout(this.rest);
  }

  // ------------------------------------------------------------ colours

  readColours() {
    const probe = document.createElement("i"), dab = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    this.canvas.parentElement.append(probe);
    const read = (name, kind = "") => {
      probe.className = kind;
      probe.style.color = `var(${name})`;
      dab.clearRect(0, 0, 1, 1);
      dab.fillStyle = getComputedStyle(probe).color;
      dab.fillRect(0, 0, 1, 1);
      return [...dab.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    this.tones = Array.from({ length: 64 }, (_, number) => read("--tone", `e${number}`));
    Object.assign(this, { ink: read("--ink"), soft: read("--soft"), card: read("--card"), rule: read("--rule"), accent: read("--accent"), warn: read("--warn"), ramp: [read("--ramp-low"), read("--ramp-middle"), read("--ramp-high")] });
    probe.remove();
    this.setPalette(this.legend);
  }

  setPalette(legend) {
    this.legend = legend;
    const mix = (one, other, share) => one.map((part, place) => Math.round(part + (other[place] - part) * share));
    this.palette = Array.from({ length: 256 }, (_, code) => {
      if (!legend) return this.soft;
      if (legend.kind === "number") return code === 255 ? this.rule : code < 127 ? mix(this.ramp[0], this.ramp[1], code / 127) : mix(this.ramp[1], this.ramp[2], (code - 127) / 127);
      if (legend.kind === "mask") return code ? this.accent : mix(this.soft, this.card, 0.55);
      return this.tones[Math.min(code, 63)];
    });
    const number = ([r, g, b], alpha) => (alpha << 24 | b << 16 | g << 8 | r) >>> 0;
    this.strong = Uint32Array.from(this.palette, colour => number(colour, 225));
    this.weak = Uint32Array.from(this.palette, colour => number(colour, 38));
    this.words = this.palette.map(colour => `rgb(${colour.join()})`);
  }

  setCodes(codes, legend) {
    this.codes = codes;
    this.setPalette(legend);
    this.draw();
  }

  // ------------------------------------------------------------ the view

  resize() {
    const box = this.canvas.parentElement.getBoundingClientRect(), ratio = Math.min(2, devicePixelRatio || 1);
    if (!box.width || !box.height) return;
    Object.assign(this, { ratio, width: box.width, height: box.height });
    this.canvas.width = this.buffer.width = Math.round(box.width * ratio);
    this.canvas.height = this.buffer.height = Math.round(box.height * ratio);
    this.image = null;
    const [low, high] = this.order.reduce(([low, high], { disc: [x, y, r] }) => [[Math.min(low[0], x - r), Math.min(low[1], y - r)], [Math.max(high[0], x + r), Math.max(high[1], y + r)]], [[9, 9], [-9, -9]]);
    const bottom = box.height > 400 ? HINT_PIXELS : 0;
    this.middle = this.order.length ? [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2] : [0, 0];
    this.fit = 0.96 * Math.min(box.width / Math.max(high[0] - low[0], 0.01), (box.height - bottom) / Math.max(high[1] - low[1], 0.01)) || 1;
    this.home = { x: 0, y: bottom / 2 / this.fit, zoom: 1 }; // what stands at the lower edge hides no disc
    if (this.isHome) this.view = { ...this.home };
    this.draw();
  }

  get scale() { return this.fit * this.view.zoom; }
  toScreen(x, y) { return [this.width / 2 + (x - this.middle[0] - this.view.x) * this.scale, this.height / 2 + (y - this.middle[1] - this.view.y) * this.scale]; }
  toMap(x, y) { return [(x - this.width / 2) / this.scale + this.view.x + this.middle[0], (y - this.height / 2) / this.scale + this.view.y + this.middle[1]]; }

  setView(view) {
    this.isHome = false;
    this.view = { x: Math.max(-1.2, Math.min(1.2, view.x)), y: Math.max(-1.2, Math.min(1.2, view.y)), zoom: Math.max(0.5, Math.min(MOST_ZOOM, view.zoom)) };
    this.draw();
  }

  move(dx, dy) {
    this.flight++;
    this.setView({ ...this.view, x: this.view.x - dx / this.scale, y: this.view.y - dy / this.scale });
    this.hear.moved(this.view);
  }

  zoomAt(factor, x = this.width / 2, y = this.height / 2) {
    this.flight++;
    const before = this.toMap(x, y);
    this.setView({ ...this.view, zoom: this.view.zoom * factor });
    const after = this.toMap(x, y);
    this.setView({ ...this.view, x: this.view.x + before[0] - after[0], y: this.view.y + before[1] - after[1] });
    this.hear.moved(this.view);
  }

  reset() {
    this.flight++;
    this.setView(this.home);
    this.isHome = true;
    this.hear.moved(this.view);
  }

  /** Move to a place so that a circle around it fills a third of the map. */
  show([x, y], radius) {
    const goal = { x: x - this.middle[0], y: y - this.middle[1], zoom: Math.min(MOST_ZOOM, Math.min(this.width, this.height) / 3 / Math.max(radius, 1e-4) / this.fit) };
    const mine = ++this.flight, from = this.view, began = performance.now(), calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const step = now => {
      if (mine !== this.flight) return;
      const part = calm ? 1 : Math.min(1, (now - began) / 380), soft = 1 - (1 - part) ** 3;
      this.setView({ x: from.x + (goal.x - from.x) * soft, y: from.y + (goal.y - from.y) * soft, zoom: from.zoom * (goal.zoom / from.zoom) ** soft });
      if (part < 1) requestAnimationFrame(step);
      else this.hear.moved(this.view);
    };
    requestAnimationFrame(step);
  }

  // ------------------------------------------------------------ what lies where

  clusterAt(x, y) {
    const [mx, my] = this.toMap(x, y);
    return this.order.find(({ disc }) => (mx - disc[0]) ** 2 + (my - disc[1]) ** 2 <= disc[2] ** 2) ?? null;
  }

  pointAt(x, y) {
    const [mx, my] = this.toMap(x, y), reach = Math.max(8, this.pictureSize / 2) / this.scale;
    let best = -1, least = reach * reach;
    for (let place = 0; place < this.count; place++) {
      const dx = this.points[2 * place] - mx, dy = this.points[2 * place + 1] - my, far = dx * dx + dy * dy;
      if (far < least) { least = far; best = place; }
    }
    return best;
  }

  inside(polygons, clusters) {
    const chosen = new Uint8Array(this.count);
    for (const polygon of polygons) {
      const xs = polygon.map(point => point[0]), ys = polygon.map(point => point[1]);
      const left = Math.min(...xs), right = Math.max(...xs), top = Math.min(...ys), bottom = Math.max(...ys);
      for (let place = 0; place < this.count; place++) {
        const x = this.points[2 * place], y = this.points[2 * place + 1];
        if (x < left || x > right || y < top || y > bottom || chosen[place]) continue;
        let is = false;
        for (let one = 0, other = polygon.length - 1; one < polygon.length; other = one++) {
          if ((ys[one] > y) !== (ys[other] > y) && x < (xs[other] - xs[one]) * (y - ys[one]) / (ys[other] - ys[one]) + xs[one]) is = !is;
        }
        if (is) chosen[place] = 1;
      }
    }
    for (const index of clusters) {
      const [cx, cy, r] = this.summary.clusters[index].disc;
      for (let place = 0; place < this.count; place++) if ((this.points[2 * place] - cx) ** 2 + (this.points[2 * place + 1] - cy) ** 2 <= r * r) chosen[place] = 1;
    }
    return chosen;
  }

  // ------------------------------------------------------------ drawing

  draw() {
    this.atRest = false;
    clearTimeout(this.rest);
    this.rest = setTimeout(() => { this.atRest = true; this.paint(); }, REST_MILLISECONDS);
    if (this.frame || !this.width) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.paint(); });
  }

  paint() {
    const { pen, ratio, width, height } = this, began = performance.now();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.paintDiscs();
    const seen = this.seen();
    const room = Math.sqrt(width * height / Math.max(seen.length, 1));
    this.pictureSize = seen.length && seen.length <= MOST_PICTURES && room > PICTURE_ROOM ? Math.min(72, room * 0.62) : 0;
    if (this.pictureSize) this.paintPictures(seen);
    else if (seen.length <= (this.atRest ? MOST_AT_REST : MOST_CIRCLES)) this.paintCircles(seen);
    else this.paintPixels(seen);
    this.paintWords();
    this.paintLasso();
    this.numSeen = seen.length;
    this.paintSeconds = (performance.now() - began) / 1000;
  }

  /** Return which points lie in the window. */
  seen() {
    const [left, top] = this.toMap(-40, -40), [right, bottom] = this.toMap(this.width + 40, this.height + 40), { points, count } = this;
    this.room ??= new Uint32Array(count);
    let found = 0;
    for (let place = 0; place < count; place++) {
      const x = points[2 * place], y = points[2 * place + 1];
      if (x >= left && x <= right && y >= top && y <= bottom) this.room[found++] = place;
    }
    return this.room.subarray(0, found);
  }

  paintDiscs() {
    const { pen } = this, byExpert = !this.legend || this.legend.kind === "expert";
    for (const cluster of this.order) {
      const [x, y] = this.toScreen(cluster.disc[0], cluster.disc[1]), r = cluster.disc[2] * this.scale;
      if (x + r < 0 || y + r < 0 || x - r > this.width || y - r > this.height) continue;
      const colour = byExpert ? this.tones[Math.min(cluster.expert, 63)] : this.soft;
      pen.beginPath();
      pen.arc(x, y, r, 0, 2 * Math.PI);
      pen.fillStyle = `rgb(${colour.join(" ")} / ${byExpert ? 0.1 : 0.06})`;
      pen.fill();
      const is = cluster.index === this.picked;
      if (is || r > 26) {
        pen.lineWidth = is ? 2.5 : 1;
        pen.strokeStyle = is ? `rgb(${this.ink.join()})` : `rgb(${colour.join(" ")} / .28)`;
        pen.stroke();
      }
    }
  }

  /** Radius of a point in pixels: so that the points of a disc cover a third of it. */
  get dot() { return Math.max(0.7, Math.min(5, 0.33 * this.apart * this.scale)); }

  paintCircles(seen) {
    const { pen, codes, chosen } = this, r = this.dot, groups = new Map();
    for (const place of seen) {
      const key = codes[place] + (chosen && !chosen[place] ? 256 : 0);
      if (!groups.has(key)) groups.set(key, new Path2D());
      const [x, y] = this.toScreen(this.points[2 * place], this.points[2 * place + 1]), path = groups.get(key);
      path.moveTo(x + r, y);
      path.arc(x, y, r, 0, 2 * Math.PI);
    }
    for (const key of [...groups.keys()].sort((one, other) => (other >= 256) - (one >= 256) || one - other)) {
      pen.fillStyle = this.words[key % 256];
      pen.globalAlpha = key >= 256 ? 0.16 : 0.88;
      pen.fill(groups.get(key));
    }
    pen.globalAlpha = 1;
  }

  paintPixels(seen) {
    const { buffer, codes, chosen, points, ratio } = this, wide = buffer.width, high = buffer.height;
    this.image ??= buffer.getContext("2d").createImageData(wide, high);
    const cells = new Uint32Array(this.image.data.buffer);
    cells.fill(0);
    const factor = this.scale * ratio, left = this.width * ratio / 2 - (this.middle[0] + this.view.x) * factor, top = this.height * ratio / 2 - (this.middle[1] + this.view.y) * factor;
    const side = Math.max(1, Math.min(5, Math.round(1.8 * this.dot * ratio)));
    const write = (place, colour) => {
      const x = (points[2 * place] * factor + left) | 0, y = (points[2 * place + 1] * factor + top) | 0;
      if (x < 0 || y < 0 || x + side > wide || y + side > high) return;
      for (let row = y * wide + x, last = row + side * wide; row < last; row += wide) for (let cell = row; cell < row + side; cell++) cells[cell] = colour;
    };
    if (this.legend?.kind === "mask" || chosen) { // what is selected lies on top
      const top = chosen ? place => chosen[place] : place => codes[place];
      for (const place of seen) if (!top(place)) write(place, chosen ? this.weak[codes[place]] : this.strong[codes[place]]);
      for (const place of seen) if (top(place)) write(place, this.strong[codes[place]]);
    } else for (const place of seen) write(place, this.strong[codes[place]]);
    buffer.getContext("2d").putImageData(this.image, 0, 0);
    this.pen.drawImage(buffer, 0, 0, this.width, this.height);
  }

  paintPictures(seen) {
    const { pen, step = this.summary.step } = this, size = this.pictureSize;
    const own = this.pickedRow === null ? -1 : this.pickedRow / step;
    for (const place of [...seen].sort((one, other) => (one === own) - (other === own))) { // the picked one lies on top
      const [x, y] = this.toScreen(this.points[2 * place], this.points[2 * place + 1]), known = this.pictures.get(place);
      const faint = this.chosen && !this.chosen[place];
      pen.globalAlpha = faint ? 0.25 : 1;
      if (known?.complete && known.naturalWidth) {
        const longest = Math.max(known.naturalWidth, known.naturalHeight), w = size * known.naturalWidth / longest, t = size * known.naturalHeight / longest;
        pen.fillStyle = "#fff";
        pen.strokeStyle = place === own ? `rgb(${this.ink.join(" ")})` : this.words[this.codes[place]];
        pen.lineWidth = place === own ? 3 : 1.5;
        pen.beginPath();
        pen.roundRect(x - size / 2 - 3, y - size / 2 - 3, size + 6, size + 6, 6);
        pen.fill();
        pen.stroke();
        pen.drawImage(known, x - w / 2, y - t / 2, w, t);
      } else {
        pen.fillStyle = this.words[this.codes[place]];
        pen.beginPath();
        pen.arc(x, y, 5, 0, 2 * Math.PI);
        pen.fill();
        if (place === own) {
          pen.strokeStyle = `rgb(${this.ink.join(" ")})`;
          pen.lineWidth = 3;
          pen.stroke();
        }
        if (!known && this.loading < 24) {
          if (this.pictures.size > 1500) this.pictures.clear();
          this.loading++;
          const image = picture(`/atlas/pictures/${place * step}?size=128`, { loading: "eager" });
          image.addEventListener("load", () => { this.loading--; this.draw(); });
          image.addEventListener("error", () => { this.loading--; this.draw(); });
          this.pictures.set(place, image);
        }
      }
      pen.globalAlpha = 1;
    }
  }

  paintWords() {
    const { pen } = this, taken = [];
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.lineJoin = "round";
    let shown = 0;
    for (const cluster of this.order) {
      const [x, y] = this.toScreen(cluster.disc[0], cluster.disc[1]), r = cluster.disc[2] * this.scale;
      if (x < -r || y < -r || x > this.width + r || y > this.height + r || r < 9 || shown > 90) continue;
      const words = cluster.keywords.slice(0, r > 90 ? 3 : 1).join(", ") || cluster.caption.slice(0, 20);
      const big = Math.max(11, Math.min(15, r / 3.4));
      pen.font = `600 ${big}px system-ui, sans-serif`;
      const wide = pen.measureText(words).width, at = this.pictureSize || r > 150 ? Math.max(y - r + 14, Math.min(16, y)) : y;
      const box = [x - wide / 2 - 4, at - big / 2 - 3, x + wide / 2 + 4, at + big / 2 + 3];
      if (wide > 2.6 * r + 30 || taken.some(other => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) continue;
      taken.push(box);
      shown++;
      pen.lineWidth = 3.5;
      pen.strokeStyle = `rgb(${this.card.join(" ")} / .92)`;
      pen.strokeText(words, x, at);
      pen.fillStyle = `rgb(${this.ink.join()})`;
      pen.fillText(words, x, at);
    }
  }

  paintLasso() {
    const { pen } = this;
    const trace = (polygon, closed) => {
      pen.beginPath();
      polygon.forEach((point, place) => { const [x, y] = this.toScreen(...point); if (place) pen.lineTo(x, y); else pen.moveTo(x, y); });
      if (closed) pen.closePath();
      pen.fillStyle = `rgb(${this.accent.join(" ")} / .07)`;
      pen.fill();
      pen.setLineDash([6, 5]);
      pen.lineWidth = 2;
      pen.strokeStyle = `rgb(${this.accent.join()})`;
      pen.stroke();
      pen.setLineDash([]);
    };
    for (const polygon of this.polygons) trace(polygon, true);
    if (this.lasso) trace(this.lasso, false);
    if (document.activeElement === this.canvas && this.canvas.matches(":focus-visible")) { // what Enter picks
      const x = this.width / 2, y = this.height / 2;
      pen.strokeStyle = `rgb(${this.ink.join()})`;
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.moveTo(x - 9, y); pen.lineTo(x + 9, y); pen.moveTo(x, y - 9); pen.lineTo(x, y + 9);
      pen.stroke();
    }
  }

  // ------------------------------------------------------------ pointer, wheel and keys

  listen() {
    const { canvas } = this, down = new Map();
    let moved = 0, pinch = 0;
    const at = event => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, at(event));
      moved = 0;
      if (down.size === 1 && (this.mode === "lasso" || event.shiftKey)) this.lasso = [this.toMap(...at(event))];
      else this.lasso = null;
    });
    canvas.addEventListener("pointermove", event => {
      const now = at(event), before = down.get(event.pointerId);
      if (!before) { this.hear.hovered(this.clusterAt(...now), event); return; }
      down.set(event.pointerId, now);
      moved += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]);
      if (down.size === 2) {
        const [one, other] = [...down.values()], apart = Math.hypot(one[0] - other[0], one[1] - other[1]);
        if (pinch) this.zoomAt(apart / pinch, (one[0] + other[0]) / 2, (one[1] + other[1]) / 2);
        pinch = apart;
      } else if (this.lasso) {
        this.lasso.push(this.toMap(...now));
        this.draw();
      } else this.move(now[0] - before[0], now[1] - before[1]);
    });
    const up = event => {
      if (!down.delete(event.pointerId)) return;
      pinch = 0;
      const place = at(event);
      if (this.lasso) {
        const polygon = thin(this.lasso, 2 / this.scale);
        this.lasso = null;
        if (moved > 3 * CLICK_PIXELS && polygon.length > 2) this.hear.drawn(polygon);
        else this.pick(...place);
      } else if (moved <= CLICK_PIXELS && event.type === "pointerup") this.pick(...place);
      this.draw();
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", event => this.hear.hovered(null, event));
    canvas.addEventListener("wheel", event => { event.preventDefault(); this.zoomAt(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0018)), ...at(event)); }, { passive: false });
    canvas.addEventListener("dblclick", event => this.zoomAt(2.2, ...at(event)));
    canvas.addEventListener("focus", () => this.draw());
    canvas.addEventListener("blur", () => this.draw());
    canvas.addEventListener("keydown", event => {
      const step = event.shiftKey ? 160 : 48;
      const keys = { ArrowLeft: () => this.move(step, 0), ArrowRight: () => this.move(-step, 0), ArrowUp: () => this.move(0, step), ArrowDown: () => this.move(0, -step),
        "+": () => this.zoomAt(1.35), "=": () => this.zoomAt(1.35), "-": () => this.zoomAt(1 / 1.35), 0: () => this.reset(), Enter: () => this.pick(this.width / 2, this.height / 2), " ": () => this.pick(this.width / 2, this.height / 2) };
      if (!keys[event.key] || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      keys[event.key]();
    });
  }

  pick(x, y) {
    const place = this.pictureSize ? this.pointAt(x, y) : -1;
    if (place >= 0) this.hear.picked({ row: place * this.summary.step });
    else this.hear.picked({ cluster: this.clusterAt(x, y)?.index ?? null });
  }
}

/** Leave out points that are nearer to the one before than a distance; at most a thousand remain. */
function thin(polygon, apart) {
  const kept = polygon.filter((point, place) => !place || Math.hypot(point[0] - polygon[place - 1][0], point[1] - polygon[place - 1][1]) > apart / 4);
  const step = Math.ceil(kept.length / 1000);
  return kept.filter((_, place) => place % step === 0);
}
