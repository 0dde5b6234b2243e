// The page: one view (a token written or all, a layer or all, a token pointed at), shown by all parts.

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (given.has(name) ? Number.parseInt(given.get(name), 10) : -1);
  return { step: number("step"), layer: number("layer"), token: number("token") };
}

function checkedView(trace) {
  const view = readHash();
  const within = (value, end) => (Number.isInteger(value) && value >= -1 && value < end ? value : -1);
  return {
    step: within(view.step, trace.numSteps),
    layer: within(view.layer, trace.numLayers),
    token: within(view.token, trace.numTokens),
    pinned: view.token >= 0,
  };
}

function summary(trace) {
  const config = trace.facts.config;
  const parts = [`${trace.facts.model}`, `${thousands(trace.numPrompt)} tokens read`,
    `${thousands(trace.numTokens - trace.numPrompt)} written`];
  if (trace.indices.length) {
    const cells = trace.windows.map((_, i) => trace.startLoc[i + 1] - trace.startLoc[i]);
    const attended = trace.windows.map((window, i) => Math.min(trace.numSinks, window) + cells[i]
      + trace.numPrompt + Math.floor(i / trace.numLayers) - window);
    const most = attended.reduce((a, b) => Math.max(a, b), 0);
    parts.push(`each attends ${thousands(most)} (${percent(most / trace.numPrompt)}): ${config.num_sink_tokens} first, ${
      config.num_selected_tokens} selected, the rest local`);
  }
  if (trace.facts.dropped_steps) parts.push(`the last ${thousands(trace.facts.dropped_steps)} are not recorded`);
  return parts.join(" · ");
}

async function start() {
  const trace = await readTrace();
  const view = checkedView(trace);
  const find = (id) => document.getElementById(id);
  document.title = `What was read for “${textOf(trace, trace.numPrompt, trace.numTokens).trim().slice(0, 40)}”`;
  find("summary").textContent = trace.nothing ?? summary(trace);

  const text = new TextView(find("text"), trace, (token, isClick) => {
    if (isClick) view.pinned = !(view.pinned && view.token === token);
    if (isClick || !view.pinned) point(token);
  });
  const minimap = new Minimap(find("minimap"), trace, (token) => text.scrollTo(token));
  const depth = depthChart(find("depth-chart"), trace, (token) => text.scrollTo(token));
  const layers = layersChart(find("layers-chart"), find("layers-note"), trace);
  const map = mapChart(find("map-chart"), trace, (token, layer) => {
    controls.set({ layer: view.layer === layer ? -1 : layer });
    text.scrollTo(token);
  });
  const controls = new Controls(trace, view, render);
  let ranked = [], passage = -1, top = 0;

  new Finder(trace, find("find"), (span) => {
    find("found").textContent = describeFound(trace, ranked, span);
    mark(span);
  });

  function mark(span) {
    text.marked = trace.marked = span;
    if (span) text.scrollTo(span[0]);
    text.repaint();
    minimap.show(text.heat, top, span);
  }

  function point(token) {
    view.token = token;
    text.setCursor(token);
    showWhy(find("why"), trace, token, view);
    keep();
  }

  function go(token) {
    view.pinned = true;
    point(token);
    text.scrollTo(token);
  }

  function keep() {
    const state = new URLSearchParams();
    for (const name of ["step", "layer"]) if (view[name] >= 0) state.set(name, view[name]);
    if (view.pinned && view.token >= 0) state.set("token", view.token);
    history.replaceState(null, "", `#${state}`);
  }

  function render() {
    const heat = heatOf(trace, view.step, view.layer);
    top = heat.reduce((a, b) => Math.max(a, b), 0);
    ranked = rankPassages(trace, heat);
    passage = -1;
    text.show(heat, top, (token) => alwaysAttended(trace, token, view.step) !== null);
    minimap.show(heat, top, trace.marked);
    depth.show(heat);
    map.show(view.step, view.layer, top);
    layers.show(view.step);
    drawLegend(find("legend"), find("ticks"), top);
    showPassages(find("passages"), trace, ranked, go);
    showWhy(find("why"), trace, view.token, view);
    keep();
  }

  function press(event) {
    if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = {
      "[": () => controls.move("step", -1), "]": () => controls.move("step", 1),
      "{": () => controls.move("layer", -1), "}": () => controls.move("layer", 1),
      n: () => ranked.length && go(ranked[(passage = Math.min(passage + 1, ranked.length - 1))].peak),
      p: () => ranked.length && go(ranked[(passage = Math.max(passage - 1, 0))].peak),
    };
    if (event.target === text.root) {
      const from = view.token < 0 ? text.visible()[0] : view.token;
      acts.ArrowLeft = () => go(Math.max(0, from - 1));
      acts.ArrowRight = () => go(Math.min(trace.numTokens - 1, from + 1));
    }
    if (acts[event.key]) {
      event.preventDefault();
      acts[event.key]();
    }
  }

  const look = () => requestAnimationFrame(() => minimap.look(text.visible()));
  text.root.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(text.root);
  document.addEventListener("keydown", press);
  DARK.addEventListener("change", () => {
    render();
    [depth, map, layers].forEach((chart) => chart.redraw());
  });
  render();
  if (trace.marked) {
    mark(trace.marked);
    find("found").textContent = describeFound(trace, ranked, trace.marked);
  }
  if (view.token >= 0) go(view.token);
  else if (!trace.marked && ranked.length) text.scrollTo(ranked[0].peak);
  look();
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  const failure = document.getElementById("failure");
  failure.hidden = false;
  failure.textContent = `This page needs a newer browser (2023 or later): ${error.message}`;
  throw error;
});
