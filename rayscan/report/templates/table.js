"use strict";
// The table of campaigns: rows are made when they are shown, details when they are opened. Thousands of rows
// cost nothing until somebody asks for them.
const PAGE = 50;

const Details = (() => {
  let all = null; // a block of its own, parsed when first asked for
  const get = (row) => {
    all ??= JSON.parse(byId("details").textContent);
    return Object.fromEntries(Object.entries(all).map(([name, column]) => [name, column[row]]));
  };
  return { get };
})();

const Campaigns = (() => {
  const t = data.table;
  const size = t.campaign.length;
  const several = data.periods.length > 1;
  const flags = data.flags;
  const share = (row) => (t.sources[row] ? t.known[row] / t.sources[row] : 0);

  // ---- what a column shows, sorts by and is filtered by ----

  const date = (name) => (row) => element("td", t[name][row] === null ? "–" : day(t[name][row]), { class: "time" });
  const figure = (value, show = number) => (row) => {
    const it = value(row);
    return element("td", it === null ? "–" : show(it), { class: "n" });
  };
  const items = (column, limit, tail) => (row) => {
    const cell = element("td", null, { class: "items" });
    for (const [name, n] of column[row].slice(0, limit)) {
      const item = element("span", null, { class: "item" });
      item.append(element("span", name, { class: "label", title: name }), element("span", ` ${tail(n, row)}`, { class: "dim" }));
      cell.append(item);
    }
    return cell;
  };
  const of = (name) => (row) => t[name][row];
  const changeRatio = (row) => (t.before[row] && !["born", "split"].includes(t.event[row]) ? t.sources[row] / t.before[row] : Infinity);

  function change(row) {
    const from = t.relative[row] ? { title: `from ${t.relative[row]}` } : {};
    return element("td", t.change[row], { class: `change ${t.event[row]}`, ...from });
  }

  function activity(row) {
    const cell = element("td", null, { class: "activity" });
    if (t.line[row]) cell.append(Charts.spark(t.line[row], ...range()));
    cell.append(element("span", number(t.flows[row])));
    return cell;
  }

  const columns = [
    several && { name: "change", title: "Change", make: change, value: changeRatio },
    { name: "sources", title: "Sources", make: figure(of("sources")), value: of("sources"), n: true },
    { name: "sequences", title: "Sequences", make: figure(of("sequences")), value: of("sequences"), n: true },
    { name: "flows", title: "Flows", make: activity, value: of("flows"), n: true },
    { name: "port", title: "Ports", make: items(t.ports, 3, percent), value: (row) => t.ports[row].map((p) => p[0]).join(" ") },
    flags.labels && { name: "label", title: "Labels", make: items(t.labels, 2, number), value: (row) => t.labels[row].map((p) => p[0]).join(" ") },
    flags.scanners && { name: "known", title: "Known scanners", make: items(t.scanners, 2, (n, row) => percent(n / t.sources[row])), value: share, n: true },
    ...["zmap", "masscan", "mirai"].filter((tool) => flags.tools.includes(tool)).map((tool) => (
      { name: tool, title: { zmap: "ZMap", masscan: "masscan", mirai: "Mirai" }[tool], make: figure(of(tool), percent), value: of(tool), n: true })),
    { name: "cohesion", title: "Cohesion", make: figure(of("cohesion"), (v) => v.toFixed(3).replace("-", "−")), value: of("cohesion"), n: true },
    { name: "first", title: "First seen", make: date("first"), value: of("first"), date: true },
    { name: "last", title: "Last seen", make: date("last"), value: of("last"), date: true },
  ].filter(Boolean);
  const fields = new Map(columns.map((column) => [column.name, column]));
  if (flags.scanners) fields.set("scanner", { value: (row) => t.scanners[row].map((p) => p[0]).join(" ") });
  fields.set("change", { value: (row) => `${t.event[row]} ${t.change[row]}` });
  fields.set("campaign", { value: (row) => data.ids[t.campaign[row]] });

  // ---- the filter: words, and conditions such as sources>100 or port:23 ----

  const texts = [];
  function haystack(row) {
    if (texts[row] === undefined) {
      const more = Details.get(row);
      const names = [t.ports, t.labels, t.scanners].flatMap((column) => column[row].map((pair) => pair[0]));
      const places = [...(more.networks || []), ...(more.targets || []), ...more.origins.flatMap((pair) => pair[1])].map((pair) => pair[0]);
      texts[row] = [data.ids[t.campaign[row]], t.event[row], t.change[row], ...names, ...places, ...(more.examples || [])].join(" ").toLowerCase();
    }
    return texts[row];
  }

  const COMPARE = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b };

  const MAY_BE_ABSENT = ["label", "known", "scanner", "zmap", "masscan", "mirai"]; // where no capture or list tells

  // Seconds since 1970 of a day, or of a time of day, which is in UTC; NaN of anything else.
  function seconds(text) {
    const [, date, time] = text.toUpperCase().match(/^(\d{4}-\d\d-\d\d)(T\d\d:\d\d(?::\d\d)?)?Z?$/) || [];
    return date ? Date.parse(time ? `${date}${time}Z` : date) / 1000 : NaN; // a date alone is in UTC by definition
  }

  // A function of the row, or in words what is wrong with a condition.
  function condition(word) {
    const [, name, sign, wanted] = word.match(/^([a-z]+)(<=|>=|[<>=:])(.+)$/) || [];
    const field = fields.get(name);
    if (!field && MAY_BE_ABSENT.includes(name)) return `This report has no column ${name}.`;
    if (!field && name && sign !== ":") return `No column is called ${name}; there are ${[...fields.keys()].join(", ")}.`;
    if (!field) return (row) => haystack(row).includes(word);
    if (sign === ":") return (row) => String(field.value(row) ?? "").toLowerCase().includes(wanted);
    const value = field.date ? seconds(wanted) : wanted.endsWith("%") ? Number(wanted.slice(0, -1)) / 100 : Number(wanted);
    if (Number.isNaN(value)) return `Not understood: ${word}`;
    return (row) => {
      const it = field.value(row);
      return typeof it === "number" && COMPARE[sign](it, value);
    };
  }

  // ---- the rows ----

  const table = byId("campaign-table");
  const body = table?.tBodies[0];
  const opened = new Map(); // row -> its details, as a row of the table
  const made = new Map(); // row -> its row of the table
  let order = [...Array(size).keys()]; // as sorted
  let limit = PAGE;
  let ends = [0, 1];

  const range = () => ends;
  const period = () => byId("period")?.value || "";

  function measure() {
    const lines = t.line.filter((line, row) => line && (!period() || t.period[row] === period()));
    ends = [lines.reduce((a, line) => Math.min(a, line[0]), Infinity), lines.reduce((a, line) => Math.max(a, line[0] + (line.length - 1) * data.step), 0)];
  }

  function matching() {
    const words = byId("filter").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const tests = words.map(condition);
    byId("wrong").textContent = tests.filter((test) => typeof test === "string").join(" ");
    const known = tests.filter((test) => typeof test !== "string");
    return order.filter((row) => (!period() || t.period[row] === period()) && known.every((test) => test(row)));
  }

  function apply() {
    const found = matching();
    const inPeriod = period() ? t.period.filter((p) => p === period()).length : size;
    const visible = found.slice(0, limit);
    body.replaceChildren(...visible.flatMap((row) => [rowOf(row), ...(opened.has(row) ? [opened.get(row)] : [])]));
    byId("shown").textContent = `${number(visible.length)} of ${plural(found.length, "campaign")} shown${found.length < inPeriod ? `, ${number(inPeriod - found.length)} filtered out` : ""}`;
    byId("more").hidden = found.length <= limit;
    byId("more").textContent = `Show ${number(Math.min(found.length - limit, 4 * PAGE))} more`;
  }

  function showMore() {
    const shown = limit;
    limit += 4 * PAGE;
    apply();
    if (byId("more").hidden) buttonOf(matching()[shown]).focus(); // what is hidden cannot keep the focus
  }

  function rowOf(row) {
    if (made.has(row)) return made.get(row);
    const line = element("tr", null, { "data-row": row });
    const head = element("th", null, { scope: "row" });
    const button = element("button", null, { type: "button", "aria-expanded": "false", title: data.ids[t.campaign[row]] });
    button.append(element("span", data.campaigns[t.campaign[row]]));
    if (t.campaign[row] < COLOURS) button.append(campaignMark(t.campaign[row]));
    button.addEventListener("click", () => (opened.has(row) ? close(row) : open(row)));
    head.append(button);
    if (several && !period()) head.append(element("small", `in ${t.period[row]}`));
    line.append(head, ...columns.map((column) => column.make(row)));
    made.set(row, line);
    return line;
  }

  const buttonOf = (row) => made.get(row).querySelector("button");

  function open(row) {
    const detail = element("tr", null, { class: "open", id: `detail-${row}` });
    const cell = element("td", null, { colspan: columns.length + 1 });
    detail.append(cell);
    opened.set(row, detail);
    rowOf(row).after(detail);
    buttonOf(row).setAttribute("aria-expanded", "true");
    buttonOf(row).setAttribute("aria-controls", detail.id);
    fill(cell, row);
  }

  function close(row) {
    const detail = opened.get(row);
    opened.delete(row);
    for (const node of detail.querySelectorAll(".canvas")) Charts.drop(node);
    detail.remove();
    buttonOf(row).setAttribute("aria-expanded", "false");
    buttonOf(row).removeAttribute("aria-controls");
  }

  // Shows a campaign wherever the reader is: its row comes into view, open.
  function go(row) {
    const select = byId("period");
    if (period() && period() !== t.period[row]) { select.value = t.period[row]; restart(); }
    if (!matching().includes(row)) { byId("filter").value = ""; restart(); }
    limit = Math.max(limit, matching().indexOf(row) + 1);
    apply();
    if (!opened.has(row)) open(row);
    buttonOf(row).focus({ preventScroll: true });
    rowOf(row).scrollIntoView({ block: "start" });
  }

  function sort(column, descending) {
    const key = column.value;
    const least = descending ? -Infinity : Infinity; // what has no figure comes last
    const compare = (a, b) => (typeof a === "number" || typeof b === "number" ? (a ?? least) - (b ?? least) || 0 : String(a).localeCompare(String(b), "en", { numeric: true }));
    const keyed = [...Array(size).keys()].map((row) => [key(row), row]);
    keyed.sort((a, b) => (descending ? compare(b[0], a[0]) : compare(a[0], b[0])) || a[1] - b[1]);
    order = keyed.map((pair) => pair[1]);
    apply();
  }

  function heads() {
    const first = { name: "campaign", title: "Campaign", value: (row) => data.ids[t.campaign[row]] };
    const line = table.tHead.rows[0];
    for (const column of [first, ...columns]) {
      const cell = element("th", null, { scope: "col", ...(column.n ? { class: "n" } : {}), ...(column.name === "sources" ? { "aria-sort": "descending" } : {}) });
      const button = element("button", column.title, { type: "button" });
      cell.append(button);
      button.addEventListener("click", () => {
        const now = cell.getAttribute("aria-sort");
        const descending = now ? now === "ascending" : Boolean(column.n || column.date);
        for (const other of line.cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(column, descending);
      });
      line.append(cell);
    }
  }

  function restart() {
    limit = PAGE;
    for (const row of [...opened.keys()]) close(row);
    made.clear(); // what a row shows depends on the period
    measure();
    apply();
  }

  // ---- what opens under a campaign ----

  function part(title, ...content) {
    const node = element("div");
    node.append(element("h4", title), ...content);
    return node;
  }

  function bars(pairs, shareOf, label) {
    const list = element("dl", null, { class: "bars" });
    for (const [name, value] of pairs) {
      const bar = element("dd", null, { class: "bar" });
      const inner = element("span");
      inner.style.width = `${100 * Math.min(shareOf(value), 1)}%`;
      bar.append(inner);
      list.append(element("dt", name), bar, element("dd", label(value)));
    }
    return list;
  }

  const ofSources = (row) => [(n) => n / t.sources[row], number];
  const ofFlows = [(s) => s, percent];
  const withheld = () => element("p", "Withheld from this page.", { class: "note" });

  function facts(row, more) {
    const networks = more.slash8 === null ? number(t.networks[row]) : `${number(t.networks[row])} /24, ${number(more.slash16)} /16, ${number(more.slash8)} /8`;
    const pairs = [
      ["Campaign", data.ids[t.campaign[row]]],
      ["First seen", instant(t.first[row])],
      ["Last flow here", instant(t.last[row])],
      ["Active for", more.lasted],
      ["Sources", number(t.sources[row])],
      ["Their networks", networks],
      ["Destinations", more.destinations === null ? "–" : number(more.destinations)],
      ["Usual gap of a source", more.gap],
      ...(flags.labels ? [["Sources with a label", number(more.labelled)]] : []),
      ...(flags.scanners ? [["Sources on a scanner list", number(t.known[row])]] : []),
    ];
    const list = element("dl", null, { class: "facts" });
    for (const [name, value] of pairs) {
      const line = element("div");
      line.append(element("dt", name), element("dd", value));
      list.append(line);
    }
    return list;
  }

  function portBars(row, more) {
    const rest = 1 - sum(t.ports[row].map((pair) => pair[1]));
    const others = more.ports === null ? 0 : more.ports - t.ports[row].length;
    return bars(others > 0 ? [...t.ports[row], [plural(others, "other port"), Math.max(rest, 0)]] : t.ports[row], ...ofFlows);
  }

  function neighbours(more) {
    if (!more.near.length) return element("p", "No other campaign has a row.", { class: "note" });
    const list = element("ul", null, { class: "near" });
    for (const [row, similarity] of more.near) {
      const item = element("li");
      const button = element("button", data.campaigns[t.campaign[row]], { type: "button" });
      button.addEventListener("click", () => go(row));
      const ports = t.ports[row].slice(0, 2).map((pair) => pair[0]).join(", ");
      item.append(button, element("span", ` ${similarity.toFixed(2)}`), element("small", `${plural(t.sources[row], "source")}, ${ports}`));
      list.append(item);
    }
    return list;
  }

  function others(row) {
    const rows = [...Array(size).keys()].filter((other) => t.campaign[other] === t.campaign[row]);
    rows.sort((a, b) => (t.period[a] < t.period[b] ? -1 : 1));
    const list = element("ul", null, { class: "near" });
    for (const other of rows) {
      const item = element("li");
      const button = element("button", t.period[other], { type: "button" });
      if (other === row) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => go(other));
      item.append(button, element("span", ` ${plural(t.sources[other], "source")}, ${t.change[other]}${t.relative[other] ? ` from ${t.relative[other]}` : ""}`, { class: "dim" }));
      list.append(item);
    }
    return list;
  }

  function said(more) {
    const list = element("ul", null, { class: "said" });
    for (const [source, words] of more.said || []) {
      const item = element("li");
      if (source) item.append(element("code", source), " ");
      item.append(words);
      list.append(item);
    }
    return list;
  }

  function addresses(row, more) {
    if (more.examples === null) return part("Sources", withheld());
    const list = element("ul", null, { class: "addresses" });
    list.append(...more.examples.map((address) => element("li", address)));
    const some = t.sources[row] > more.examples.length;
    return part(some ? `Sources: the ${more.examples.length} with the most flows, of ${number(t.sources[row])}` : "Sources", list);
  }

  function chart(title, height, build) {
    const canvas = element("div", null, { class: `canvas ${height}`, role: "img", "aria-label": title });
    return [part(title, canvas), () => Charts.draw(canvas, build)];
  }

  function fill(cell, row) {
    const more = Details.get(row);
    const grid = element("div", null, { class: "detail" });
    const lines = t.line.filter((line, other) => line && t.campaign[other] === t.campaign[row]);
    const draws = [];
    const times = element("div", null, { class: "times" });
    if (lines.length) {
      const [node, draw] = chart("Flows over time (UTC)", "small", Charts.timeline([{ campaign: t.campaign[row], lines }]));
      times.append(node);
      draws.push(draw);
    }
    if (more.hours) {
      const [node, draw] = chart("By hour of the day (UTC)", "small", Charts.hours(more.hours));
      times.append(node);
      draws.push(draw);
    }
    const who = element("div");
    if (t.labels[row].length) who.append(part(`Labels, of ${plural(t.sources[row], "source")}`, bars(t.labels[row], ...ofSources(row))));
    if (t.scanners[row].length) who.append(part(`Known scanners, of ${plural(t.sources[row], "source")}`, bars(t.scanners[row], ...ofSources(row))));
    for (const [title, names] of more.origins) who.append(part(`${title}, of ${plural(t.sources[row], "source")}`, bars(names, ...ofSources(row))));
    const tools = flags.tools.filter((tool) => t[tool][row] !== null);
    if (tools.length) who.append(part("Marks of tools, share of flows", bars(tools.map((tool) => [fields.get(tool).title, t[tool][row]]), ...ofFlows)));
    who.append(part("Networks with the most sources", more.networks ? bars(more.networks, ...ofSources(row)) : withheld()));
    const where = element("div");
    where.append(part("Ports, share of flows", portBars(row, more)));
    if (!more.targets || more.targets.length) where.append(part("Destination networks, share of flows", more.targets ? bars(more.targets, ...ofFlows) : withheld()));
    const left = element("div");
    left.append(part("Facts", facts(row, more)));
    const beside = element("div");
    if (several) beside.append(part("Over the periods", others(row)));
    beside.append(part("Nearest campaigns, by mean similarity", neighbours(more)));
    const wide = element("div", null, { class: "whole" });
    wide.append(part("Its most typical sequences", said(more)));
    const shown = element("div", null, { class: "whole" });
    shown.append(addresses(row, more));
    if (byId("plot-map")) {
      const button = element("button", "Show it on the map", { type: "button", class: "plain-button" });
      button.addEventListener("click", () => document.dispatchEvent(new CustomEvent("campaign", { detail: t.campaign[row] })));
      shown.append(button);
    }
    grid.append(times, left, where, who, beside, wide, shown);
    cell.append(grid);
    for (const draw of draws) draw();
  }

  function start() {
    if (!table) return;
    heads();
    measure();
    byId("filter").addEventListener("input", () => { limit = PAGE; apply(); });
    byId("period")?.addEventListener("change", restart);
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("more").addEventListener("click", showMore);
    apply();
  }

  const rowFor = (campaign, name) => t.campaign.findIndex((it, row) => it === campaign && t.period[row] === name);
  return { start, go, rowFor };
})();
