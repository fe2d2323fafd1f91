"use strict";
// The map: a point for each sequence, drawn by WebGL with shaders of its own, or on a 2-D canvas where a browser
// has no WebGL. Plotly's WebGL plots build functions from text, which the page's policy forbids. Positions go to
// the graphics card once; panning, zooming and colouring change a few numbers.

// A painter takes positions (x, y: Uint16Array) once, then draws with
// paint({scale, x, y, width, height, ratio}, groups: Uint8Array of each point's group, styles of the groups).
function webglPainter(canvas, points) {
  const gl = canvas.getContext("webgl", { antialias: false, premultipliedAlpha: true, preserveDrawingBuffer: true });
  if (!gl) return null;
  const shader = (type, source) => {
    const it = gl.createShader(type);
    gl.shaderSource(it, source);
    gl.compileShader(it);
    return it;
  };
  const program = gl.createProgram();
  gl.attachShader(program, shader(gl.VERTEX_SHADER, `
    attribute vec2 place; attribute float group;
    uniform vec2 middle; uniform vec2 zoom; uniform float ratio; uniform float layer; uniform vec4 colours[13]; uniform vec4 styles[13];
    varying vec4 colour; varying float diamond; varying float radius; varying float side;
    void main() {
      vec4 style = styles[int(group)]; // size, layer, diamond, hidden
      colour = colours[int(group)]; diamond = style.z;
      radius = style.x * ratio * (diamond > 0.5 ? 0.6 : 0.5); // from the middle to a diamond's corner: as large an area
      side = 2.0 * radius + 1.0; // room for a smooth edge
      gl_PointSize = side;
      gl_Position = style.w > 0.5 || style.y != layer ? vec4(9.0, 9.0, 0.0, 1.0) : vec4((place - middle) * zoom, 0.0, 1.0);
    }`));
  gl.attachShader(program, shader(gl.FRAGMENT_SHADER, `
    precision mediump float; varying vec4 colour; varying float diamond; varying float radius; varying float side;
    void main() {
      vec2 at = abs(gl_PointCoord - 0.5) * side;
      float inside = clamp(radius + 0.5 - (diamond > 0.5 ? at.x + at.y : length(at)), 0.0, 1.0);
      if (inside <= 0.0) discard;
      gl_FragColor = vec4(colour.rgb, 1.0) * colour.a * inside;
    }`));
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return null;
  gl.useProgram(program);
  const buffer = (name, values, size, type) => {
    const it = gl.createBuffer();
    const at = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, it);
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.DYNAMIC_DRAW);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, size, type, false, 0, 0);
    return it;
  };
  const places = new Float32Array(2 * points.n);
  for (let i = 0; i < points.n; i += 1) { places[2 * i] = points.x[i]; places[2 * i + 1] = points.y[i]; }
  buffer("place", places, 2, gl.FLOAT);
  const members = buffer("group", new Uint8Array(points.n), 1, gl.UNSIGNED_BYTE);
  const uniform = Object.fromEntries(["middle", "zoom", "ratio", "layer", "colours", "styles"].map((name) => [name, gl.getUniformLocation(program, name)]));
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  let groupsShown = null;
  const hex = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255);

  function paint(view, groups, styles) {
    if (gl.isContextLost()) return;
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (groups !== groupsShown) {
      gl.bindBuffer(gl.ARRAY_BUFFER, members);
      gl.bufferSubData(gl.ARRAY_BUFFER, 0, groups);
      groupsShown = groups;
    }
    const colours = new Float32Array(52);
    const looks = new Float32Array(52);
    styles.forEach((s, g) => {
      colours.set([...hex(s.colour), s.opacity], 4 * g);
      looks.set([s.size, s.layer, s.symbol === "diamond" ? 1 : 0, s.hidden ? 1 : 0], 4 * g);
    });
    gl.uniform2f(uniform.middle, view.x, view.y);
    gl.uniform2f(uniform.zoom, (2 * view.scale) / view.width, (2 * view.scale) / view.height);
    gl.uniform1f(uniform.ratio, view.ratio);
    gl.uniform4fv(uniform.colours, colours);
    gl.uniform4fv(uniform.styles, looks);
    for (const layer of [0, 1]) { // what is grey lies below
      gl.uniform1f(uniform.layer, layer);
      gl.drawArrays(gl.POINTS, 0, points.n);
    }
  }
  return { paint, kind: "webgl" };
}

