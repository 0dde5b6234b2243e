// The charts, by uPlot.

const MAP_BINS = 160;

function axes(x, y, valuesY) {
  const common = { stroke: () => cssColour("--muted"), grid: { stroke: () => cssColour("--line"), width: 1 },
    ticks: { stroke: () => cssColour("--line"), size: 4 }, font: "11px system-ui", gap: 3 };
  return [
    { ...common, label: x, labelFont: "11px system-ui", labelSize: 16, size: 28, space: 60,
      values: (_, splits) => splits.map((value) => (Number.isInteger(value) ? thousands(value) : "")) },
    { ...common, label: y, labelFont: "11px system-ui", labelSize: 16, size: 44, space: 28, values: valuesY },
  ];
}

const percents = (_, splits) => splits.map((value) => `${+(value * 100).toFixed(1)}%`);

function makeChart(root, height, options, data) {
  const width = () => Math.max(200, root.clientWidth);
  const chart = new uPlot({ width: width(), height, cursor: { drag: { setScale: false } }, ...options }, data, root);
  new ResizeObserver(() => chart.setSize({ width: width(), height })).observe(root);
  return chart;
}

function onClick(chart, act) {
  chart.over.addEventListener("click", () => {
    const { left, top } = chart.cursor;
    if (left >= 0) act(chart.posToVal(left, "x"), chart.posToVal(top, "y"));
  });
}

// The strongest vote in each part of the text.
function depthChart(root, trace, onToken) {
  const count = Math.min(400, trace.numTokens);
  const places = Float64Array.from({ length: count }, (_, i) => Math.round(((i + 0.5) * trace.numTokens) / count));
  const chart = makeChart(root, 130, {
    legend: { show: false },
    scales: { x: { time: false, range: () => [0, trace.numTokens] }, y: { range: (_, low, high) => [0, high || 1] } },
    axes: axes("position", "vote", percents),
    series: [{}, { stroke: () => cssColour("--accent"), fill: () => cssColour("--accent-soft"), width: 1.5, points: { show: false } }],
  }, [places, new Float64Array(count)]);
  onClick(chart, (token) => onToken(Math.round(token)));
  return { show: (heat) => chart.setData([places, Float64Array.from(binned(heat, count))]), redraw: () => chart.redraw() };
}

// Layers against positions; the colour is the strongest vote in the tokens written that are looked at.
function mapChart(root, trace, onCell) {
  const count = Math.min(MAP_BINS, trace.numTokens), size = trace.numTokens / count;
  let rows = [], shown = null, top = 0, chosen = -1;
  const draw = (chart) => {
    const { ctx } = chart;
    const y = (layer) => chart.valToPos(layer, "y", true), x = (token) => chart.valToPos(token, "x", true);
    rows.forEach((bins, layer) => bins.forEach((value, bin) => {
      const t = intensity(value, top);
      if (t <= 0) return;
      ctx.fillStyle = heatColour(t);
      ctx.fillRect(x(bin * size), y(layer + 0.5), x((bin + 1) * size) - x(bin * size) + 0.5, y(layer - 0.5) - y(layer + 0.5) + 0.5);
    }));
    if (chosen >= 0) {
      ctx.strokeStyle = cssColour("--ink");
      ctx.strokeRect(x(0), y(chosen + 0.5), x(trace.numTokens) - x(0), y(chosen - 0.5) - y(chosen + 0.5));
    }
  };
  const names = (_, splits) => splits.map((value) => trace.layers[value] ?? "");
  const chart = makeChart(root, 220, {
    legend: { show: false },
    scales: { x: { time: false, range: () => [0, trace.numTokens] }, y: { range: () => [-0.5, trace.numLayers - 0.5] } },
    axes: axes("position", "layer", names),
    series: [{}, { show: true, stroke: "transparent", points: { show: false } }],
    hooks: { drawAxes: [draw] },
  }, [[0, trace.numTokens], [0, 0]]);
  onClick(chart, (token, layer) => onCell(Math.round(token), Math.min(trace.numLayers - 1, Math.max(0, Math.round(layer)))));
  return {
    show(step, layer, scale) {
      if (step !== shown) rows = Array.from({ length: trace.numLayers }, (_, l) => binned(heatOf(trace, step, l), count));
      [shown, top, chosen] = [step, scale, layer];
      chart.redraw();
    },
    redraw: () => chart.redraw(),
  };
}

function layerMeans(trace, step) {
  const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
  const steps = step < 0 ? Array.from({ length: trace.numSteps }, (_, s) => s) : [step];
  const byLayer = (read) => Array.from(trace.layers, (_, layer) =>
    mean(steps.map((s) => read(s * trace.numLayers + layer)).filter((value) => value !== null)));
  return {
    votes: byLayer((cell) => {
      let sum = 0;
      for (let i = trace.startLoc[cell]; i < trace.startLoc[cell + 1]; i++) sum += trace.votes[i];
      return trace.startLoc[cell] < trace.startLoc[cell + 1] ? sum : null;
    }),
    mass: byLayer((cell) => (Number.isNaN(trace.mass[cell]) ? null : trace.mass[cell])),
    served: byLayer((cell) => (trace.served[cell] < 0 ? null : trace.served[cell])),
  };
}

// Shares by layer: of the votes that the selected tokens have, of dense attention, of steps that the cache served.
function layersChart(root, note, trace) {
  const has = (values) => values.some((value) => value !== null);
  const all = layerMeans(trace, -1);
  const wanted = [
    ["votes", "votes captured", "--accent", []],
    ["mass", "dense attention mass captured", "--second", [6, 4]],
    ["served", "Selection Cache hits", "--third", [2, 3]],
  ].filter(([name]) => has(all[name]));
  const value = (_, share) => (share == null ? "–" : percent(share));
  const chart = makeChart(root, 150, {
    scales: { x: { time: false, range: () => [-0.5, trace.numLayers - 0.5] }, y: { range: () => [0, 1] } },
    axes: axes("layer", "share", percents),
    series: [{ label: "layer", value: (_, at) => (at == null ? "–" : trace.layers[at]) },
      ...wanted.map(([, label, colour, dash]) => (
        { label, stroke: () => cssColour(colour), width: 2, dash, value, points: { size: 5 } }))],
  }, [Array.from(trace.layers, (_, i) => i), ...wanted.map(([name]) => all[name])]);
  const missing = [];
  if (!has(all.mass)) missing.push("Attention mass is known only within the trained window.");
  if (!has(all.served)) missing.push("The Selection Cache was off.");
  note.textContent = missing.join(" ");
  return {
    show(step) {
      const means = layerMeans(trace, step);
      chart.setData([Array.from(trace.layers, (_, i) => i), ...wanted.map(([name]) => means[name])]);
    },
    redraw: () => chart.redraw(),
  };
}
