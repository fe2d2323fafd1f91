"use strict";
// The charts of a sweep. Plotly's parallel coordinates need WebGL built from text, which the page's policy
// forbids; lines through upright axes are the same picture.
(() => {
  const { trials, axes, curves } = data;
  const scores = trials.map((trial) => trial.separation);
  const low = Math.min(...scores);
  const high = Math.max(...scores);
  const strength = (score) => (high > low ? (score - low) / (high - low) : 1);
  const colour = (t, score) => t.steps[Math.round(9 * strength(score))];
  const best = 0;

  function settings(t) {
    const lines = trials.map((trial, i) => ({
      type: "scatter", mode: "lines+markers", x: axes.map((_, a) => a), y: axes.map((axis) => axis.heights[i]), showlegend: false,
      line: { color: i === best ? t.ink : colour(t, trial.separation), width: i === best ? 3 : 1.4, shape: "spline", smoothing: 0.4 }, marker: { size: 5 },
      opacity: i === best ? 1 : 0.35 + 0.6 * strength(trial.separation), hoverinfo: "text",
      hovertext: axes.map(() => `trial ${trial.trial}<br>${axes.map((axis) => `${plain(axis.name)} ${plain(axis.texts[i])}`).join("<br>")}`),
    }));
    const upright = axes.map((_, a) => ({ type: "line", x0: a, x1: a, y0: 0, y1: 1, line: { color: t.dim, width: 1 }, layer: "below" }));
    const marks = axes.flatMap((axis, a) => axis.marks.map(([text, y]) => ({ x: a, y, text: plain(text, 24), showarrow: false, xanchor: "left", xshift: 6, font: { size: 11, color: t.dim } })));
    return {
      data: lines.reverse(), // the best lies on top
      layout: Charts.layout(t, {
        shapes: upright, annotations: marks, margin: { l: 30, r: 70, t: 12, b: 40 },
        xaxis: { tickvals: axes.map((_, a) => a), ticktext: axes.map((axis) => plain(axis.name.replace(/^.*\./, ""), 24)), showgrid: false, zeroline: false, range: [-0.1, axes.length - 0.6], tickfont: { color: t.ink } },
        yaxis: { visible: false, range: [-0.06, 1.06] },
      }),
    };
  }

  function growth(t) {
    return {
      data: curves.map((curve, i) => ({
        type: "scatter", mode: "lines+markers", x: curve.step, y: curve.separation, name: `trial ${curve.trial}`,
        line: { color: i === best ? t.ink : colour(t, trials[i].separation), width: i === best ? 3 : 1.4 }, marker: { size: 5 },
        hovertemplate: `trial ${curve.trial}<br>step %{x:,}<br>separation %{y:.4f}<extra></extra>`,
      })),
      layout: Charts.layout(t, { xaxis: Charts.axis(t, "step", { tickformat: "," }), yaxis: Charts.axis(t, "separation of unseen sources (AUROC)", { tickformat: ".3~f" }) }),
    };
  }

  if (trials.length) {
    Charts.draw(byId("plot-settings"), settings);
    Charts.draw(byId("plot-curves"), growth);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", Charts.redraw);
  document.documentElement.dataset.ready = "true";
})();