function canvasPainter(canvas, points) {
  const context = canvas.getContext("2d");

  function picture(style, ratio) {
    const side = Math.ceil((style.size + 2) * ratio);
    const sprite = document.createElement("canvas");
    sprite.width = sprite.height = side;
    const pen = sprite.getContext("2d");
    const radius = (style.size * ratio) / 2;
    pen.translate(side / 2, side / 2);
    pen.fillStyle = style.colour;
    pen.globalAlpha = style.opacity;
    pen.beginPath();
    if (style.symbol === "diamond") {
      pen.rotate(Math.PI / 4);
      pen.rect(-radius * 0.85, -radius * 0.85, radius * 1.7, radius * 1.7);
    } else {
      pen.arc(0, 0, radius, 0, 2 * Math.PI);
    }
    pen.fill();
    return sprite;
  }

  function paint({ scale, x, y, width, height, ratio }, groups, styles) {
    const sprites = styles.map((style) => picture(style, ratio));
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (const layer of [0, 1]) {
      for (let i = 0; i < points.n; i += 1) {
        const style = styles[groups[i]];
        if (style.hidden || style.layer !== layer) continue;
        const px = (points.x[i] - x) * scale + width / 2;
        const py = height / 2 - (points.y[i] - y) * scale;
        if (px < -9 || py < -9 || px > width + 9 || py > height + 9) continue;
        const sprite = sprites[groups[i]];
        context.drawImage(sprite, px * ratio - sprite.width / 2, py * ratio - sprite.width / 2);
      }
    }
  }
  return { paint, kind: "canvas" };
}

