"use strict";
// Small helpers of the page, and its charts. Texts from the data are set with textContent, or pass `plain` on
// their way into plotly, which reads a little HTML in its labels. Each chart is a function of the theme and is
// drawn again when the theme changes.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const number = (value) => new Intl.NumberFormat("en").format(value);
const plural = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
const percent = (share) => {
  if (share > 0 && share < 0.001) return "<0.1%";
  if (share > 0.999 && share < 1) return ">99.9%";
  return `${(100 * share).toFixed(share > 0 && (share < 0.1 || share > 0.99) && share < 1 ? 1 : 0)}%`;
};
const day = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 10);
const instant = (seconds) => `${new Date(1000 * seconds).toISOString().slice(0, 19).replace("T", " ")} UTC`;
const sum = (values) => values.reduce((a, b) => a + b, 0);

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

function drawing(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

const COLOURS = 10; // campaigns that have a colour of their own, everywhere on the page
function campaignMark(campaign) {
  const shape = campaign < 6 ? "circle" : "diamond";
  return element("span", null, { class: `mark ${shape}`, style: `background: var(--c${campaign % 6})`, "aria-hidden": "true" });
}

const Charts = (() => {
  const drawn = new Map(); // element -> (theme) => {data, layout}
  const others = []; // functions that draw what is not plotly's

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(name).trim();
    return {
      ink: get("--ink"), dim: get("--dim"), rule: get("--rule"), raised: get("--raised"), rest: get("--rest"), accent: get("--accent"),
      colours: [0, 1, 2, 3, 4, 5].map((i) => get(`--c${i}`)), steps: [...Array(10).keys()].map((i) => get(`--t${i}`)),
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

  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) if (target.clientWidth) Plotly.Plots.resize(target); // not of a row that is filtered out
  });

  function draw(node, build) {
    const isNew = !drawn.has(node);
    drawn.set(node, build);
    const { data: traces, layout: look } = build(theme());
    const done = Plotly.react(node, traces, look, { displayModeBar: false, displaylogo: false });
    if (isNew) resized.observe(node);
    return done;
  }

  function drop(node) {
    resized.unobserve(node);
    Plotly.purge(node);
    drawn.delete(node);
  }

  function redraw() {
    for (const again of others) again();
    return Promise.all([...drawn].map(([node, build]) => draw(node, build)));
  }

  // Draws once the element comes near the window: a chart that nobody scrolls to costs nothing.
  const waiting = new Map();
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      draw(target, waiting.get(target));
    }
  }, { rootMargin: "600px" });

  function later(node, build) {
    if (!node) return;
    waiting.set(node, build);
    near.observe(node);
  }

  function everything() { // before printing
    for (const [node, build] of waiting) if (!drawn.has(node)) draw(node, build);
  }

  function sizes(t) {
    const { low, clusters, sequences } = data.sizes;
    const short = new Intl.NumberFormat("en", { notation: "compact" });
    const names = low.map((n) => short.format(n));
    const total = sum(sequences) || 1;
    const share = sequences.map((n) => n / total);
    const [ticks, gap] = innerWidth < 640 ? [4, 0.28] : [8, 0.14];
    const classes = { type: "category", showgrid: false, tickangle: 0, tick0: 0, dtick: Math.ceil(low.length / ticks) };
    const bar = (y, hovertext, more) => ({ type: "bar", x: names, y, marker: { color: t.dim }, hovertext, hoverinfo: "text", showlegend: false, ...more });
    const hover = low.map((n, i) => `${n === 1 ? "1 sequence" : `${number(n)} to ${number(2 * n - 1)} sequences`}<br>${plural(clusters[i], "campaign")}<br>${percent(share[i])} of the sequences`);
    return {
      data: [bar(clusters, hover), bar(share, hover, { xaxis: "x2", yaxis: "y2" })],
      layout: layout(t, {
        grid: { rows: 1, columns: 2, pattern: "independent", xgap: 0.22 },
        xaxis: axis(t, "sequences", { ...classes, domain: [0, (1 - gap) / 2] }),
        xaxis2: axis(t, "sequences", { ...classes, domain: [(1 + gap) / 2, 1] }),
        yaxis: axis(t, "campaigns", { type: "log", dtick: 1 }),
        yaxis2: axis(t, "share of sequences", { tickformat: ".0%", rangemode: "tozero", anchor: "x2" }),
      }),
    };
  }

  // Lines are [first second, flows of every step ...]; a series may have several.
  function unrolled(lines) {
    const x = [];
    const y = [];
    for (const [start, ...flows] of lines) {
      flows.forEach((n, i) => {
        if (!n) return;
        x.push(new Date(1000 * (start + i * data.step)).toISOString().slice(0, 19));
        y.push(n);
      });
    }
    return { x, y };
  }

  function timeline(series) {
    const name = (s) => (s.campaign === null ? "all others" : plain(data.campaigns[s.campaign], 30));
    return (t) => ({
      data: series.map((s) => {
        const { x, y } = unrolled(s.lines);
        return {
          type: "bar", x, y, name: name(s), marker: { color: s.campaign === null ? t.rest : t.colours[s.campaign % 6] }, width: 1000 * data.step * 0.88,
          hovertext: y.map((n, i) => `${name(s)}<br>${x[i].replace("T", " ").replace(data.step >= 86400 ? " 00:00:00" : /$/, "")}<br>${plural(n, "flow")}`), hoverinfo: "text",
        };
      }),
      layout: layout(t, {
        barmode: "stack", showlegend: series.length > 1, xaxis: axis(t, "", { type: "date", showgrid: false }),
        yaxis: axis(t, "flows", { tickformat: "~s", rangemode: "tozero", nticks: 5 }),
      }),
    });
  }

  function hours(flows) {
    const total = sum(flows) || 1;
    return (t) => ({
      data: [{
        type: "bar", x: flows.map((_, i) => i), y: flows.map((n) => n / total), marker: { color: t.dim }, hoverinfo: "text",
        hovertext: flows.map((n, i) => `${String(i).padStart(2, "0")}:00 to ${String(i).padStart(2, "0")}:59<br>${plural(n, "flow")}, ${percent(n / total)}`),
      }],
      layout: layout(t, {
        xaxis: axis(t, "", { showgrid: false, dtick: 6, range: [-0.6, 23.6] }),
        yaxis: axis(t, "", { tickformat: ".0%", rangemode: "tozero", nticks: 3 }), margin: { l: 40, r: 8, t: 8, b: 24 },
      }),
    });
  }

  const EVENTS = [["continued", "rest"], ["grown", 0], ["shrunk", 4], ["born", 2], ["split", 3], ["merged", 5], ["gone", 1]];

  function events(t) {
    const periods = data.events.map((row) => row.period);
    return {
      data: EVENTS.map(([event, colour]) => {
        const ended = event === "merged" || event === "gone";
        return {
          type: "bar", x: periods, y: data.events.map((row) => (ended ? -row[event] : row[event])), name: event,
          width: Math.min(0.65, 0.08 * periods.length), marker: { color: colour === "rest" ? t.rest : t.colours[colour] }, hoverinfo: "text",
          hovertext: data.events.map((row) => `${plain(row.period)}<br>${event}: ${plural(row[event], "campaign")}`),
        };
      }),
      layout: layout(t, {
        barmode: "relative", bargap: 0.35, xaxis: axis(t, "", { type: "category", showgrid: false }),
        yaxis: axis(t, "ended | there", { nticks: 6, zeroline: true, zerolinecolor: t.dim }),
      }),
    };
  }

  function thresholdMark(t, at, text = "θ") {
    if (at === null || at === undefined) return {};
    return {
      shapes: [{ type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: t.ink, width: 1.5, dash: "dot" } }],
      annotations: [{ x: at, y: 1, yref: "paper", text: `${text} ${at.toFixed(2)}`, showarrow: false, xanchor: at > 0.6 ? "right" : "left", xshift: at > 0.6 ? -4 : 4, yanchor: "top", font: { color: t.ink } }],
    };
  }

  function similarity(item) {
    return (t) => {
      const middle = item.edges.slice(1).map((edge, i) => (edge + item.edges[i]) / 2);
      const width = item.edges[1] - item.edges[0];
      const line = (counts, name, colour, dash) => {
        const total = sum(counts) || 1;
        return {
          type: "scatter", mode: "lines", x: middle, y: counts.map((n) => n / total), name, fill: "tozeroy",
          line: { color: colour, width: 1.5, shape: "hvh", dash }, fillcolor: faint(colour),
          hovertext: counts.map((n, i) => `${name}<br>similarity ${(middle[i] - width / 2).toFixed(2)} to ${(middle[i] + width / 2).toFixed(2)}<br>${plural(n, "pair")}, ${percent(n / total)}`), hoverinfo: "text",
        };
      };
      return {
        data: [line(item.different, `different ${item.by}s`, t.colours[1], "dash"), line(item.same, `same ${item.by}`, t.colours[0])],
        layout: layout(t, { xaxis: axis(t, "similarity", { range: [-1, 1] }), yaxis: axis(t, "share of pairs", { tickformat: ".0%", rangemode: "tozero" }), ...thresholdMark(t, data.threshold) }),
      };
    };
  }

  function calibration(bins) {
    return (t) => {
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
    };
  }

  const NAMES = { precision: "precision of joins", recall: "recall of joins", macro_f1: "macro F1" };

  function sweep(t) {
    const { threshold, scores, chosen } = data.sweep;
    const colours = { precision: t.colours[1], recall: t.colours[0], macro_f1: t.ink };
    const lines = Object.entries(scores).flatMap(([by, found], at) => Object.entries(found).map(([name, y]) => ({
      type: "scatter", mode: "lines", x: threshold, y, name: `${NAMES[name]}, ${by}`, line: { color: colours[name], width: name === "macro_f1" ? 2.2 : 1.4, dash: at ? "dot" : "solid" },
      hovertemplate: `threshold %{x:.2f}<br>${NAMES[name]} %{y:.3f}<extra>${plain(by)}</extra>`,
    })));
    return {
      data: lines,
      layout: layout(t, { xaxis: axis(t, "threshold", { range: [0, 1] }), yaxis: axis(t, "", { range: [0, 1.02], tickformat: ".1f" }), ...thresholdMark(t, chosen, "chosen") }),
    };
  }

  function sweepClusters(t) {
    const { threshold, clusters, chosen } = data.sweep;
    return {
      data: [{ type: "scatter", mode: "lines", x: threshold, y: clusters, line: { color: t.colours[0] }, hovertemplate: "threshold %{x:.2f}<br>%{y:,} clusters<extra></extra>" }],
      layout: layout(t, { xaxis: axis(t, "threshold", { range: [0, 1] }), yaxis: axis(t, "clusters", { type: "log", dtick: 1 }), ...thresholdMark(t, chosen, "chosen") }),
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
        yaxis2: axis(t, "separation", { overlaying: "y", side: "right", showgrid: false, tickmode: "auto", tickformat: ".3~f" }), showlegend: second.length > 0,
      }),
    };
  }

  // A line of bars without axes, for a row of the table: from and to in seconds.
  function spark(line, from, to) {
    const [start, ...flows] = line;
    const steps = Math.max(Math.round((to - from) / data.step), 1);
    const wide = 76;
    const high = 22;
    const most = Math.max(...flows);
    const gap = wide / steps > 3 ? 0.8 : 0;
    const path = flows.map((n, i) => {
      const x = (((start - from) / data.step + i) * wide) / steps;
      const h = n ? Math.max((high * n) / most, 1) : 0;
      return n ? `M${x.toFixed(1)} ${high}v${(-h).toFixed(1)}h${(wide / steps - gap).toFixed(2)}v${h.toFixed(1)}z` : "";
    });
    const svg = drawing("svg", { class: "spark", viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, "aria-hidden": "true", preserveAspectRatio: "none" });
    svg.append(drawing("path", { d: path.join("") }));
    return svg;
  }

  return { theme, draw, drop, redraw, later, everything, others, sizes, timeline, hours, events, similarity, calibration, sweep, sweepClusters, training, spark, axis, layout };
})();
