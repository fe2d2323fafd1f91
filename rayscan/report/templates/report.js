"use strict";
// Puts the page together: the table, the map, and the charts as the reader comes near them.
(() => {
  Campaigns.start();
  MapSection.start();
  Charts.later(byId("plot-sizes"), Charts.sizes);
  Charts.later(byId("plot-activity"), Charts.timeline(data.activity));
  Charts.later(byId("plot-events"), Charts.events);
  // A chart for each of these, in a grid that the page has for them.
  function small(grid, items, note, build) {
    const charts = items.map((item) => {
      const figure = element("figure", null, { class: "plot" });
      const caption = element("figcaption");
      caption.append(element("b", item.part), element("span", note(item)));
      const canvas = element("div", null, { class: "canvas", role: "img", "aria-label": `${item.part}, ${note(item)}` });
      figure.append(caption, canvas);
      byId(grid).append(figure);
      return [canvas, build(item)];
    });
    for (const [canvas, draw] of charts) Charts.later(canvas, draw); // once the grid has all its columns
  }
  small("similarity", data.similarity, (item) => `pairs by ${item.by}`, Charts.similarity);
  small("calibrations", data.calibrations, (item) => (item.error === null ? "" : `off by ${percent(item.error)} on average`), (item) => Charts.calibration(item.bins));
  if (data.sweep) {
    Charts.later(byId("plot-sweep"), Charts.sweep);
    Charts.later(byId("plot-sweep-clusters"), Charts.sweepClusters);
  }
  Charts.later(byId("plot-training"), Charts.training);
  for (const button of document.querySelectorAll("[data-campaign]")) {
    button.addEventListener("click", () => {
      const row = Campaigns.rowFor(data.ids.indexOf(button.dataset.campaign), button.dataset.period);
      if (row >= 0) Campaigns.go(row);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", Charts.redraw);
  matchMedia("print").addEventListener("change", () => { Charts.everything(); Charts.redraw(); });
  document.documentElement.dataset.ready = "true";
})();
