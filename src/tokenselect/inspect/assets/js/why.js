// Why a token was read: its votes by head, and when it was selected.

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function cellName(trace, cell) {
  const step = Math.floor(cell / trace.numLayers), layer = trace.layers[cell % trace.numLayers];
  return `layer ${layer}, to write ${quoted(trace, trace.numPrompt + step)}`;
}

function headBars(trace, { entry, vote }) {
  const bars = element("div", undefined, "bars");
  const shares = trace.headShares.subarray(entry * trace.numHeads, (entry + 1) * trace.numHeads);
  const most = Math.max(...shares, 1);
  shares.forEach((share, head) => {
    const bar = element("i");
    const text = percent((share / 255) * vote, 2);
    bar.style.width = `${(share / most) * 100}%`;
    bar.style.backgroundColor = heatColour(Math.sqrt(share / most));
    const row = element("div");
    row.append(element("span", `head ${head}`), bar, element("span", text, "value"));
    bars.append(row);
  });
  return bars;
}

// A small picture of all cells: layers from top to bottom, tokens written from left to right.
function cellMap(trace, found, top) {
  const canvas = element("canvas", undefined, "cells");
  const width = Math.min(10, Math.max(1, 300 / trace.numSteps)), height = Math.min(8, Math.max(2, 120 / trace.numLayers));
  const context = prepareCanvas(canvas, width * trace.numSteps, height * trace.numLayers);
  canvas.style.width = `${width * trace.numSteps}px`;
  canvas.style.height = `${height * trace.numLayers}px`;
  for (const { cell, vote } of found) {
    context.fillStyle = heatColour(Math.max(0.15, intensity(vote, top)));
    context.fillRect(Math.floor(cell / trace.numLayers) * width, (cell % trace.numLayers) * height, width - 0.5, height - 0.5);
  }
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `selected in ${found.length} of ${trace.numSteps * trace.numLayers} cells`);
  return canvas;
}

function showWhy(root, trace, token, view) {
  if (token < 0) {
    root.replaceChildren(element("p", "Point at a token of the text, or move to one with the arrow keys.", "note"));
    return;
  }
  const parts = [element("p", quoted(trace, token), "token")];
  const depth = token < trace.numPrompt ? `depth ${percent(depthOf(trace, token))}` : "written by the model";
  parts.push(element("p", `token ${thousands(token)} of ${thousands(trace.numTokens)} · ${depth}`));
  const here = selectionsOf(trace, token, view.step, view.layer);
  const all = selectionsOf(trace, token, -1, -1);
  const reason = alwaysAttended(trace, token, view.step);
  if (reason) parts.push(element("p", `Always attended: ${reason}.`));
  if (here.length) {
    parts.push(element("p", `Vote ${percent(here[0].vote, 2)}: ${cellName(trace, here[0].cell)}`));
    parts.push(headBars(trace, here[0]));
  } else if (!reason) {
    parts.push(element("p", "Not selected here."));
  }
  if (all.length) {
    const share = `Selected ${thousands(all.length)} times of ${thousands(trace.numSteps * trace.numLayers)}`;
    parts.push(element("p", `${share} (layers down, tokens written across):`), cellMap(trace, all, all[0].vote));
  }
  root.replaceChildren(...parts);
}
