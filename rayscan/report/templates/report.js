"use strict";
// Sorting, filtering and opening of the table of clusters, and all plots. Texts from the data are set with
// textContent, or pass `plain` on their way into plotly, which reads a little HTML in its labels.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const format = new Intl.NumberFormat("en");
  const number = (value) => format.format(value);
  const plural = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

  function plain(text, limit = 60) {
    const flat = String(text).replace(/\s+/g, " ");
    const signs = [...flat];
    const cut = signs.length > limit ? `${signs.slice(0, limit - 1).join("")}…` : flat;
    return cut.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function element(tag, text, attributes = {}) {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  const clusterName = (name) => (data.single && name.includes(" / ") ? `cluster ${name.slice(name.lastIndexOf(" ") + 1)}` : name);
  const clusterMark = (rank) => element("span", null, { class: `mark ${rank < 6 ? "circle" : "diamond"}`, style: `background: var(--c${rank % 6})`, "aria-hidden": "true" });

  // ---- Plots: each is a function of the theme, drawn again when the theme changes ----

  const plots = new Map(); // element -> (theme) => {data, layout}
  const others = []; // functions that draw what is not plotly's

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(name).trim();
    return {
      paper: get("--paper"), ink: get("--ink"), dim: get("--dim"), rule: get("--rule"), raised: get("--raised"),
      rest: get("--rest"), accent: get("--accent"), colours: [0, 1, 2, 3, 4, 5].map((i) => get(`--c${i}`)),
    };
  }

  const faint = (hex) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join()},0.22)`;

  const axis = (t, title, more = {}) => ({
    title: { text: title, font: { size: 12, color: t.dim }, standoff: 8 }, gridcolor: t.rule, linecolor: t.rule,
    zeroline: false, tickfont: { color: t.dim, size: 11 }, automargin: true, ...more,
  });

  function layout(t, more) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: t.colours,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: t.ink },
      margin: { l: 48, r: 16, t: 12, b: 40 }, hovermode: "closest", bargap: 0.15, dragmode: false,
      hoverlabel: { bgcolor: t.raised, bordercolor: t.rule, font: { color: t.ink }, align: "left" },
      legend: { font: { color: t.ink, size: 11 }, orientation: "h", y: -0.2, yanchor: "top", traceorder: "normal" },
      ...more,
    };
  }

  const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => Plotly.Plots.resize(target)));

  function draw(node, build) {
    const isNew = !plots.has(node);
    plots.set(node, build);
    const { data: traces, layout: look } = build(theme());
    const drawn = Plotly.react(node, traces, look, { displayModeBar: false, displaylogo: false });
    if (isNew) resized.observe(node);
    return drawn;
  }

  function redraw() {
    for (const again of others) again();
    return Promise.all([...plots].map(([node, build]) => draw(node, build)));
  }

  function sizes(t) {
    const { low, clusters, sequences } = data.sizes;
    const short = new Intl.NumberFormat("en", { notation: "compact" });
    const names = low.map((n) => short.format(n));
    const total = sequences.reduce((a, b) => a + b, 0);
    const share = sequences.map((n) => n / total);
    const classes = { type: "category", showgrid: false, tickangle: 0, tick0: 0, dtick: Math.ceil(low.length / 8) };
    const bar = (y, colour, hover, more) => ({
      type: "bar", x: names, y, marker: { color: colour }, hovertext: hover, hoverinfo: "text", showlegend: false, ...more,
    });
    const hover = low.map((n, i) => `${n === 1 ? "1 sequence" : `${number(n)} to ${number(2 * n - 1)} sequences`}<br>${plural(clusters[i], "cluster")}<br>${percent(share[i])} of the sequences`);
    return {
      data: [bar(clusters, t.dim, hover), bar(share, t.dim, hover, { xaxis: "x2", yaxis: "y2" })],
      layout: layout(t, {
        grid: { rows: 1, columns: 2, pattern: "independent", xgap: 0.22 },
        xaxis: axis(t, "sequences", { ...classes, domain: [0, 0.43] }),
        xaxis2: axis(t, "sequences", { ...classes, domain: [0.57, 1] }),
        yaxis: axis(t, "clusters", { type: "log", dtick: 1 }),
        yaxis2: axis(t, "share of sequences", { tickformat: ".0%", rangemode: "tozero", anchor: "x2" }),
      }),
    };
  }

  const seriesName = (s) => (s.rank === null ? "all others" : plain(clusterName(data.clusters[s.rank].name), 30));

  function timeline(series) {
    return (t) => ({
      data: series.map((s) => ({
        type: "bar", x: s.t, y: s.n, name: seriesName(s), marker: { color: s.rank === null ? t.rest : t.colours[s.rank % 6] },
        hovertext: s.n.map((n, i) => `${seriesName(s)}<br>${s.t[i].replace("T", " ")}<br>${plural(n, "flow")}`), hoverinfo: "text",
      })),
      layout: layout(t, {
        barmode: "stack", showlegend: series.length > 1, xaxis: axis(t, "", { type: "date", showgrid: false }),
        yaxis: axis(t, "flows", { tickformat: "~s", rangemode: "tozero", nticks: 5 }),
      }),
    });
  }

  // ---- The map ----

  function drawMap() {
    const { by, src, left, x } = data.points;
    const describe = (i) => Object.entries(by).map(([what, c]) => (what === "cluster" ? clusterName(c.names[c.codes[i]]) : `${what} ${c.names[c.codes[i]]}`)).concat(src ? [`source ${src[i]}`] : []);
    const drawn = pointMap(byId("plot-map"), data.points, describe);
    let off = new Set();

    function groups() {
      const { codes, shown } = by[byId("colour").value];
      const members = Array.from({ length: shown + 1 }, () => []);
      codes.forEach((code, i) => members[Math.min(code, shown)].push(i));
      return members;
    }

    function look(g) {
      const t = theme();
      if (g === by[byId("colour").value].shown) return { colour: t.rest, symbol: "circle", size: 4, opacity: 0.6 };
      return { colour: t.colours[g % 6], symbol: g < 6 ? "circle" : "diamond", size: 6, opacity: 0.8 };
    }

    function show() {
      const all = groups().map((indices, g) => ({ indices, ...look(g), hidden: off.has(g) }));
      drawn.show(all.reverse()); // what is grey lies below
    }

    function title(g) {
      const { names, shown } = by[byId("colour").value];
      const name = byId("colour").value === "cluster" ? clusterName : String;
      if (g < shown) return name(names[g]);
      return names.length - shown === 1 ? name(names[g]) : `${number(names.length - shown)} others`;
    }

    function key(g, n) {
      const mark = clusterMark(g);
      mark.style.background = look(g).colour;
      const button = element("button", null, { type: "button", "aria-pressed": String(!off.has(g)) });
      button.append(mark, element("span", title(g), { class: "label" }), element("span", number(n), { class: "dim" }));
      button.addEventListener("click", () => {
        if (!off.delete(g)) off.add(g);
        button.setAttribute("aria-pressed", String(!off.has(g)));
        show();
      });
      return button;
    }

    function legend() {
      const keys = groups().map((group, g) => (group.length ? key(g, group.length) : null)).filter(Boolean);
      byId("map-legend").replaceChildren(...keys);
    }

    function all() { legend(); show(); }

    const skipped = left ? `, ${plural(left, "further one")} without finite coordinates left out` : "";
    byId("map-note").textContent = `${plural(x.length, "sequence")}${skipped}`;
    byId("colour").addEventListener("change", () => { off = new Set(); all(); });
    byId("map-in").addEventListener("click", () => drawn.zoom(1.5));
    byId("map-out").addEventListener("click", () => drawn.zoom(1 / 1.5));
    byId("map-all").addEventListener("click", () => drawn.reset());
    all();
    return all;
  }

  function similarity(item) {
    return (t) => {
      const middle = item.edges.slice(1).map((edge, i) => (edge + item.edges[i]) / 2);
      const width = item.edges[1] - item.edges[0];
      const line = (counts, name, colour, dash) => {
        const total = counts.reduce((a, b) => a + b, 0) || 1;
        return {
          type: "scatter", mode: "lines", x: middle, y: counts.map((n) => n / total), name, fill: "tozeroy",
          line: { color: colour, width: 1.5, shape: "hvh", dash }, fillcolor: faint(colour),
          hovertext: counts.map((n, i) => `${name}<br>similarity ${(middle[i] - width / 2).toFixed(2)} to ${(middle[i] + width / 2).toFixed(2)}<br>${plural(n, "pair")}, ${percent(n / total)}`), hoverinfo: "text",
        };
      };
      const at = data.threshold;
      const mark = at === null || at === undefined ? {} : {
        shapes: [{ type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: t.ink, width: 1.5, dash: "dot" } }],
        annotations: [{ x: at, y: 1, yref: "paper", text: `θ ${at.toFixed(2)}`, showarrow: false, xanchor: "left", xshift: 4, yanchor: "top", font: { color: t.ink } }],
      };
      return {
        data: [line(item.different, `different ${item.by}s`, t.colours[1], "dash"), line(item.same, `same ${item.by}`, t.colours[0])],
        layout: layout(t, { xaxis: axis(t, "similarity", { range: [-1, 1] }), yaxis: axis(t, "share of pairs", { tickformat: ".0%", rangemode: "tozero" }), ...mark }),
      };
    };
  }

  function calibration(t) {
    const bins = data.calibration;
    const most = Math.max(...bins.map((b) => b.pairs), 1);
    return {
      data: [
        { type: "scatter", mode: "lines", x: [0, 1], y: [0, 1], line: { color: t.rest, dash: "dot" }, hoverinfo: "skip", showlegend: false },
        {
          type: "scatter", mode: "lines+markers", x: bins.map((b) => b.predicted), y: bins.map((b) => b.observed), showlegend: false,
          line: { color: t.colours[0] }, marker: { size: bins.map((b) => 6 + 10 * Math.sqrt(b.pairs / most)) },
          hovertext: bins.map((b) => `said ${percent(b.predicted)}, was ${percent(b.observed)}<br>${plural(b.pairs, "pair")}`), hoverinfo: "text",
        },
      ],
      layout: layout(t, { xaxis: axis(t, "chance given", { range: [0, 1], tickformat: ".0%" }), yaxis: axis(t, "share of one source", { range: [0, 1], tickformat: ".0%" }) }),
    };
  }

  function training(t) {
    const { step, loss, separation } = data.training;
    const measured = step.map((_, i) => i).filter((i) => separation[i] !== null);
    const second = measured.length ? [{
      type: "scatter", mode: "lines+markers", x: measured.map((i) => step[i]), y: measured.map((i) => separation[i]), yaxis: "y2",
      name: "separation", line: { color: t.colours[1], dash: "dash" }, hovertemplate: "step %{x:,}<br>separation %{y:.3f}<extra></extra>",
    }] : [];
    return {
      data: [{ type: "scatter", mode: "lines", x: step, y: loss, name: "loss", line: { color: t.colours[0] }, hovertemplate: "step %{x:,}<br>loss %{y:.3f}<extra></extra>" }, ...second],
      layout: layout(t, {
        xaxis: axis(t, "step", { tickformat: "," }), yaxis: axis(t, "loss"),
        yaxis2: axis(t, "separation", { overlaying: "y", side: "right", showgrid: false, tickmode: "auto", tickformat: ".2~f" }), showlegend: second.length > 0,
      }),
    };
  }

  function drawPage() {
    if (byId("plot-sizes")) draw(byId("plot-sizes"), sizes);
    if (byId("plot-activity")) draw(byId("plot-activity"), timeline(data.activity));
    if (byId("plot-map")) others.push(drawMap());
    const similarities = data.similarity.map((item) => {
      const figure = element("figure", null, { class: "plot" });
      const caption = element("figcaption");
      caption.append(element("b", item.part), element("span", `pairs by ${item.by}`));
      const canvas = element("div", null, { class: "canvas", role: "img", "aria-label": `Similarities, ${item.part}, same against different ${item.by}` });
      figure.append(caption, canvas);
      byId("similarity").append(figure);
      return [canvas, similarity(item)];
    });
    for (const [canvas, build] of similarities) draw(canvas, build); // once the grid has all its columns
    if (byId("plot-calibration")) draw(byId("plot-calibration"), calibration);
    if (byId("plot-training")) draw(byId("plot-training"), training);
  }

  // ---- The table of clusters ----

  const PAGE = 25;
  const COLOURS = 10; // clusters that have a colour of their own, everywhere on the page

  function clusterTable(table) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const opened = new Map(); // row -> its row of details
    const texts = rows.map((row) => haystack(row));
    let limit = PAGE;

    function haystack(row) {
      const item = data.clusters[row.dataset.row];
      const names = [...item.ports, ...item.labels, ...item.scanners, ...item.origins.flatMap((pair) => pair[1])].map((pair) => pair[0]);
      return [item.name, row.textContent, ...names, ...(item.examples || [])].join(" ").toLowerCase();
    }

    function apply() {
      const wanted = byId("filter").value.trim().toLowerCase().split(/\s+/);
      const period = byId("period")?.value || "";
      const found = rows.filter((row) => {
        const text = texts[row.dataset.row];
        return (!period || row.dataset.period === period) && wanted.every((word) => text.includes(word));
      });
      const visible = new Set(found.slice(0, limit));
      for (const row of rows) {
        row.hidden = !visible.has(row);
        if (opened.has(row)) opened.get(row).hidden = row.hidden;
      }
      byId("shown").textContent = `${number(visible.size)} of ${plural(found.length, "cluster")} shown${found.length < rows.length ? `, ${number(rows.length - found.length)} filtered out` : ""}`;
      byId("more").hidden = found.length <= limit;
      byId("more").textContent = `Show ${number(Math.min(found.length - limit, 4 * PAGE))} more`;
    }

    function sort(column, descending) {
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.v === undefined ? cell.textContent.trim().toLowerCase() : Number(cell.dataset.v);
      };
      const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
      const keyed = rows.map((row, i) => [key(row), i, row]);
      keyed.sort((a, b) => (descending ? compare(b[0], a[0]) : compare(a[0], b[0])) || a[1] - b[1]);
      rows.splice(0, rows.length, ...keyed.map((item) => item[2]));
      for (const row of rows) body.append(row, ...(opened.has(row) ? [opened.get(row)] : []));
      apply();
    }

    function makeHead(cell, column) {
      const button = element("button", cell.textContent, { type: "button" });
      cell.replaceChildren(button);
      button.addEventListener("click", () => {
        const now = cell.getAttribute("aria-sort");
        const descending = now ? now === "ascending" : cell.classList.contains("n");
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(column, descending);
      });
    }

    function makeRow(row) {
      const cell = row.cells[0];
      const button = element("button", null, { type: "button", "aria-expanded": "false" });
      button.append(...cell.childNodes);
      cell.append(button);
      if (row.dataset.row < COLOURS) cell.append(clusterMark(Number(row.dataset.row)));
      button.addEventListener("click", () => {
        const open = opened.has(row);
        if (open) close(row); else show(row);
        button.setAttribute("aria-expanded", String(!open));
      });
    }

    function show(row) {
      const detail = element("tr", null, { class: "open", id: `detail-${row.dataset.row}` });
      const cell = element("td", null, { colspan: row.cells.length });
      detail.append(cell);
      row.after(detail);
      opened.set(row, detail);
      row.cells[0].firstChild.setAttribute("aria-controls", detail.id);
      fill(cell, data.clusters[row.dataset.row], Number(row.dataset.row));
    }

    function close(row) {
      for (const node of opened.get(row).querySelectorAll(".canvas")) { resized.unobserve(node); Plotly.purge(node); plots.delete(node); }
      row.cells[0].firstChild.removeAttribute("aria-controls");
      opened.get(row).remove();
      opened.delete(row);
    }

    [...table.tHead.rows[0].cells].forEach(makeHead);
    rows.forEach(makeRow);
    byId("filter").addEventListener("input", () => { limit = PAGE; apply(); });
    byId("period")?.addEventListener("change", () => { limit = PAGE; apply(); });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("more").addEventListener("click", () => { limit += 4 * PAGE; apply(); });
    apply();
  }

  function part(title, ...content) {
    const node = element("div");
    node.append(element("h4", title), ...content);
    return node;
  }

  function bars(items) {
    const list = element("dl", null, { class: "bars" });
    for (const [name, share, text] of items) {
      const bar = element("dd", null, { class: "bar" });
      const inner = element("span");
      inner.style.width = `${100 * share}%`;
      bar.append(inner);
      list.append(element("dt", name), bar, element("dd", text));
    }
    return list;
  }

  function facts(pairs) {
    const list = element("dl", null, { class: "facts" });
    for (const [name, value] of pairs) {
      const line = element("div");
      line.append(element("dt", name), element("dd", value));
      list.append(line);
    }
    return list;
  }

  function addresses(item) {
    if (item.examples === null) return element("p", "Withheld from this page.", { class: "note" });
    const list = element("ul", null, { class: "addresses" });
    list.append(...item.examples.map((address) => element("li", address)));
    return list;
  }

  function fill(cell, item, rank) {
    const grid = element("div", null, { class: "detail" });
    grid.append(part("Facts", facts(item.facts)));
    const shares = element("div");
    shares.append(part("Ports, share of flows", bars(item.ports)));
    if (item.labels.length) shares.append(part(`Labels, of ${plural(item.sources, "source")}`, bars(item.labels)));
    if (item.scanners.length) shares.append(part(`Known scanners, of ${plural(item.sources, "source")}`, bars(item.scanners)));
    for (const [title, names] of item.origins) shares.append(part(`${title}, of ${plural(item.sources, "source")}`, bars(names)));
    if (item.tools.length) shares.append(part("Marks of tools, share of flows", bars(item.tools)));
    grid.append(shares);
    const some = item.examples !== null && item.sources > item.examples.length;
    grid.append(part(some ? `Sources, the ${item.examples.length} with the most flows of ${number(item.sources)}` : "Sources", addresses(item)));
    const canvas = element("div", null, { class: "canvas small", role: "img", "aria-label": "Flows over time" });
    const time = part("Flows over time (UTC)", item.line ? canvas : element("p", "Kept for the largest clusters only.", { class: "note" }));
    time.className = "whole";
    grid.append(time);
    cell.append(grid);
    if (item.line) draw(canvas, timeline([{ rank, ...item.line }]));
  }

  if (byId("cluster-table")) clusterTable(byId("cluster-table"));
  drawPage();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", redraw);
  document.documentElement.dataset.ready = "true";
})();
