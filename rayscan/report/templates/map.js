"use strict";
// A scatter plot on a 2-D canvas: pan, zoom, and the nearest point's description under the pointer.
// Plotly's WebGL plots build functions from text, which the page's policy forbids, and its SVG plots end near
// 20,000 points. This draws 200,000 in about half a second without a graphics card, from one picture per group.

// points: {x, y} arrays of equal length. describe(i): lines of text about point i.
// Returns {show(groups), redraw()}, a group being {indices, colour, symbol, size, opacity, hidden}.
function pointMap(box, points, describe) {
  const REACH = 12; // pixels within which a point counts as meant
  const canvas = document.createElement("canvas");
  const tip = document.createElement("div");
  const context = canvas.getContext("2d");
  const x = Float64Array.from(points.x);
  const y = Float64Array.from(points.y);
  let groups = [];
  let width = 1;
  let height = 1;
  let view = { scale: 1, x: 0, y: 0 }; // data at the middle of the canvas, pixels per unit
  let whole = true; // the view follows the size of the canvas until someone moves it
  let asked = 0;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", box.getAttribute("aria-label"));
  box.removeAttribute("role");
  tip.className = "tip";
  tip.hidden = true;
  box.append(canvas, tip);

  function extent(values) {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return [low, high];
  }

  const [left, right] = extent(x);
  const [low, high] = extent(y);

  function fit() {
    const scale = Math.min((width - 40) / (right - left || 1), (height - 40) / (high - low || 1));
    view = { scale: Math.max(scale, 1e-9), x: (left + right) / 2, y: (low + high) / 2 };
    whole = true;
  }

  const screenX = (i) => (x[i] - view.x) * view.scale + width / 2;
  const screenY = (i) => height / 2 - (y[i] - view.y) * view.scale;

  function picture(group, ratio) {
    const side = Math.ceil((group.size + 2) * ratio);
    const sprite = document.createElement("canvas");
    sprite.width = sprite.height = side;
    const pen = sprite.getContext("2d");
    const radius = (group.size * ratio) / 2;
    pen.translate(side / 2, side / 2);
    pen.fillStyle = group.colour;
    pen.globalAlpha = group.opacity;
    pen.beginPath();
    if (group.symbol === "diamond") {
      pen.rotate(Math.PI / 4);
      pen.rect(-radius * 0.85, -radius * 0.85, radius * 1.7, radius * 1.7);
    } else {
      pen.arc(0, 0, radius, 0, 2 * Math.PI);
    }
    pen.fill();
    return sprite;
  }

  function paint() {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    for (const group of groups.filter((g) => !g.hidden)) {
      const sprite = picture(group, ratio);
      const half = sprite.width / 2;
      for (const i of group.indices) {
        const px = screenX(i);
        const py = screenY(i);
        if (px > -9 && py > -9 && px < width + 9 && py < height + 9) {
          context.drawImage(sprite, px * ratio - half, py * ratio - half);
        }
      }
    }
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
    let found = -1;
    let best = REACH * REACH;
    for (const group of groups.filter((g) => !g.hidden)) {
      for (const i of group.indices) {
        const distance = (screenX(i) - px) ** 2 + (screenY(i) - py) ** 2;
        if (distance <= best) {
          best = distance;
          found = i;
        }
      }
    }
    return found;
  }

  function point(px, py) {
    const i = nearest(px, py);
    tip.hidden = i < 0;
    if (i < 0) return;
    tip.replaceChildren(...describe(i).map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    }));
    tip.style.left = `${Math.max(0, Math.min(screenX(i) + 12, width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(0, Math.min(screenY(i) + 12, height - tip.offsetHeight - 4))}px`;
  }

  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) {
      tip.hidden = true;
      pan(event.movementX, event.movementY);
    } else {
      point(event.offsetX, event.offsetY);
    }
  });
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

  return { show(wanted) { groups = wanted; redraw(); }, redraw, zoom, reset };
}
