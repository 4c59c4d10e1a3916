"use strict";
// The page of `tapfm view`. Data come as scripts (run.js, slides/N/*.js), so that the same page
// works from a server and from files, where a browser lets no page fetch.
const view = (() => {
  const at = (id) => document.getElementById(id);
  const TOP = 12;
  // viridis, as the report's pictures: even steps of lightness
  const STOPS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
    [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]];
  let run, slide, number = -1, chosen = -1, deep, drawn = 0;  // drawn: ms from the page's start

  const colour = (share) => {
    const place = Math.min(1, Math.max(0, share)) * (STOPS.length - 1);
    const low = Math.min(STOPS.length - 2, Math.floor(place)), part = place - low;
    return STOPS[low].map((c, n) => Math.round(c + part * (STOPS[low + 1][n] - c)));
  };
  const text = (value) => {
    if (value === null || value === undefined) return "unknown";
    if (typeof value !== "number") return value === "" ? "unknown" : String(value);
    return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : String(value);
  };
  const row = (name, value) => {
    const made = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    const cell = document.createElement("td");
    cell.textContent = text(value);
    made.append(head, cell);
    return made;
  };
  const rows = (table, pairs) => table.replaceChildren(...pairs.map((each) => row(...each)));
  const load = (source) => {
    const script = document.createElement("script");
    script.src = source;
    script.onerror = () => fault(`${source} is not there.`);
    script.onload = () => script.remove();
    document.body.append(script);
  };
  const fault = (said) => {
    at("fault").textContent = said;
    at("fault").hidden = !said;
  };

  function start(found) {
    run = found;
    document.title = at("title").textContent = `${run.title}, ${run.split} split`;
    at("slide").replaceChildren(...run.slides.map((each, n) => {
      const option = document.createElement("option");
      option.value = n;
      option.textContent = `${each.id} (error ${text(each.error)})`;
      return option;
    }));
    if (!run.slides.length) return fault("This run has no slides.");
    open(0);
  }

  function open(n) {
    if (n < 0 || n >= run.slides.length || n === number) return;
    number = n;
    drawn = 0;
    at("slide").value = n;
    at("previous").disabled = n === 0;
    at("next").disabled = n === run.slides.length - 1;
    load(`slides/${n}/slide.js`);
  }

  function receive(n, found) {
    if (n !== number) return;  // another was asked for meanwhile
    chosen = -1;
    const facts = run.slides[n];
    at("name").textContent = facts.id;
    const of = (kind, values) => Object.entries(values).map(([k, v]) => [`${kind} ${k}`, v]);
    const shown = [["case", facts.case], ...of("true", facts.targets),
      ...of("predicted", facts.predicted), ["error", facts.error]];
    fault(found.fault || "");
    at("tile").hidden = true;
    at("hint").hidden = false;
    at("top").replaceChildren();
    if (deep) deep.destroy();
    deep = null;
    slide = null;
    draw();
    at("flat").hidden = true;
    rows(at("facts"), shown);
    if (found.fault) return;
    slide = { ...found, x: [], y: [], weights: [], predictions: {}, side: 0 };
    zoomable();
  }

  function tiles(n, found) {
    if (n !== number || !slide) return;
    if (found.fault) return fault(found.fault);
    Object.assign(slide, found);
    for (const each of [["tiles", slide.weights.length], ["effective tiles", slide.effective]]) {
      at("facts").append(row(...each));
    }
    at("flat").hidden = !slide.flat;
    at("flat").textContent = "All tiles weigh nearly the same: the colours show small differences.";
    layers();
    tops();
    draw();
  }

  function layers() {
    const names = ["tile weight", ...Object.keys(slide.predictions)];
    const before = at("which").value;
    at("which").replaceChildren(...[...names, "none"].map((name) => {
      const option = document.createElement("option");
      option.value = option.textContent = name;
      return option;
    }));
    if ([...names, "none"].includes(before)) at("which").value = before;
    legend();
  }

  // values of the layer that is shown, and the ends of its colours
  function layer() {
    const name = at("which").value;
    if (!slide || !slide.weights.length || name === "none") return null;
    if (name === "tile weight") {
      const count = slide.weights.length, values = slide.weights.map((w) => w * count);
      return { name, values, low: 0, high: Math.max(...ends(values)), veil: true };
    }
    const values = slide.predictions[name];
    const [low, high] = run.probabilities ? [0, 1] : ends(values);
    return { name, values, low, high, veil: false };
  }
  function ends(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return [low, high];
  }

  function legend() {
    const now = layer();
    at("legend").hidden = !now;
    at("meaning").textContent = !now ? "" : now.veil
      ? "Times the mean weight; a light tile is left bare."
      : "What the model would say of a slide of this tile alone.";
    if (!now) return;
    at("low").textContent = text(Number(now.low.toPrecision(3)));
    at("high").textContent = text(Number(now.high.toPrecision(3)));
    const stops = STOPS.map((c) => `rgb(${c})`).join(",");
    at("colours").style.background = `linear-gradient(to right, ${stops})`;
  }

  function zoomable() {
    const here = number;
    deep = OpenSeadragon({
      element: at("deep"),
      showNavigationControl: false,
      drawer: "canvas",  // pictures from files may be shown, and not read
      crossOriginPolicy: false,
      animationTime: 0.4,
      immediateRender: true,
      imageLoaderLimit: 4,  // the coarse pictures first, which is what is seen
      maxZoomPixelRatio: 4,
      visibilityRatio: 0.5,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      tileSources: {
        width: slide.width,
        height: slide.height,
        tileSize: 254,
        tileOverlap: 1,
        minLevel: 0,
        maxLevel: slide.level,
        getTileUrl: (level, x, y) => `slides/${here}/zoom/${level}/${x}_${y}.jpg`,
      },
    });
    for (const event of ["update-viewport", "open", "resize"]) deep.addHandler(event, draw);
    deep.addOnceHandler("tile-drawn", () => {  // the picture first, then its tiles
      drawn = performance.now();
      load(`slides/${here}/tiles.js`);
    });
    deep.addOnceHandler("tile-load-failed", () => { if (!drawn) load(`slides/${here}/tiles.js`); });
    deep.addHandler("canvas-click", (event) => {
      if (!event.quick) return;
      const place = deep.viewport.viewportToImageCoordinates(
        deep.viewport.pointFromPixel(event.position));
      pick(under(place.x * slide.scale, place.y * slide.scale));
    });
  }

  function under(x0, y0) {
    for (let t = 0; t < slide.x.length; t++) {
      const dx = x0 - slide.x[t], dy = y0 - slide.y[t];
      if (dx >= 0 && dy >= 0 && dx < slide.side && dy < slide.side) return t;
    }
    return -1;
  }

  // level-0 pixels to pixels of the stage: a scale and an origin, since nothing is rotated
  function frame() {
    const item = deep && deep.world.getItemAt(0);
    if (!item) return null;
    const pixel = (x, y) => deep.viewport.pixelFromPoint(item.imageToViewportCoordinates(x, y), true);
    const a = pixel(0, 0), b = pixel(slide.width, slide.height);
    return { x: a.x, y: a.y, step: (b.x - a.x) / (slide.width * slide.scale) };
  }

  function draw() {
    const canvas = at("layer"), box = canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    const [wide, high] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (canvas.width !== wide || canvas.height !== high) {
      canvas.width = wide;
      canvas.height = high;
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, box.width, box.height);
    const where = slide && frame();
    at("scale").hidden = !where || !slide.mpp;
    if (!where) return;
    const now = layer(), strength = at("strength").value / 100, side = slide.side * where.step;
    const edges = (t) => {  // both edges rounded: neighbours meet without gap or overlap
      const left = Math.round(where.x + slide.x[t] * where.step);
      const top = Math.round(where.y + slide.y[t] * where.step);
      const right = Math.round(where.x + slide.x[t] * where.step + side);
      const bottom = Math.round(where.y + slide.y[t] * where.step + side);
      return [left, top, Math.max(1, right - left), Math.max(1, bottom - top)];
    };
    for (let t = 0; now && t < slide.x.length; t++) {
      const [x, y, w, h] = edges(t);
      if (x + w < 0 || y + h < 0 || x > box.width || y > box.height) continue;
      const share = now.high > now.low ? (now.values[t] - now.low) / (now.high - now.low) : 0.5;
      pen.fillStyle = `rgba(${colour(share)},${strength * (now.veil ? share : 1)})`;
      pen.fillRect(x, y, w, h);
    }
    if (chosen >= 0) {
      const [x, y, w, h] = edges(chosen);
      pen.strokeStyle = "#000";
      pen.lineWidth = 4;
      pen.strokeRect(x - 1, y - 1, w + 2, h + 2);
      pen.strokeStyle = "#fff";
      pen.lineWidth = 2;
      pen.strokeRect(x - 1, y - 1, w + 2, h + 2);
    }
    if (slide.mpp) bar(where.step / slide.mpp);
  }

  function bar(pixels) {  // of a micron
    const most = 160 / pixels, ten = 10 ** Math.floor(Math.log10(most));
    const microns = [5, 2, 1].map((n) => n * ten).find((n) => n <= most);
    at("bar").style.width = `${microns * pixels}px`;
    at("length").textContent = microns >= 1000 ? `${microns / 1000} mm` : `${microns} µm`;
  }

  function tops() {
    const order = slide.weights.map((_, t) => t).sort((a, b) => slide.weights[b] - slide.weights[a] || a - b);
    at("top").replaceChildren(...order.slice(0, TOP).map((t, n) => {
      const button = document.createElement("button"), picture = document.createElement("img");
      picture.src = `slides/${number}/tile/${t}.jpg`;
      picture.alt = `tile of rank ${n + 1}, weight ${text(slide.weights[t])}`;
      picture.loading = "lazy";
      button.dataset.tile = t;
      button.append(picture, text(slide.weights[t]));
      button.onclick = () => { pick(t); show(t); };
      return button;
    }));
  }

  function show(t) {  // the tile in the middle, at a third of the stage
    const item = deep && deep.world.getItemAt(0);
    if (!item) return;
    const side = slide.side / slide.scale;
    const box = item.imageToViewportRectangle(
      slide.x[t] / slide.scale - side, slide.y[t] / slide.scale - side, 3 * side, 3 * side);
    deep.viewport.fitBounds(box);
  }

  function pick(t) {
    chosen = t;
    draw();
    at("tile").hidden = t < 0;
    at("hint").hidden = t >= 0;
    for (const each of at("top").children) each.setAttribute("aria-pressed", Number(each.dataset.tile) === t);
    if (t < 0) return;
    at("picture").onerror = () => { at("picture").hidden = true; };  // files hold the heaviest alone
    at("picture").hidden = false;
    at("picture").src = `slides/${number}/tile/${t}.jpg`;
    at("picture").alt = `tile at x ${slide.x[t]}, y ${slide.y[t]}`;
    const rank = slide.weights.filter((w) => w > slide.weights[t]).length + 1;
    const predicted = Object.entries(slide.predictions).map(([name, values]) => [name, values[t]]);
    rows(at("numbers"), [["x, y (level 0)", `${slide.x[t]}, ${slide.y[t]}`],
      ["side (level 0)", slide.side], ["weight", slide.weights[t]],
      ["times the mean", Number((slide.weights[t] * slide.weights.length).toPrecision(3))],
      ["rank", `${rank} of ${slide.weights.length}`], ...predicted]);
    around(t);
  }

  // what is shown of the eight places around a tile; blank where there is none
  function around(t) {
    const now = layer() || { values: slide.weights };
    const half = slide.side / 2, line = [-1, 0, 1];
    at("around").replaceChildren(...line.map((dy) => {
      const row = document.createElement("tr");
      row.append(...line.map((dx) => {
        const other = dx || dy ? under(slide.x[t] + half + dx * slide.side, slide.y[t] + half + dy * slide.side) : t;
        const cell = document.createElement("td");
        cell.textContent = other < 0 ? "" : text(Number(now.values[other].toPrecision(3)));
        cell.className = other === t ? "own" : "";
        return cell;
      }));
      return row;
    }));
  }

  at("previous").onclick = () => open(number - 1);
  at("next").onclick = () => open(number + 1);
  at("slide").onchange = () => open(Number(at("slide").value));
  at("which").onchange = () => { legend(); draw(); if (chosen >= 0) around(chosen); };
  at("strength").oninput = draw;
  at("in").onclick = () => deep && deep.viewport.zoomBy(2);
  at("out").onclick = () => deep && deep.viewport.zoomBy(0.5);
  at("home").onclick = () => deep && deep.viewport.goHome();
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select")) return;
    if (event.key === "n") open(number + 1);
    if (event.key === "p") open(number - 1);
  });
  window.addEventListener("resize", draw);
  // for tests: whether the slide is painted and its tiles are there, and how far it is zoomed
  const state = () => ({ number, drawn, chosen, tiles: slide ? slide.x.length : 0, zoom: deep ? deep.viewport.getZoom(true) : 0 });
  return { start, receive, tiles, state, begin: () => load("run.js") };
})();
view.begin();