// points: {n, x, y}. describe(i): lines of text about point i. chosen(i): a point was clicked.
// Returns {show(groups, styles), zoom, reset}; styles are {colour, symbol, size, opacity, layer, hidden}.
function pointMap(box, points, describe, chosen) {
  const REACH = 12; // pixels within which a point counts as meant
  const CELLS = 256;
  const SIDE = 65536; // coordinates are 0 to 65535
  const tip = document.createElement("div");
  let canvas = document.createElement("canvas");
  let painter = webglPainter(canvas, points);
  if (!painter) { // a canvas keeps the kind of context that was first asked for
    canvas = document.createElement("canvas");
    painter = canvasPainter(canvas, points);
  }
  let groups = new Uint8Array(points.n);
  let styles = [];
  let width = 1;
  let height = 1;
  let view = { scale: 1, x: 0, y: 0 }; // data at the middle of the canvas, pixels per unit
  let whole = true; // the view follows the size of the canvas until someone moves it
  let asked = 0;
  canvas.tabIndex = 0;
  canvas.dataset.painter = painter.kind;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", box.getAttribute("aria-label"));
  box.removeAttribute("role");
  tip.className = "tip";
  tip.hidden = true;
  box.append(canvas, tip);

  const extent = (values) => {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    return [low, high];
  };
  const [left, right] = extent(points.x);
  const [low, high] = extent(points.y);

  // Points sorted into cells, so that the one under the pointer is found among few.
  const cellOf = (i) => ((points.y[i] * CELLS) / SIDE | 0) * CELLS + ((points.x[i] * CELLS) / SIDE | 0);
  const first = new Uint32Array(CELLS * CELLS + 1);
  for (let i = 0; i < points.n; i += 1) first[cellOf(i) + 1] += 1;
  for (let c = 0; c < CELLS * CELLS; c += 1) first[c + 1] += first[c];
  const next = first.slice();
  const sorted = new Uint32Array(points.n);
  for (let i = 0; i < points.n; i += 1) { sorted[next[cellOf(i)]] = i; next[cellOf(i)] += 1; }

  function fit() {
    const scale = Math.min((width - 40) / (right - left || 1), (height - 40) / (high - low || 1));
    view = { scale: Math.max(scale, 1e-9), x: (left + right) / 2, y: (low + high) / 2 };
    whole = true;
  }

  const screenX = (i) => (points.x[i] - view.x) * view.scale + width / 2;
  const screenY = (i) => height / 2 - (points.y[i] - view.y) * view.scale;

  function paint() {
    const ratio = window.devicePixelRatio || 1;
    const size = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    if (styles.length) painter.paint({ ...view, width, height, ratio }, groups, styles);
  }

  function redraw() {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(paint);
  }

  function zoom(factor, px = width / 2, py = height / 2) {
    const dx = (px - width / 2) / view.scale;
    const dy = (height / 2 - py) / view.scale;
    view = { scale: view.scale * factor, x: view.x + dx * (1 - 1 / factor), y: view.y + dy * (1 - 1 / factor) };
    whole = false;
    tip.hidden = true;
    redraw();
  }

  function pan(px, py) {
    view = { ...view, x: view.x - px / view.scale, y: view.y + py / view.scale };
    whole = false;
    redraw();
  }

  function reset() {
    fit();
    redraw();
  }

  function nearest(px, py) {
    const x = (px - width / 2) / view.scale + view.x;
    const y = (height / 2 - py) / view.scale + view.y;
    const reach = REACH / view.scale;
    const cell = (value) => Math.min(Math.max(Math.floor((value * CELLS) / SIDE), 0), CELLS - 1);
    let found = -1;
    let best = reach * reach;
    for (let row = cell(y - reach); row <= cell(y + reach); row += 1) {
      const end = first[row * CELLS + cell(x + reach) + 1];
      for (let k = first[row * CELLS + cell(x - reach)]; k < end; k += 1) {
        const i = sorted[k];
        const distance = (points.x[i] - x) ** 2 + (points.y[i] - y) ** 2;
        if (distance <= best && !styles[groups[i]].hidden) { best = distance; found = i; }
      }
    }
    return found;
  }

  function point(px, py) {
    const i = nearest(px, py);
    tip.hidden = i < 0;
    canvas.style.cursor = i < 0 ? "" : "pointer";
    if (i < 0) return;
    tip.replaceChildren(...describe(i).map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    }));
    tip.style.left = `${Math.max(0, Math.min(screenX(i) + 12, width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(0, Math.min(screenY(i) + 12, height - tip.offsetHeight - 4))}px`;
  }

  let moved = 0; // pixels since the button went down: a click is not a drag
  canvas.addEventListener("pointerdown", (event) => { moved = 0; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) {
      moved += Math.abs(event.movementX) + Math.abs(event.movementY);
      tip.hidden = true;
      pan(event.movementX, event.movementY);
    } else {
      point(event.offsetX, event.offsetY);
    }
  });
  canvas.addEventListener("click", (event) => {
    const i = moved > 4 ? -1 : nearest(event.offsetX, event.offsetY);
    if (i >= 0) chosen(i);
  });
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => { painter = webglPainter(canvas, points); redraw(); });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey) return; // the page scrolls over an idle map
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 400), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("dblclick", reset);
  canvas.addEventListener("keydown", (event) => {
    const act = {
      "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: reset,
      ArrowLeft: () => pan(40, 0), ArrowRight: () => pan(-40, 0), ArrowUp: () => pan(0, 40), ArrowDown: () => pan(0, -40),
    }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  });
  new ResizeObserver(() => {
    width = Math.max(box.clientWidth, 1);
    height = Math.max(box.clientHeight, 1);
    if (whole) fit();
    redraw();
  }).observe(box);

  return { show(members, looks) { groups = members; styles = looks; redraw(); }, zoom, reset };
}

// The section of the map: choice of colours, legend, and what a point says.
const MapSection = (() => {
  const NUMBERS = { u2: Uint16Array, u4: Uint32Array };
  function unpacked(text, kind) { // little-endian, as are the machines that browsers run on
    const bytes = atob(text);
    const raw = new Uint8Array(bytes.length);
    for (let i = 0; i < bytes.length; i += 1) raw[i] = bytes.charCodeAt(i);
    return new NUMBERS[kind](raw.buffer);
  }

  function start() {
    if (!byId("plot-map")) return;
    const { n, left, strange } = data.points;
    const points = { n, x: unpacked(data.points.x, "u2"), y: unpacked(data.points.y, "u2") };
    const source = data.points.src && unpacked(data.points.src, "u4");
    const by = Object.fromEntries(Object.entries(data.points.by).map(([what, c]) => [what, { ...c, codes: unpacked(c.codes, "u2") }]));
    by.campaign.names = [...data.campaigns, ...by.campaign.extra];
    const period = { names: data.points.period.names, codes: unpacked(data.points.period.codes, "u2") };
    const dotted = (address) => [24, 16, 8, 0].map((shift) => (address >>> shift) & 255).join(".");
    let off = new Set();
    let only = null; // the one campaign that is shown in colour

    function describe(i) {
      const lines = Object.entries(by).map(([what, c]) => (what === "campaign" ? c.names[c.codes[i]] : what === "time" ? `in ${period.names[period.codes[i]]}, from ${c.names[c.codes[i]]} on` : `${what} ${c.names[c.codes[i]]}`));
      return source ? [...lines, `source ${dotted(source[i])}`] : lines;
    }

    function chosen(i) {
      const row = Campaigns.rowFor(by.campaign.codes[i], period.names[period.codes[i]]);
      if (row >= 0) Campaigns.go(row);
    }

    const drawn = pointMap(byId("plot-map"), points, describe, chosen);
    const choice = () => byId("colour").value;

    function groups() {
      const { codes, shown } = by[choice()];
      const members = new Uint8Array(n);
      for (let i = 0; i < n; i += 1) members[i] = only === null ? Math.min(codes[i], shown) : Number(codes[i] !== only);
      return members;
    }

    // Fewer pixels a point where there are many, and more where one looks closer.
    const scale = Math.min(Math.max(1 - 0.27 * Math.log10(n / 1000), 0.4), 1.1);

    function look(g) {
      const t = Charts.theme();
      const { shown, ordered } = by[choice()];
      if (only !== null) return g ? { colour: t.rest, symbol: "circle", size: 4 * scale, opacity: 0.35, layer: 0 } : { colour: t.accent, symbol: "circle", size: 7 * scale, opacity: 0.95, layer: 1 };
      if (g === shown) return { colour: t.rest, symbol: "circle", size: 4 * scale, opacity: 0.5, layer: 0 };
      if (ordered) return { colour: t.steps[g], symbol: "circle", size: 5 * scale, opacity: 0.8, layer: 1 };
      return { colour: t.colours[g % 6], symbol: g < 6 ? "circle" : "diamond", size: 6.5 * scale, opacity: 0.85, layer: 1 };
    }

    const count = () => (only === null ? by[choice()].shown + 1 : 2);
    const show = (members) => drawn.show(members, [...Array(count()).keys()].map((g) => ({ ...look(g), hidden: off.has(g) })));

    function title(g) {
      const { names, shown } = by[choice()];
      if (only !== null) return g ? "all others" : names[only];
      if (g < shown) return names[g];
      return names.length - shown === 1 ? names[g] : choice() === "campaign" ? "all others" : `${number(names.length - shown)} others`;
    }

    function key(g, size, members) {
      const { colour, symbol } = look(g);
      const mark = element("span", null, { class: `mark ${symbol}`, style: `background: ${colour}`, "aria-hidden": "true" });
      const button = element("button", null, { type: "button", "aria-pressed": String(!off.has(g)) });
      button.append(mark, element("span", title(g), { class: "label" }), element("span", number(size), { class: "dim" }));
      button.addEventListener("click", () => {
        if (!off.delete(g)) off.add(g);
        button.setAttribute("aria-pressed", String(!off.has(g)));
        show(members);
      });
      return button;
    }

    function all() {
      const members = groups();
      const sizes = new Array(count()).fill(0);
      for (const g of members) sizes[g] += 1;
      byId("map-legend").replaceChildren(...sizes.map((size, g) => (size ? key(g, size, members) : null)).filter(Boolean));
      show(members);
    }

    const notes = [plural(n, "sequence")];
    if (strange) notes.push(`${number(strange)} like nothing that the map was drawn from`);
    if (left) notes.push(`${plural(left, "further one")} without finite coordinates left out`);
    byId("map-note").textContent = notes.join(", ");
    for (const option of [...byId("colour").options]) if (!by[option.value]) option.remove();
    byId("colour").addEventListener("change", () => { off = new Set(); only = null; all(); });
    byId("map-in").addEventListener("click", () => drawn.zoom(1.5));
    byId("map-out").addEventListener("click", () => drawn.zoom(1 / 1.5));
    byId("map-all").addEventListener("click", () => { only = null; off = new Set(); all(); drawn.reset(); });
    document.addEventListener("campaign", (event) => {
      byId("colour").value = "campaign";
      only = event.detail;
      off = new Set();
      all();
      byId("map").scrollIntoView({ block: "start" });
    });
    all();
    Charts.others.push(all);
  }
  return { start };
})();
